"""What the pages list is what the code has, and what was measured: settings, reasons, figures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import pytest

from chatstream.settings.table import Settings, known_keys
from chatstream.web import openapi
from chatstream.web.openapi import refusals
from docs.hooks import settings
from tests.docs.blocks import PAGES, ROOT

WORDS = "\n".join(page.read_text() for page in PAGES)


def test_the_settings_are_the_codes() -> None:
    """The table is what `python -m docs.hooks.settings` would write now."""
    page = settings.PAGE.read_text()
    assert settings.renewed(page) == page


def test_the_table_has_every_setting_and_its_default() -> None:
    """A row a field, in their order."""
    rows = re.findall(r"^\| `CHATSTREAM_(\w+)` \| (\S*) ?\| (.+) \|$", settings.table(), re.M)
    fields = dataclasses.fields(Settings)
    assert [name for name, _, _ in rows] == [field.name.upper() for field in fields]
    assert set(settings.MORE) <= {field.name for field in fields}
    shown = {name: default.strip("`") for name, default, _ in rows}
    assert (shown["URL_PREFIX"], shown["DRAIN"], shown["DETACH"]) == ("/api/chat", "25", "1")
    assert (shown["PAGE"], shown["TOKENS"], shown["MAX_BODY"]) == ("", "", "1048576")


def test_a_page_without_a_place_for_the_table_is_a_fault() -> None:
    """Nothing is written into nowhere."""
    with pytest.raises(ValueError, match="no table"):
        settings.renewed("# Settings\n")


def test_the_keys_that_pages_name_are_known() -> None:
    """No page speaks of a setting that nobody reads; and each setting is on the settings' page."""
    named = set(re.findall(r"CHATSTREAM_[A-Z_]*[A-Z]", WORDS))
    assert named - known_keys() == set()
    assert known_keys() - set(re.findall(r"CHATSTREAM_[A-Z_]+", settings.PAGE.read_text())) == set()


@pytest.mark.parametrize(
    ("page", "table"),
    [("wire.md", refusals.BEFORE), ("openai.md", refusals.OPENAI_BEFORE)],
    ids=["wire", "openai"],
)
def test_every_reason_has_its_row(
    page: str, table: Mapping[int, tuple[str, Mapping[str, str]]]
) -> None:
    """With its status. What OpenAI's route has in common with the chat's is on that one's page."""
    places = {"wire.md", page}
    rows = "\n".join((ROOT / "docs" / name).read_text() for name in sorted(places))
    found = {
        (int(status), reason)
        for statuses, reasons in re.findall(r"^\| ([\d, ]+) \| (`[^|]+`) \|", rows, re.MULTILINE)
        for status in statuses.split(", ")
        for reason in re.findall(r"`(\w+)`", reasons)
    }
    wanted = {(status, reason) for status, (_, reasons) in table.items() for reason in reasons}
    assert wanted - found == set()


def test_every_route_is_spoken_of() -> None:
    """Each path that openapi.json has, as the pages write it."""
    paths = openapi.document("/api/chat", max_body=1, openai_prefix="/v1", health="/")["paths"]
    assert len(paths) > 7
    assert [path for path in paths if re.sub(r"{(\w+)}", r"<\1>", path) not in WORDS] == []


def test_the_tests_that_pages_name_are_there() -> None:
    """What is promised is shown by a file of tests: by its name, or by its path below tests/."""
    there = {file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").rglob("*.py")}
    there |= {name.rpartition("/")[2] for name in there}
    named = set(re.findall(r"\b(?:\w+/)*test_\w+\.py\b", WORDS))
    examples = {"examples/testing/test_app.py", "testing/test_app.py", "test_app.py"}
    assert len(named) > 20
    assert {name.removeprefix("tests/") for name in named - examples} - there == set()


def test_each_promise_is_shown_by_a_test() -> None:
    """The last cell of each row names a file, by its path below tests/."""
    page = (ROOT / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| (?!fault |-)(.+) \|$", page, re.MULTILINE)
    assert len(rows) > 15
    assert [row for row in rows if not re.match(r"`\w+/.*\.py`", row.split("|")[-1].strip())] == []


SYSTEMS = {
    "chatstream, gthread": "detached",
    "ours, gthread": "detached",
    "chatstream, gevent": "gevent",
    "ours, gevent": "gevent",
    "nginx": "nginx",
    "Node": "node",
    "Node, fetch": "node",
    "FastAPI": "fastapi",
    "FastAPI, httpx": "fastapi",
    "a Flask view": "naive flask",
    "Vercel AI SDK": "vercel ai",
    "LiteLLM's proxy": "litellm",
}
"""What bench/RESULTS.md calls whom the pages call so."""

MEASURES = {
    "close while the model is silent, ms": "close: silent body, 0 others",
    "close while words stream, ms": "close: chatty body, 0 others",
    "CPU for an event, µs": "CPU per event, 200 x 20/s",
    "memory of a stream, KB": "memory (PSS) per stream, 1000 streams",
    "added to the first event, ms": "added time to the first event",
    "close: headers awaited": "close: headers awaited, 0 others",
    "close: silent body": "close: silent body, 0 others",
    "close: chatty body": "close: chatty body, 0 others",
    "cancel: silent body": "cancel: silent body, 0 others",
    "cancel: blocked": "cancel: blocked, 0 others",
}
"""And what it calls what they call so."""


@pytest.mark.parametrize(("page", "rows"), [("README.md", 8), ("docs/coming-from.md", 5)])
def test_figures_are_the_benchmarks(page: str, rows: int) -> None:
    """Each table of figures says what bench/RESULTS.md says."""
    measured = _measured()
    head, *lines = _figures((ROOT / page).read_text())
    assert len(lines) == rows
    for name, *shown in lines:
        pairs = [(name, column) if name in SYSTEMS else (column, name) for column in head[1:]]
        found = [measured.get((SYSTEMS[who], MEASURES[what]), "-") for who, what in pairs]
        assert shown == found, name


def _figures(text: str) -> list[list[str]]:
    """The cells of the table that has a system and a measure at its head or side."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    (table,) = (table for table in tables if any(f"| {what} |" in table for what in MEASURES))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [line for line in lines if not line[1].startswith("---")]


def _measured() -> dict[tuple[str, str], str]:
    """Of each system and measure: the figure, to three digits, or the median."""
    found: dict[tuple[str, str], str] = {}
    for line in (ROOT / "bench" / "RESULTS.md").read_text().splitlines():
        if line.startswith("| "):
            what, who, figure, median, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            if match := re.fullmatch(r"([\d.]+) (?:µs|KB)", figure):
                found[who, what] = f"{float(match[1]):.3g}"
            elif median:
                found[who, what] = "never" if figure.startswith("0 of") else median
    return found


@pytest.mark.parametrize("interface", ["StreamOptions", "StreamError", "Answer"])
def test_what_the_module_has_is_on_its_page(interface: str) -> None:
    """Each option and each member that chatstream.d.ts declares."""
    types = (ROOT / "chatstream" / "web" / "page" / "chatstream.d.ts").read_text()
    body = re.split(rf"(?:interface|class) {interface} .*{{\n", types)[1].partition("\n}")[0]
    names = set(re.findall(r"^  (?:readonly )?(\w+)\??(?:: |\()", body, re.MULTILINE))
    assert len(names - {"constructor"}) > 3
    page = (ROOT / "docs" / "browser.md").read_text()
    left_out = {name for name in names if not re.search(rf"\b{name}\b", page)}
    assert left_out - {"constructor", "name"} == set()
