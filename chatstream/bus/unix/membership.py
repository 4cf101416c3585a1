"""Membership: a process's seat among its neighbours, taken anew where the directory went away."""

from __future__ import annotations

import _thread
import contextlib
from collections.abc import Callable
from time import monotonic

from chatstream.bus.unix.seat import Visit
from chatstream.sockets import native
from chatstream.sockets.loop import Loop

_REJOIN = 1.0
"""Seconds between two looks whether the directory is there, and two attempts to join it."""

RunSoon = Callable[[Callable[[], object]], object]
"""Has a call made by a thread that may block. Safe from any thread, never blocks."""


class Membership:
    """Where this process sits. Safe from any thread."""

    def __init__(
        self,
        loop: Loop,
        lock: _thread.LockType,
        take_seat: Callable[[], Visit],
        move_in: Callable[[Visit], int],
        log: Callable[[str], None],
    ) -> None:
        """
        Args:
            loop: Its thread looks whether the directory is there.
            lock: Guards the seat, together with what is held there.
            take_seat: Takes one. Raises OSError.
            move_in: Takes there, under the lock, all that this process's streams need; returns how
                many streams these are. Raises OSError.
            log: Is told that the directory is away, and that it is back.
        """
        self._loop = loop
        self._lock = lock
        self._take_seat = take_seat
        self._move_in = move_in
        self._log = log
        self._seat: Visit | None = None
        self._joining = native.allocate_lock()  # held by who joins; nobody waits for it
        self._rejoin_at = 0.0
        self._settled_at = 0.0
        self._away = False  # the last attempt failed
        self._closed = False

    @property
    def settled(self) -> bool:
        """Whether all that lost their directory have joined again."""
        return monotonic() >= self._settled_at

    def start(self, run_soon: RunSoon) -> None:
        """Joins, and from now on whenever the directory went away."""
        self._run_soon = run_soon
        with contextlib.suppress(OSError):
            self.join()
        self._loop.call_later(_REJOIN, self._look)

    def close(self) -> Visit | None:
        """Joins no more. Returns the seat that is to be left. Under the lock."""
        self._closed = True
        seat, self._seat = self._seat, None
        return seat

    def seated(self) -> Visit | None:
        """This process's place among the others, taken anew if the directory went away."""
        seat = self._seat
        if seat is not None and seat.directory.is_there():
            return seat
        if not self._closed and monotonic() >= self._rejoin_at:
            with contextlib.suppress(OSError):
                self.join()
        return self._seat if self._seat is not seat else None

    def join(self) -> None:
        """Takes a place, and all bytes that this process's streams need there.

        Raises:
            OSError: There is none to be had now.
        """
        if not self._joining.acquire(False):
            return  # another thread is at it
        try:
            seat = self._take_seat()
            if self._seat is not None:
                self._settled_at = monotonic() + 3 * _REJOIN
            with self._lock:
                old, self._seat = self._seat, seat
                streams = self._move_in(seat)
        except OSError as error:
            if not self._away:
                self._away = True
                self._log(
                    f"[bus] unix is away: {error}. Streams go on; a stop for another worker's"
                    " stream is answered with 503. CHATSTREAM_BUS=unix:///a/directory sets another"
                )
            raise
        finally:
            self._rejoin_at = monotonic() + _REJOIN
            self._joining.release()
        if old is not None:
            old.leave()
        if old is not None or self._away:
            self._away = False
            self._log(f"[bus] unix is back; {streams} streams are registered")

    def _look(self) -> None:
        """Has the directory joined anew when it is gone. In the loop's thread."""
        if self._closed:
            return
        if self._seat is None or not self._seat.directory.is_there():
            self._run_soon(self.seated)
        self._loop.call_later(_REJOIN, self._look)
