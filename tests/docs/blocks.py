"""The blocks of a page, and what is done for each of them that no reader sees.

A page is only what its reader sees. What the tests need besides stands in a file of the page's name
in tests/docs/pages: `docs/mount.md` has `tests/docs/pages/mount.md`. A block is called by the
heading above it and its number there, as `who-asks-2`; so are its test and its section:

    ## who-asks-2                    the second block below "Who asks"

    - file: app.py                   options of the block (`OPTIONS`)

    ```python before                 runs before the block; of js, it is part of the same program
    ```python after                  runs after it; has its text as `shown`
    ```python after file=myapp.py    is written to a file

    ## who-asks                      without a number: runs last, for what the words there promise
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

UNSEEN = Path(__file__).with_name("pages")

OPTIONS = {
    "background": "the last command goes on; the value is a pattern of what it prints once it runs",
    "exit": "the exit code of the commands, 0 without it",
    "file": "the block is written to this file, and not run",
    "in": "`checkout`: the commands are typed there",
    "log": "each line is one that the page's servers have logged",
    "of": "the block is a part of this file of the checkout",
    "schema": "the JSON is good by this schema of openapi.json",
}
"""What can be said of a block."""


@dataclass
class Block:
    """One block, shown or not.

    Attributes:
        file: Where it stands.
        line: The line of its text's first line, from 1 on.
        language: As its fence has it; empty where that says none.
        text: What stands in it.
        options: Of `OPTIONS`, by name.
        hidden: Whether no reader sees it.
        checked: Whether Python that comes after it looks at what it shows.
    """

    file: Path
    line: int
    language: str
    text: str
    options: dict[str, str] = field(default_factory=dict)
    hidden: bool = False
    checked: bool = False

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.file.parent.name}/{self.file.name}:{self.line}"


@dataclass
class Part:
    """What one test does: a block, and what is done before and after it.

    Attributes:
        name: The block's; or its heading's, if there is no block.
        steps: In their order.
    """

    name: str
    steps: list[Block]


@dataclass
class _Section:
    """What a file in tests/docs/pages says of one block, or of one heading."""

    options: dict[str, str] = field(default_factory=dict)
    before: list[Block] = field(default_factory=list)
    after: list[Block] = field(default_factory=list)
    last: list[Block] = field(default_factory=list)


def parts(page: Path, beside: Path | None = None) -> list[Part]:
    """All that a page's tests do, in its order.

    Args:
        page: The page.
        beside: What is said of its blocks; else the file of its name in tests/docs/pages, if any.

    Raises:
        ValueError: What is said is of no block of the page, or is not understood.
    """
    beside = beside or UNSEEN / page.name
    sections = _sections(beside) if beside.exists() else {}
    found = list(_parts(page, sections))
    for name, number in Counter(part.name for part in found).items():
        if number > 1:
            raise ValueError(f"{page.name}: two blocks are called {name}")
    if sections:
        raise ValueError(f"{beside.name}: {page.name} has no {', '.join(sections)}")
    return found


def anchor(title: str) -> str:
    """What a plain git host calls a heading in an address."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _parts(page: Path, sections: dict[str, _Section]) -> Iterator[Part]:
    """Takes out of `sections` what belongs to the page."""
    heading, number = "", 0
    for token, title in _tokens(page):
        if title is not None:
            yield from _last(heading, sections)
            heading, number = anchor(title), 0
        elif token.type in ("fence", "code_block"):
            number += 1
            name = f"{heading}-{number}"
            section = sections.pop(name, _Section())
            if section.last:
                raise ValueError(f"{name}: say of each fence whether it is before or after")
            yield Part(name, _steps(_block(page, token), section))
    yield from _last(heading, sections)


def _last(heading: str, sections: dict[str, _Section]) -> Iterator[Part]:
    if section := sections.pop(heading, None):
        if section.options or section.before or section.after:
            raise ValueError(f"{heading} is a heading: before and after are of blocks")
        yield Part(heading, section.last)


def _steps(block: Block, section: _Section) -> list[Block]:
    """A shown block with the others around it; all js of them is one program."""
    block.options = section.options
    block.checked = any(re.search(r"\b(shown|value)\b", step.text) for step in section.after)
    before, after = section.before, section.after
    if block.language == "js":
        wrapped = [*_of_js(before), block, *_of_js(after)]
        block.text = "".join(step.text for step in wrapped)
        before = [step for step in before if step.language != "js"]
        after = [step for step in after if step.language != "js"]
    return [*before, block, *after]


def _of_js(blocks: list[Block]) -> list[Block]:
    return [block for block in blocks if block.language == "js"]


def _sections(file: Path) -> dict[str, _Section]:
    """The sections of a file in tests/docs/pages, by name."""
    found: dict[str, _Section] = {}
    section = _Section()  # above the first heading of a section nothing is said
    for token, title in _tokens(file):
        if title is not None:
            section = found.setdefault(title, _Section()) if token.tag == "h2" else _Section()
        elif token.type == "inline" and token.level > 2:  # in a list
            key, _, value = token.content.partition(":")
            if key not in OPTIONS:
                raise ValueError(f"{file.name}: {key} is none of {', '.join(OPTIONS)}")
            section.options[key] = value.strip()
        elif token.type == "fence":
            _put(section, _block(file, token))
    return found


def _put(section: _Section, block: Block) -> None:
    language, *words = shlex.split(block.language)
    block.language, block.hidden = language, True
    places = {"before": section.before, "after": section.after}
    place = section.last
    for word in words:
        key, equals, value = word.partition("=")
        if key in places:
            place = places[key]
        elif key == "file" and equals:
            block.options = {key: value}
        else:
            raise ValueError(f"{block.place}: {word} is not before, after or file=…")
    place.append(block)


def _block(file: Path, token: Token) -> Block:
    assert token.map is not None
    line = token.map[0] + (2 if token.type == "fence" else 1)
    return Block(file, line, token.info.strip(), token.content)


def _tokens(file: Path) -> Iterator[tuple[Token, str | None]]:
    """Each token; of a heading's the title as well, instead of a token of its own."""
    tokens = MarkdownIt("commonmark").enable("table").parse(file.read_text())
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        is_heading = token.type == "heading_open" and following is not None
        yield token, following.content if is_heading and following else None
