"""Connections that wait in a worker's poller, each until its instant."""

from __future__ import annotations

import math
import selectors
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from chatstream.workers.arrival import Arrival

GRAIN = 0.1
"""Seconds by which a deadline may be late: those that wait are looked through no more often."""


class Waiting:
    """A connection that the poller waits for, until `due`."""

    def __init__(self, conn: Any, due: float, on_ready: Callable[[Waiting], None]) -> None:
        """
        Args:
            conn: gunicorn's, with its socket.
            due: When it has waited too long.
            on_ready: Called when there is something to read, or what else is listened for.
        """
        self.conn = conn
        self.due = due
        self.on_ready = on_ready
        self.arrival: Arrival | None = None  # while a request is waited for
        self.first_byte = 0.0  # when it came
        self.new = True  # nothing was served yet

    @property
    def idle(self) -> bool:
        """Whether nothing of a request is there."""
        return self.arrival is None or not self.arrival.begun


class WaitingRoom:
    """Who waits, in the order in which they came. For the thread of the poller only."""

    def __init__(self, poller: selectors.BaseSelector) -> None:
        """
        Args:
            poller: Calls what is registered with it, as gunicorn's does.
        """
        self._poller = poller
        self._waiting: dict[Waiting, None] = {}
        self._look_at = math.inf  # when the first of them may be due

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._waiting

    def wait(self, waiting: Waiting) -> None:
        """Has a connection wait until there is something to read, or it is due."""
        self._waiting[waiting] = None
        self._poller.register(
            waiting.conn.sock, selectors.EVENT_READ, lambda _: self._dispatch(waiting)
        )
        self.postpone(waiting, waiting.due)

    def listen(self, waiting: Waiting, events: int) -> None:
        """Has it wait for these events instead."""
        self._poller.modify(waiting.conn.sock, events, lambda _: self._dispatch(waiting))

    def postpone(self, waiting: Waiting, due: float) -> None:
        """Gives it another instant."""
        waiting.due = due
        self._look_at = min(self._look_at, due)

    def forget(self, waiting: Waiting) -> Any:
        """Has it wait no more. Returns its connection."""
        del self._waiting[waiting]
        self._poller.unregister(waiting.conn.sock)
        return waiting.conn

    def make_room(self) -> Any:
        """Of those that ask for nothing, the one that has waited longest gives way to new ones.

        Returns:
            Its connection, forgotten; None if all ask for something.
        """
        for waiting in self._waiting:
            if waiting.idle:
                return self.forget(waiting)
        return None

    def patience(self) -> float:
        """Seconds until somebody may be due."""
        return max(0.0, self._look_at - monotonic())

    def expired(self) -> list[Waiting]:
        """Forgets those that have waited too long, and returns them."""
        now = monotonic()
        if now < self._look_at:
            return []
        expired = [waiting for waiting in self._waiting if waiting.due <= now]
        for waiting in expired:
            self.forget(waiting)
        first = min((waiting.due for waiting in self._waiting), default=math.inf)
        self._look_at = max(first, now + GRAIN)
        return expired

    def _dispatch(self, waiting: Waiting) -> None:
        if waiting in self._waiting:  # else an event before this one ended it
            waiting.on_ready(waiting)
