"""Bytes to whole events, events to bytes. Pure: no I/O, no threads.

The rules are those of the WHATWG HTML standard, section 9.2.6 "Interpreting an event stream"
(https://html.spec.whatwg.org/multipage/server-sent-events.html): a line ends with CRLF, LF or CR;
an event ends with an empty line; a line that starts with a colon is a comment; one byte order mark
at the very beginning is no part of a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

MEDIA_TYPE = "text/event-stream"

PING = b": ping\n\n"

MAX_EVENT = 1024 * 1024
"""Longest event, in bytes. An event that does not end would otherwise fill the memory."""

BOM = b"\xef\xbb\xbf"
"""A byte order mark."""

_CR = ord("\r")

_EOL = rb"(?:\r\n|\n|\r(?!\n))"

_EVENT_END = re.compile(_EOL + _EOL)

_LINE_END = re.compile(_EOL)


class Splitter:
    """Cuts a byte stream into blocks that each end with an empty line.

    A byte order mark at its beginning is a block of its own, which comes with the first one. The
    blocks joined are the input, byte for byte, less an unterminated tail. Not safe to share
    between threads.

    Attributes:
        overflow: A block, whole or not, became longer than `max_event` bytes. It is not returned,
            and nothing more should be fed.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self.overflow = False
        self._max_event = max_event
        self._most_plain = -1  # bytes; none before `feed` has seen how the stream begins
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Blocks that `data` completes, in order."""
        buffer = self._buffer
        # A block's end is at most four bytes (CRLFCRLF), three of which may be here already.
        position = max(0, len(buffer) - 3)
        buffer += data
        blocks: list[bytes] = []
        start = 0
        while not self.overflow and (match := _EVENT_END.search(buffer, position)):
            if self._half_crlf(match):
                break
            position = match.end()
            self.overflow = position - start > self._max_event
            if not self.overflow:
                blocks.append(bytes(buffer[start:position]))
            start = position
        del buffer[:start]
        self.overflow = self.overflow or len(buffer) > self._max_event
        if blocks and self._most_plain < 0:
            self._most_plain = self._max_event
            return _unmarked(blocks)
        return blocks

    def plain(
        self, data: bytes, plain_events: Callable[[bytes], int | None]
    ) -> tuple[bytes, int] | None:
        """What `feed` would return, in one piece, and how many events are in it.

        None where `plain_events` cannot tell, and at the beginning, where a byte order mark may
        be: nothing has been taken, and `feed` is to look.
        """
        if not self._buffer and data[-2:] == b"\n\n":
            blocks, tail = data, b""  # what a provider sends nearly always
        else:
            head, end, tail = data.rpartition(b"\n\n")
            if not end:
                return None
            blocks = b"".join((self._buffer, head, end))
        if len(blocks) + len(tail) > self._most_plain or _CR in tail:
            return None  # an event may be too long, or end with CR: `feed` looks at each
        events = plain_events(blocks)
        if events is None:
            return None
        if blocks is not data:
            self._buffer[:] = tail
        return blocks, events

    @staticmethod
    def _half_crlf(match: re.Match[bytes]) -> bool:
        """Whether the block's last CR may be half of a CRLF that is still on its way.

        Among CRLF or LF lines it is, so the block waits for the LF. After a bare CR the stream's
        lines end with CR: waiting would hold every event back until the next one.
        """
        ends = match.group()
        return match.end() == len(match.string) and ends.endswith(b"\r") and ends != b"\r\r"


def _unmarked(blocks: list[bytes]) -> list[bytes]:
    """A stream's first blocks, less the byte order mark, which stands before them."""
    first, *others = blocks
    return [BOM, first.removeprefix(BOM), *others] if first.startswith(BOM) else blocks


def fields(block: bytes) -> tuple[bytes | None, bytes]:
    """The block's data (None without a data field) and its event type."""
    data: list[bytes] = []
    event = b""
    for line in _LINE_END.split(block):
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"event":
            event = value.removeprefix(b" ")
    return (b"\n".join(data) if data else None), event


def error_event(message: str, code: str, type_: str) -> bytes:
    """The one event with which a stream tells its client that it went wrong."""
    body = {"error": {"message": message, "type": type_, "code": code}}
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()
