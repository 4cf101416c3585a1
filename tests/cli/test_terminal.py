"""cli.terminal: what a pipe gets, what a terminal gets, and what neither must."""

from __future__ import annotations

import io
import sys

import pytest

from chatstream.cli.terminal import Terminal, harmless


class Screen(io.StringIO):
    """A terminal, as far as a program can tell."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine says of its own terminal counts for none of these."""
    for key in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "CI"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, žluť 🙂\n\ttab", "plain, žluť 🙂\n\ttab"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x1b[2J\x1b[31m", "␛[2J␛[31m"),
        ("a\rb", "a␍b"),
        ("a\r\nb", "a\nb"),
        ("\x00\x08\x7f", "␀␈␡"),
        ("\x9b31m\x90", "\ufffd31m\ufffd"),
    ],
)
def test_control_characters_are_made_harmless(text: str, shown: str) -> None:
    """Nothing that a model or a user says sets a title, clears a screen or hides a line."""
    assert harmless(text) == shown


def test_a_terminal_gets_no_control_characters_of_others() -> None:
    """In an answer, a sentence, a table and a cell of it."""
    out, err = Screen(), Screen()
    terminal = Terminal(out, err)
    terminal.write("\x1b]0;x\x07")
    terminal.write("\x1b[2Jdim", "dim")
    terminal.complain("\x1b[2J")
    terminal.table(["A"], [["\x1b[2J\t\n"]])
    assert "\x1b]" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue() + err.getvalue()
    assert "␛[2J␉␊" in out.getvalue()


def test_a_pipe_gets_the_answer_as_it_is() -> None:
    """Every byte, and none more."""
    out = io.StringIO()
    terminal = Terminal(out, io.StringIO())
    terminal.write("a\x1b[1m\r\n", "dim")
    terminal.write("b")
    assert out.getvalue() == "a\x1b[1m\r\nb"
    assert not terminal.interactive


@pytest.mark.parametrize("setting", ["", "NO_COLOR", "TERM"])
def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Not with NO_COLOR, and not on one that is dumb."""
    if setting:
        monkeypatch.setenv(setting, "1" if setting == "NO_COLOR" else "dumb")
    out = Screen()
    Terminal(out, Screen()).write("[b]red[/b]", "red")
    assert "[b]red[/b]" in out.getvalue()  # no markup of rich's, either
    assert ("\x1b[31m" in out.getvalue()) is not bool(setting)


@pytest.mark.parametrize("setting", ["", "TERM"])
def test_a_spinner_is_for_terminals(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """It leaves the cursor as it was; a dumb terminal has none."""
    if setting:
        monkeypatch.setenv("TERM", "dumb")
    out = Screen()
    with Terminal(out, Screen()).waiting("waiting"):
        pass
    assert ("\x1b[?25l" in out.getvalue()) is not bool(setting)
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")


def test_a_pipe_gets_no_spinner() -> None:
    out = io.StringIO()
    with Terminal(out, io.StringIO()).waiting("waiting"):
        pass
    assert out.getvalue() == ""


def test_without_rich_a_terminal_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is missing but beauty."""
    without_rich(monkeypatch)
    out = Screen()
    terminal = Terminal(out, Screen())
    with terminal.waiting("waiting"):
        terminal.line("red", "red")
    terminal.table(["A", "B"], [["1", "2"]])
    assert out.getvalue() == "red\na\tb\n1\t2\n"


def test_a_table_for_a_pipe_is_lines_of_fields() -> None:
    """A head, then one line a row, whatever is in a cell."""
    out = io.StringIO()
    Terminal(out, io.StringIO()).table(["ID", "OWNER"], [["s", "a\tb\nc"], [1, ""]])
    assert out.getvalue() == "id\towner\ns\ta␉b␊c\n1\t\n"


def test_a_paragraph_is_broken_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its own beginning; words stay whole."""
    monkeypatch.setenv("COLUMNS", "40")
    out, pipe = Screen(), io.StringIO()
    for place in (out, pipe):
        terminal = Terminal(place, io.StringIO())
        terminal.write("ok  ")
        terminal.paragraph("one " * 12, 4)
    assert pipe.getvalue() == f"ok  {'one ' * 12}\n"
    first, second = out.getvalue().rstrip("\n").split("\n")
    assert first == "ok  " + " ".join(["one"] * 9)
    assert second == "    one one one"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_output_cannot_take_is_a_question_mark(encoding: str) -> None:
    """Half a surrogate pair, another alphabet: no UnicodeEncodeError."""
    raw = io.BytesIO()
    terminal = Terminal(io.TextIOWrapper(raw, encoding=encoding), io.StringIO())
    terminal.line("z\u0142y \ud83d")
    assert raw.getvalue() == b"z?y ?\n"
