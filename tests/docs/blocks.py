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
    found: list[Block] = []
    options: dict[str, str] = {}
    before = ""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        if token.type == "html_block":
            for kind, rest in _COMMENT.findall(token.content):
                if options:
                    raise ValueError(f"{page.name}: no block follows on {options}")
                if kind == "block:":
                    options = _options(rest)
                    continue
                block = _hidden(page, token, rest)
                if "before" in block.options:
                    before += block.text
                elif "after" in block.options:
                    found[-1].after += block.text
                else:
                    found.append(block)
        elif token.type in ("fence", "code_block"):
            found.append(_shown(page, token, options, before))
            options, before = {}, ""
        elif options and token.type.endswith("_open"):
            raise ValueError(f"{page.name}: no block follows on {options}")
    if options or before:
        raise ValueError(f"{page.name}: no block follows on {options or before}")
    return found


def _options(words: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in shlex.split(words))
    return {key: value if equals else "true" for key, equals, value in pairs}


def _shown(page: Path, token: Token, options: dict[str, str], before: str) -> Block:
    assert token.map is not None
    line = token.map[0] + (2 if token.type == "fence" else 1)
    return Block(page, line, token.info.strip(), token.content, options, before=before)


def _hidden(page: Path, token: Token, text: str) -> Block:
    assert token.map is not None
    first, _, rest = text.partition("\n")
    language, _, words = first.strip().partition(" ")
    start = token.map[0] + token.content[: token.content.index(text)].count("\n")
    return Block(page, start + 2, language, rest, _options(words), hidden=True)
