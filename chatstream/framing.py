"""HTTP/1.1 message bodies to their bytes (RFC 9112, sections 6 and 7). Pure: no I/O.

http.client can do this too, but only in its own blocking reads: it cannot be asked whether bytes
are waiting in its buffer, so a ping or a timeout could not be kept. With the framing here, a body
is what `recv` returns, fed to one of these.
"""

from __future__ import annotations

from typing import Protocol

MAX_LINE = 8 * 1024
"""Longest chunk-size line or trailer, in bytes."""


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
        if not (self._rest or self._left or self._after_data or self._in_trailer):
            whole = _one_chunk(data)
            if whole:
                return whole  # what a provider sends nearly always
        data, self._rest = self._rest + data, b""
        body = []
        position = 0
        while position < len(data) and not self.finished:
            if self._left:
                piece = data[position : position + self._left]
                body.append(piece)
                position += len(piece)
                self._left -= len(piece)
                self._after_data = not self._left
                continue
            end = data.find(b"\n", position)
            line = data[position : end if end >= 0 else len(data)]
            if len(line) > MAX_LINE:
                raise BadFraming("a chunk's size line does not end")
            if end < 0:
                self._rest = line
                return b"".join(body)
            self._line(line.removesuffix(b"\r"))
            position = end + 1
        if self.finished and position < len(data):
            self.reusable = False  # bytes nobody asked for
        return b"".join(body)

    def eof(self) -> None:
        raise BadFraming("the body ended inside its chunks")

    def _line(self, line: bytes) -> None:
        if self._in_trailer:
            self.finished = not line
        elif self._after_data:
            if line:
                raise BadFraming("a chunk is longer than it said")
            self._after_data = False
        else:
            self._left = self._size(line)
            self._in_trailer = self._left == 0

    @staticmethod
    def _size(line: bytes) -> int:
        digits = line.partition(b";")[0].strip()
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            raise BadFraming("a chunk's size is not a number")
        return int(digits, 16)


def _one_chunk(data: bytes) -> bytes:
    """The chunk's data if `data` is one chunk and nothing else, else nothing."""
    end = data.find(b"\r\n", 0, 10)
    digits = data[: max(end, 0)]
    if not digits.isalnum() or digits.strip(b"0123456789abcdefABCDEF"):
        return b""
    body = data[end + 2 : -2]
    return body if len(body) == int(digits, 16) and data.endswith(b"\r\n") else b""
