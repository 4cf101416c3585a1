"""The bus of one process: nobody to talk to, so all it does is remember early cancels."""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Mapping
from time import monotonic

from chatstream.bus.base import REMEMBER, REMEMBER_PER_OWNER, Bus, Lives, Receive
from chatstream.bus.messages import Answer, Claim, Enquiry, Name, Page, Request, Worker
from chatstream.bus.places import Places
from chatstream.errors import too_many
from chatstream.sockets import native


class LocalBus(Bus):
    """For a service that is one process; `Registry` has its conflicts. Never blocks."""

    name = "local"

    def __init__(self, receive: Receive, lives: Lives | None = None) -> None:
        super().__init__(receive, lives)
        self._lock = native.allocate_lock()  # guards the four below
        self._places = Places(self._session_is_live)
        self._claimed: Counter[Name] = Counter()
        self._early = _Recent()  # cancels that came before their stream
        self._gone = _Recent()  # streams that have been: a cancel for them is late, not early

    def start(self) -> None:
        pass

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        with self._lock:
            if limit and not self._places.take(claim, limit) and self._is_live(claim):
                raise too_many(limit)
            self._claimed[claim.name] += 1
            return self._early.pop(claim.name)

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._claimed[claim.name] -= 1
            if self._claimed[claim.name] <= 0:
                del self._claimed[claim.name]
            self._gone.add(claim.name)
            if self._places:
                self._places.leave(claim)

    def cancel_elsewhere(self, request: Request) -> bool:
        if request.session_id is None or request.stream_id is None:
            return False
        name = Name(request.owner, request.session_id, request.stream_id)
        with self._lock:
            if name not in self._claimed and name not in self._gone:
                self._early.add(name)
        # It may have been claimed since the first look.
        return self._receive(request) is Answer.STOPPED

    def _here(self) -> Worker:
        return Worker(str(os.getpid()), os.getpid(), socket.gethostname())

    def _others(self) -> list[Worker]:
        return []

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        return {}

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Recent:
    """Names kept for `REMEMBER` seconds, at most `REMEMBER_PER_OWNER` of one owner. Not locked."""

    def __init__(self) -> None:
        self._names: dict[str, dict[Name, float]] = {}  # by owner, oldest first
        self._owners: deque[tuple[float, str]] = deque()  # when to look at an owner's again

    def __contains__(self, name: Name) -> bool:
        self._expire()
        return self._names.get(name.owner, {}).get(name, 0.0) > monotonic()

    def add(self, name: Name) -> None:
        self._expire()
        if name.owner not in self._names:
            self._names[name.owner] = {}
            self._owners.append((monotonic() + REMEMBER, name.owner))
        mine = self._names[name.owner]
        mine.pop(name, None)
        mine[name] = monotonic() + REMEMBER
        if len(mine) > REMEMBER_PER_OWNER:
            del mine[next(iter(mine))]

    def pop(self, name: Name) -> bool:
        """Whether `name` was there; it is not any more."""
        found = name in self
        if found:
            del self._names[name.owner][name]
        return found

    def _expire(self) -> None:
        now = monotonic()
        while self._owners and self._owners[0][0] <= now:
            _, owner = self._owners.popleft()
            mine = {name: until for name, until in self._names.pop(owner).items() if until > now}
            if mine:
                self._names[owner] = mine
                self._owners.append((now + REMEMBER, owner))
