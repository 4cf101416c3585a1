"""How much of an HTTP/1.1 request has arrived. Pure: no I/O, no threads, no clocks.

Nothing is judged here: what is malformed counts as arrived, and the server's parser refuses it.
"""

from __future__ import annotations

import re

from chatstream.sockets.framing import BadFraming, Chunked

MAX_HEAD = 64 * 1024
"""Longest head, in bytes. nginx takes 32 KB (large_client_header_buffers)."""

READ_AHEAD = 1024
"""Bytes that the server's parser asks for at least, beyond what an app wants to see of a body."""

_REQUEST_LINE = re.compile(rb"[^ \r\n]+ ([^ \r\n]+) HTTP/1\.([0-9])\r\n")

# A space before the colon is for the server's parser to refuse, or to take: a setting of its.
_LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)

_CHUNKED = re.compile(rb"\r\ntransfer-encoding[ \t]*:[^\r\n]*chunked", re.IGNORECASE)

_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)


class Arrival:
    """One request, while it arrives. Not thread-safe.

    Attributes:
        target: What it asks for, once the head is there; b"" if that is malformed.
        whole: Nothing is missing: it can be served without waiting for the client.
        long: Its body is longer than what is collected; whoever serves it reads the rest.
        ours: Whether one of our routes is asked for; None until somebody has looked.
        overlong: Its head is longer than `MAX_HEAD`, or its chunks are mostly their own sizes.
    """

    def __init__(self, most: int) -> None:
        """
        Args:
            most: Bytes of a body that are collected.
        """
        self._most = most
        self._bound = 2 * most + MAX_HEAD  # bytes in all
        self._data = bytearray()
        self._head = 0  # its length, once it is there
        self._length = 0
        self._chunked: Chunked | None = None
        self._decoded = 0  # bytes of its chunks
        self.target = b""
        self.ours: bool | None = None
        self.whole = False
        self.long = False
        self.overlong = False

    @property
    def begun(self) -> bool:
        """Whether any byte is there; one that may become an empty line is none yet."""
        return bytes(self._data[:2]) not in (b"", b"\r")

    @property
    def has_head(self) -> bool:
        """Whether the head is there."""
        return self._head > 0

    @property
    def data(self) -> bytes:
        """All that has arrived, for the server's parser; more than the request if pipelined."""
        return bytes(self._data)

    def feed(self, data: bytes) -> bool:
        """Takes what has come.

        Returns:
            Whether the client waits for "100 Continue" before it sends the body. Whoever feeds has
            to send that, and the server's parser does not get to see that it was asked for.
        """
        if self._head:
            self._data += data
            self._follow(data)
            return False
        begin = max(0, len(self._data) - 3)
        self._data += data
        while self._data.startswith(b"\r\n"):  # RFC 9112, 2.2: before a request that is nothing
            del self._data[:2]
        end = self._data.find(b"\r\n\r\n", begin)
        self.overlong = max(end, 0 if end > 0 else len(self._data)) > MAX_HEAD
        return end > 0 and not self.overlong and self._take_head(end + 4)

    def _take_head(self, end: int) -> bool:
        head = bytes(self._data[:end])
        line = _REQUEST_LINE.match(head)
        length = _LENGTH.search(head)
        self.target = line[1] if line else b""
        self._length = int(length[1]) if length else 0
        if _CHUNKED.search(head):
            self._chunked = Chunked()
        self.long = self._length > self._most
        self._head = end
        self._follow(bytes(self._data[end:]))
        waits = len(self._data) == end and not (self.whole or self.long)
        expects = line is not None and line[2] != b"0" and _EXPECT.search(head)  # HTTP/1.0 cannot
        if not (waits and expects):
            return False
        self._data[:] = _EXPECT.sub(b"", head)
        self._head = len(self._data)
        return True

    def _follow(self, data: bytes) -> None:
        """Looks at bytes of the body."""
        if self._chunked is None:
            self.whole = len(self._data) - self._head >= self._length
            return
        try:
            self._decoded += len(self._chunked.feed(data))
        except BadFraming:  # the server's parser says what is wrong
            self.whole = True
            return
        self.whole = self._chunked.finished
        self.long = not self.whole and self._decoded > self._most + READ_AHEAD
        self.overlong = not (self.whole or self.long) and len(self._data) > self._bound
