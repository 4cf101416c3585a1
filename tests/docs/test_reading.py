"""What the pages' tests stand on: that a fault in a page is seen, and nothing is passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.docs import pip
from tests.docs.blocks import PAGES, Block, parts
from tests.docs.reader import Reader
from tests.docs.runners import run
from tests.docs.shell import commands, shows
from tests.integration.processes import is_running

PAGE = """\
# A page

Words.

```python
y = 2
```

- In a list:

  ```console
  $ true
  ```

## In Node, once

```js
a;
```

    indented

```
none
```
"""

UNSEEN = """\
# What page.md does besides

## a-page-1

- file: app.py
- log

Why it does:

```python before file=other.py
x = 1
```

## a-page

```python
z = 3
```

## in-node-once-1

```js before
const a = 1;
```

```python after
shown
```

```js after
a;
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


@pytest.fixture
def reader(page: Path, tmp_path: Path) -> Iterator[Reader]:
    folder = tmp_path / "folder"
    folder.mkdir()
    reader = Reader(page, folder)
    yield reader
    reader.close()


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    (tmp_path / "unseen").mkdir()
    return tmp_path / "unseen" / "page.md"


def test_the_blocks_of_a_page(page: Path, beside: Path) -> None:
    """Each is a part, with what is done unseen, in the order of the page."""
    page.write_text(PAGE)
    beside.write_text(UNSEEN)
    python, console, words, js, indented, none = parts(page, beside)
    assert [python.name, console.name, words.name] == ["a-page-1", "a-page-2", "a-page"]
    assert [js.name, none.name] == ["in-node-once-1", "in-node-once-3"]

    other, shown = python.steps
    assert (other.hidden, other.text, other.options) == (True, "x = 1\n", {"file": "other.py"})
    assert (shown.hidden, shown.options) == (False, {"file": "app.py", "log": ""})
    assert [step.text for step in words.steps] == ["z = 3\n"]
    assert [(step.text, step.checked) for step in console.steps] == [("$ true\n", False)]
    program, after = js.steps
    assert (program.text, program.checked) == ("const a = 1;\na;\na;\n", True)
    assert after.text == "shown\n"
    assert [part.steps[0].language for part in (indented, none)] == ["", ""]


def test_where_a_block_stands(page: Path, beside: Path) -> None:
    """Each has its file, and the line of its first line there."""
    page.write_text(PAGE)
    beside.write_text(UNSEEN)
    for part in parts(page, beside):
        for step in part.steps:
            lines = step.file.read_text().splitlines()
            first = step.text.splitlines()[0]
            assert lines[step.line - 1].strip() in (first, "a;")  # of js the shown one's


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("## a-page-3\n", "page.md has no a-page-3"),
        ("## b-page-1\n- exit: 1\n", "page.md has no b-page-1"),
        ("## a-page-1\n- exti: 1\n", "exti is none of"),
        ("## a-page-1\n```python\n```\n", "before or after"),
        ("## a-page-1\n```python befor\n```\n", "befor is not"),
        ("## a-page\n```python after\n```\n", "are of blocks"),
        ("## a-page\n- exit: 1\n", "are of blocks"),
    ],
)
def test_what_is_said_of_no_block_is_a_fault(
    page: Path, beside: Path, text: str, words: str
) -> None:
    """A section that has lost its block would be a check that is not made."""
    page.write_text(PAGE)
    beside.write_text(text)
    with pytest.raises(ValueError, match=words):
        parts(page, beside)


def test_two_headings_of_one_name_are_a_fault(page: Path, beside: Path) -> None:
    """Their blocks would have one name."""
    page.write_text("# A\n```text\n```\n# A\n```text\n```\n")
    with pytest.raises(ValueError, match="two blocks are called a-1"):
        parts(page, beside)


def test_every_page_has_blocks() -> None:
    """Those of words and figures only are named here."""
    without = {page.name for page in PAGES if not parts(page)}
    assert without == {"figures.md", "promises.md", "scale.md"}


TYPED = """\
$ first
said
$ second \\
    -d '{"a": 1,
"b": 2}'

$ third    # it's a comment
"""


def test_what_a_console_types_and_shows() -> None:
    """A backslash and an open quotation go on; what stands after a command is what it says."""
    first, second, third = commands(TYPED)
    assert first == ("first", ["said"])
    assert second == ('second \\\n    -d \'{"a": 1,\n"b": 2}\'', [""])
    assert third == ("third    # it's a comment", [])


@pytest.mark.parametrize("text", ["", "said\n", "said\n$ first\n"])
def test_a_console_without_a_command_is_a_fault(text: str) -> None:
    with pytest.raises(ValueError, match="command"):
        commands(text)


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        (["a"], "a\n", True),
        (["a"], "a  \r\n\n", True),
        (["a"], "ab\n", False),
        (["a"], "a\nb\n", False),
        (["a", "b"], "a\n", False),
        (["a…c"], "abc", True),
        (["a…c"], "a\nc", False),
        (["a", "…", "d"], "a\nb\nc\nd", True),
        (["a", "…", "d"], "a\nd", True),
        (["a", "…"], "b\na", False),
        (["a.c"], "abc", False),
    ],
)
def test_what_is_shown_is_what_is_said(shown: list[str], said: str, same: bool) -> None:
    """All of it; `…` is anything in a line, or any lines."""
    assert shows(shown, said) is same


@pytest.mark.parametrize(
    ("language", "text", "options", "words"),
    [
        ("", "x", {}, "no language"),
        ("rust", "x", {}, "rust"),
        ("python", "assert 1 == 2, 'no'", {}, "no"),
        ("console", "$ false", {}, "ended with 1"),
        ("console", "$ true", {"exit": "1"}, "ended with 0"),
        ("console", "$ echo a\nb", {}, "and not"),
        ("console", "$ pip install chatstream[none]", {}, "no extra none"),
        ("bash", "echo no; (exit 3)", {}, "no"),
        ("js", "throw new Error('no')", {}, "Error: no"),
        ("text", "x", {}, "nothing checks it"),
        ("yaml", "x: 1", {"of": "mkdocs.yml"}, "no part of mkdocs.yml"),
        ("json", '{"messages": []}', {"schema": "ChatRequest"}, None),
        ("json", "{", {"schema": "ChatRequest"}, None),
    ],
)
def test_a_block_that_does_not_hold(
    reader: Reader, language: str, text: str, options: dict[str, str], words: str | None
) -> None:
    """In each language: its test fails, and says why."""
    expected = AssertionError if words is not None else Exception
    with pytest.raises(expected, match=words):
        run(Block(reader.page, 1, language, text, options), reader)


def test_the_shell_keeps_what_it_was_told(reader: Reader) -> None:
    """Variables and folders, from block to block; a command that reads gets nothing."""
    run(Block(reader.page, 1, "console", "$ export A=1; mkdir -p b; cd b\n"), reader)
    run(Block(reader.page, 1, "console", "$ echo $A; basename $PWD; cat\n1\nb\n"), reader)


@pytest.mark.parametrize(("ci", "verdict"), [("true", "Failed"), ("", "Skipped")])
def test_what_lacks_is_a_failure_in_ci(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str, verdict: str
) -> None:
    """Elsewhere the block, and what stands on it, is skipped."""
    monkeypatch.setenv("CI", ci)
    reader = Reader(page, tmp_path)
    os.environ["PATH"] = str(tmp_path)
    block = Block(page, 1, "console", "$ curl --version\n")
    try:
        with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as caught:  # type: ignore[arg-type]
            run(block, reader)
    finally:
        reader.close()
    assert caught.typename == verdict


def test_what_goes_on_is_ended(reader: Reader, tmp_path: Path) -> None:
    """All of it, also what it started itself."""
    reader.begin("echo $$; sleep 60 & echo $!; wait", r"\d+\n\d+")
    pids = reader.log().split()
    reader.close()
    assert len(pids) == 2
    eventually(lambda: not any(is_running(int(pid)) for pid in pids), "no process")


def test_the_last_words_are_read(reader: Reader) -> None:
    """What a program says as it ends is what it said."""
    assert reader.begin("echo no; echo yes", "yes").output == "no\nyes\n"


def test_what_never_comes_fails(reader: Reader) -> None:
    """A program that ends without a word is a fault, at once."""
    with pytest.raises(AssertionError, match="it ended without"):
        reader.begin("echo no", "yes")


def test_nothing_of_this_environment_is_the_readers(
    reader: Reader,
) -> None:
    """A setting of whoever runs the tests would be in no page."""
    run(Block(reader.page, 1, "console", "$ env | grep -c ^CHATSTREAM_\n2\n"), reader)


def test_a_package_of_npms_that_is_not_there(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block is left out, and in CI it fails; Node's own and files are no packages."""
    text = 'import "node:fs"; import { a } from "./a.mjs"; import { b } from "@no/such-one/b";'
    block = Block(reader.page, 1, "js", text)
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no npm package @no/such-one here"):
        run(block, reader)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="@no/such-one"):
        run(block, reader)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("install chatstream[gunicorn]", ""),
        ("install 'chatstream[gunicorn,redis]'", ""),
        ("install chatstream[gunicron]", "no extra gunicron"),
        ("install chatstreem", "do not install it"),
        ("install -U chatstream", "only"),
        ("uninstall chatstream", "only"),
        ("install", "only"),
        ("install chat[stream", "chat[stream"),
    ],
)
def test_pip(line: str, words: str) -> None:
    """What a page has installed is there, and the extras are ours."""
    said = pip.main(line.replace("'", "").split())
    assert words in said
    assert bool(said) is bool(words)


def test_the_schema_is_looked_at(reader: Reader) -> None:
    """A request as it should be passes; see above for one that is not."""
    good = json.dumps({"messages": [{"role": "user"}]})
    run(Block(reader.page, 1, "json", good, {"schema": "ChatRequest"}), reader)
    assert reader.names["value"] == {"messages": [{"role": "user"}]}
