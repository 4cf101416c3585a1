"""The blocks of a page: what it shows, and what it sets up unseen.

Unseen is what stands in an HTML comment, so that a plain git host and MkDocs show nothing of it:

    <!-- block: file=yourapp.py -->     says more of the block that follows (`Block.options`)
    <!-- hidden python                  is a block of its own. One of js with the word `before` or
    provider.script(rate=5)             `after` belongs to the shown one that follows or precedes
    -->
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_COMMENT = re.compile(r"<!-- (block:|hidden) (.*?)-->\s*", re.DOTALL)


@dataclass
class Block:
    """One block.

    Attributes:
        page: Its page's file.
        line: The line of its text's first line, from 1 on.
        language: As its fence has it; empty where that says none.
        text: What stands in it.
        options: What the comment before it says, `key=value` or a word that is "true".
        hidden: Whether no reader sees it.
        before: What js is put before it to make it a program.
        after: What js follows it.
    """

    page: Path
    line: int
    language: str
    text: str
    options: dict[str, str] = field(default_factory=dict)
    hidden: bool = False
    before: str = ""
    after: str = ""

    @property
    def name(self) -> str:
        """What a test is called: the page, where in it, and what it is."""
        return f"{self.page.name}:{self.line}-{self.language or 'none'}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in their order.

    Raises:
        ValueError: A comment that says more of a block has none after it.
    """
    reading = _Reading(page)
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        if token.type == "html_block":
            for match in _COMMENT.finditer(token.content):
                reading.comment(token, *match.groups())
        elif token.type in ("fence", "code_block"):
            reading.shown(token)
        elif token.type.endswith("_open"):
            reading.done()
    reading.done()
    return reading.found


class _Reading:
    """What was found on a page so far, and what is said of the block to come."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._options: dict[str, str] = {}
        self._before = ""
        self.found: list[Block] = []

    def comment(self, token: Token, kind: str, text: str) -> None:
        if kind == "block:":
            self.done()
            self._options = _options(text)
        else:
            self._hidden(token, text)

    def shown(self, token: Token) -> None:
        assert token.map is not None
        line = token.map[0] + (2 if token.type == "fence" else 1)
        language = token.info.strip()
        block = Block(self._page, line, language, token.content, self._options)
        block.before = self._before
        self.found.append(block)
        self._options, self._before = {}, ""

    def done(self) -> None:
        """Nothing is left that was to be said of a block, or stand before it."""
        if left := self._options or self._before:
            raise ValueError(f"{self._page.name}: no block follows on {left}")

    def _hidden(self, token: Token, text: str) -> None:
        assert token.map is not None
        self._check_options()
        first, _, rest = text.partition("\n")
        language, _, words = first.strip().partition(" ")
        options = _options(words)
        if "before" in options:
            self._before += rest
        elif "after" in options:
            self.found[-1].after += rest
        else:
            line = token.map[0] + token.content[: token.content.index(text)].count("\n") + 2
            self.found.append(Block(self._page, line, language, rest, options, hidden=True))

    def _check_options(self) -> None:
        if self._options:
            raise ValueError(f"{self._page.name}: {self._options} are of a hidden block")


def _options(words: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in shlex.split(words))
    return {key: value if equals else "true" for key, equals, value in pairs}
