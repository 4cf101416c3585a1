"""What a person or a pipe gets to read: colours and a spinner on a terminal, plain lines elsewhere.

rich draws, where it is installed (`pip install 'chatstream[cli]'`); without it all of it is plain.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}

_PICTURES |= {0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}
"""What stands for the control characters (Unicode's "Control Pictures"; C1 has none)."""

_NARROW = 20
"""Columns in which a paragraph is not broken into lines any more."""


def harmless(text: str) -> str:
    """`text` as a terminal may show it: nothing in it moves a cursor, sets a title or a colour.

    Of the control characters, line ends and tabs are left; the others become pictures.
    """
    return text.replace("\r\n", "\n").translate(_PICTURES)


class Terminal:
    """Standard output, and standard error for what is not the answer. One thread at a time.

    Attributes:
        interactive: Whether somebody is looking at the output.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        """
        Args:
            out: In the place of standard output.
            err: In the place of standard error.
        """
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self.interactive = self._out.isatty()
        self._console = _console(self._out) if self.interactive else None

    def write(self, text: str, style: str = "") -> None:
        """Writes `text` at once. On a terminal it is made harmless first.

        Args:
            text: Goes to a pipe as it is.
            style: rich's word for how it looks on a terminal.
        """
        if self.interactive:
            text = harmless(text)
        text = _encodable(text, self._out)
        if self._console is not None and style:
            self._console.print(text, style=style, end="", markup=False, soft_wrap=True)
        else:
            self._out.write(text)
        self._out.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """`write`, and the end of the line."""
        self.write(text, style)
        self.write("\n")

    def complain(self, text: str) -> None:
        """A sentence to standard error."""
        self._out.flush()
        self._err.write(_encodable(harmless(text), self._err) + "\n")
        self._err.flush()

    @contextlib.contextmanager
    def waiting(self, words: str) -> Iterator[None]:
        """A spinner, where there can be one."""
        if self._console is None:
            yield
            return
        with self._console.status(words):
            yield

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table on a terminal; lines of fields with a tab in between, and a head, elsewhere."""
        cells = [[_cell(value) for value in row] for row in rows]
        if self._console is None:
            for row in ([name.lower() for name in columns], *cells):
                self.line("\t".join(row))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in cells:
            table.add_row(*(Text(_encodable(cell, self._out)) for cell in row))
        self._console.print(table)

    def paragraph(self, text: str, indent: int) -> None:
        """`text`, with `indent` columns on its left, which are written already for its first line.

        It is broken into lines on a terminal only.
        """
        width = shutil.get_terminal_size().columns - indent
        if not self.interactive or width < _NARROW:
            self.line(text)
            return
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        self.line(f"\n{' ' * indent}".join(lines))


def _console(out: TextIO) -> Any:
    """rich's console, which honours NO_COLOR and TERM; None where rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=out, highlight=False)


def _cell(value: object) -> str:
    """A field of a table: in one line, whatever is in it."""
    return harmless(str(value)).replace("\t", "\u2409").replace("\n", "\u240a")


def _encodable(text: str, out: TextIO) -> str:
    """`text` with ? for what `out` cannot take: half a surrogate pair, another alphabet."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
