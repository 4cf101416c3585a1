"""HTTP/1.1 message bodies to their bytes (RFC 9112, sections 6 and 7). Pure: no I/O.

http.client can do this too, but only in its own blocking reads: it cannot be asked whether bytes
are waiting in its buffer, so a ping or a timeout could not be kept. With the framing here, a body
is what `recv` returns, fed to one of these.
"""

from __future__ import annotations

import functools
from typing import Protocol

MAX_LINE = 8 * 1024
"""Longest chunk-size line or trailer, in bytes."""

_USUAL_LINE = 32
"""Longest chunk-size line to remember the size of."""


class BadFraming(ValueError):
    """The provider's body is not what its headers announced."""


class Framing(Protocol):
    """Takes what the socket gave, returns the body's bytes.

    Attributes:
        finished: The body is complete.
        reusable: The connection can carry another request, once finished.
    """

    finished: bool
    reusable: bool

    def feed(self, data: bytes) -> bytes: ...

    def eof(self) -> None:
        """The peer closed. Raises BadFraming if the body had to go on."""


class UntilClose:
    """A body that ends with its connection."""

    finished = False
    reusable = False

    def feed(self, data: bytes) -> bytes:
        return data

    def eof(self) -> None:
        self.finished = True


class Length:
    """A body of `length` bytes."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.finished = length == 0
        self.reusable = True

    def feed(self, data: bytes) -> bytes:
        body = data[: self._left]
        self._left -= len(body)
        self.finished = self._left == 0
        self.reusable = len(body) == len(data)
        return body

    def eof(self) -> None:
        raise BadFraming(f"the body ended {self._left} bytes early")


class Chunked:
    """A body in chunks; the trailers are dropped."""

    def __init__(self) -> None:
        self.finished = False
        self.reusable = True
        self._rest = b""  # the start of a line whose end has not arrived
        self._left = 0  # bytes of the present chunk that have not arrived
        self._in_trailer = False
        self._after_data = False  # the CRLF that closes a chunk's data comes next

    def feed(self, data: bytes) -> bytes:
        if not self._rest and self._between_chunks():
            whole = data[data.find(b"\n") + 1 : -2]
            if whole and data == b"%x\r\n%b\r\n" % (len(whole), whole):
                return whole  # what a provider sends nearly always: one chunk
        data, self._rest = self._rest + data, b""
        body: list[bytes] = []
        position = 0
        while position < len(data) and not self.finished:
            if self._left:
                piece = data[position : position + self._left]
                body.append(piece)
                position += len(piece)
                self._left -= len(piece)
                self._after_data = not self._left
                continue
            if self._between_chunks():
                position = _whole_chunks(data, position, body)
            position = self._next_line(data, position)
        if self.finished and position < len(data):
            self.reusable = False  # bytes nobody asked for
        return b"".join(body)

    def eof(self) -> None:
        raise BadFraming("the body ended inside its chunks")

    def _between_chunks(self) -> bool:
        """Whether a chunk's size is what comes next."""
        return not (self._left or self._after_data or self._in_trailer)

    def _next_line(self, data: bytes, position: int) -> int:
        """Takes the line that begins at `position`; what has come of it, if it is not whole."""
        end = data.find(b"\n", position)
        line = data[position : end if end >= 0 else len(data)]
        if len(line) > MAX_LINE:
            raise BadFraming("a chunk's size line does not end")
        if end < 0:
            self._rest = line
            return len(data)
        self._line(line.removesuffix(b"\r"))
        return end + 1

    def _line(self, line: bytes) -> None:
        if self._in_trailer:
            self.finished = not line
        elif self._after_data:
            if line:
                raise BadFraming("a chunk is longer than it said")
            self._after_data = False
        else:
            self._left = _size(line)
            self._in_trailer = self._left == 0


def _size(line: bytes) -> int:
    """The size in a chunk's first line."""
    digits = line.partition(b";")[0].strip()
    if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
        raise BadFraming("a chunk's size is not a number")
    return int(digits, 16)


_usual_size = functools.lru_cache(maxsize=1024)(_size)  # most chunks are as long as another was


def _whole_chunks(data: bytes, position: int, body: list[bytes]) -> int:
    """Adds what is in the chunks from `position` on to `body`, as far as they are whole.

    Returns where the first begins that is not whole, not usual, or not a chunk.
    """
    while position < len(data):
        start = data.find(b"\n", position) + 1
        if not 0 < start - position <= _USUAL_LINE:
            break
        end = start + _usual_size(data[position:start])
        if end == start or data[end : end + 2] != b"\r\n":
            break
        body.append(data[start:end])
        position = end + 2
    return position
