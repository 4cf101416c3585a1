"""How long a client may take for its request, in both of our workers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from chatstream.settings.table import Settings
from chatstream.workers import draining
from chatstream.workers.arrival import Arrival

LINGER = 2.0
"""Seconds that a peer has to close a connection that we have closed (RFC 9112, section 9.6)."""

NO_DESCRIPTOR = 0.5
"""Seconds without accepting where the process has no descriptor left."""

LAST_WORDS = 5.0
"""Seconds that a worker which is to end at once waits for its streams' clients.

They have two from the end on, and from the last byte that they took.
"""


def _refusal(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

TIMED_OUT = _refusal("408 Request Timeout")

LONG_BODY = _refusal("413 Content Too Large")

LONG_HEAD = _refusal("431 Request Header Fields Too Large")


@dataclass(frozen=True)
class Limits:
    """What a client is granted. Seconds and bytes.

    Attributes:
        first: From a connection to its first request's headers.
        kept: From an answer to the first byte of the next request.
        request: From a request's first byte to its last; on other routes than ours to its head, and
            then of silence.
        body: Bytes of a body that a worker collects before a thread has to see it.
    """

    first: float
    kept: float
    request: float
    body: int
    _ours: re.Pattern[bytes]

    @classmethod
    def load(cls) -> Limits:
        """The settings of this process's app, of several what is the most; else the environment's.

        For before it is known whose request it is, they have to agree.
        """
        every = [service.settings for service in draining.services()]
        every = every or [Settings.load({}, os.environ)]
        return cls(
            first=max(each.headers_timeout for each in every),
            kept=max(each.keepalive_timeout for each in every),
            request=max(each.request_timeout for each in every),
            body=max(each.max_body for each in every),
            _ours=_pattern(every),
        )

    def ours(self, arrival: Arrival) -> bool:
        """Whether one of our routes is asked for, wherever they are mounted. With the head there.

        Looked at once: a target may be long, and its body come byte by byte.
        """
        if arrival.ours is None:
            arrival.ours = self._is_ours(arrival.target)
        return arrival.ours

    def _is_ours(self, target: bytes) -> bool:
        path = re.split(rb"[?#]", target, maxsplit=1)[0]
        return self._ours.fullmatch(unquote_to_bytes(path)) is not None

    def due(
        self, arrival: Arrival, first_byte: float, now: float, due: float, *, new: bool
    ) -> float:
        """When a request that has begun has to be there, or to go on.

        Args:
            arrival: The request.
            first_byte: When that came.
            now: When its last byte came.
            due: When its head had to be there, until now.
            new: Whether it is its connection's first: that has `first` seconds for the head.
        """
        if arrival.has_head:
            return (first_byte if self.ours(arrival) else now) + self.request
        whole = first_byte + self.request
        return min(due, whole) if new else whole


def _pattern(every: Iterable[Settings]) -> re.Pattern[bytes]:
    """The paths of our routes that take a body."""
    paths = []
    for each in every:
        paths.append(re.escape(each.url_prefix.encode()) + rb"/(?:stream|cancel(?:/.*)?)")
        if each.openai_prefix is not None:
            at = each.openai_prefix.rstrip("/")
            paths.append(re.escape(f"{at}/chat/completions".encode()))
    return re.compile(rb".*(?:%b)" % b"|".join(paths), re.DOTALL)
