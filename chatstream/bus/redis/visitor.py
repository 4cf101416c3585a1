"""RedisVisitor: for a process that is no worker."""

from __future__ import annotations

from chatstream.bus.base import absent
from chatstream.bus.messages import Claim
from chatstream.bus.redis.entries import Entries
from chatstream.bus.redis.redis_bus import RedisBus

_VISIT = 45.0
"""Seconds between two looks of a visitor, three times: it has nothing that could expire."""


class _NoEntries(Entries):
    """Of somebody who has none."""

    def enrol(self) -> bytes:
        # A prefix that nobody uses is not to look like one in use.
        return self.since()


class RedisVisitor(RedisBus):
    """For a process that is no worker: it asks and cancels. It has no stream, and is in no listing.

    What it leaves are replies that come too late, for a minute.
    """

    _entries_of = _NoEntries

    def __init__(self, url: str, *, prefix: str) -> None:
        """
        Args:
            url: See `RedisBus`.
            prefix: Likewise.
        """
        super().__init__(absent, url, prefix=prefix, ttl=_VISIT)

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        raise NotImplementedError("a visitor has no stream")
