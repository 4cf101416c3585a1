"""The one native thread per worker that waits on sockets and clocks.

It watches the clients' connections (a client that leaves is noticed by its socket, not by a write),
answers what arrives for the worker (`on_readable`) and runs what is due later. It sleeps in epoll
until one of these happens. Its callbacks record and shut down; they must not block, log or take a
lock that gevent may have patched.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import select
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from chatstream.errors import Busy, busy_without_descriptors
from chatstream.sockets import native
from chatstream.sockets.client import ClientSocket

if TYPE_CHECKING:
    from _typeshed import HasFileno


_HANG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

_SPARSE = 64
"""Cancelled timers that may lie in the heap before it is looked at."""


class Timer:
    """Something due later; see `Loop.call_later` and `Loop.cancel`."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], object]) -> None:
        self.due = due
        self.callback: Callable[[], object] | None = callback


class Loop:
    """Watches sockets and clocks in one native thread, which starts when first needed.

    All methods are safe from any thread. After a fork the child starts a loop of its own.

    Attributes:
        now: The instant (monotonic) at which what runs now became ready. Loop's thread only.
    """

    def __init__(self) -> None:
        self.now = monotonic()
        self._starting = native.allocate_lock()  # held by who starts the thread
        self._reset()

    def _reset(self) -> None:
        # Guards all below. Held for assignments and system calls that return at once.
        self._lock = native.allocate_lock()
        self._pid = 0  # the process whose thread runs; 0 for none
        self._epoll: select.epoll | None = None  # that thread's
        self._wakeup = -1
        self._watches: dict[int, ClientSocket] = {}
        self._ready: dict[int, Callable[[], object]] = {}
        self._soon: list[Callable[[], object]] = []
        self._thread = 0  # its identity, once it runs
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._cancelled = 0

    def watch(self, sock: HasFileno, on_hang_up: Callable[[], object]) -> ClientSocket:
        """Calls `on_hang_up` once, from the loop's thread, when the peer of `sock` leaves.

        A FIN counts as leaving, as nginx has it: a client that half-closes is gone.

        Returns:
            The watch. Its owner has to `release` it.

        Raises:
            Busy: The process has no descriptor left, or cannot start the thread.
        """
        self._start()
        with busy_without_descriptors():
            client = ClientSocket(self, sock, on_hang_up)
        with self._lock:
            if self._epoll is not None:
                self._epoll.register(client.fd, _HANG_UP)
                self._watches[client.fd] = client
        return client

    def on_readable(self, fd: int, callback: Callable[[], object]) -> None:
        """Runs `callback` in the loop's thread whenever `fd` has something to read.

        Until `forget_ready`, which comes before `fd` is closed. Raises as `watch` does.
        """
        self._on_ready(fd, select.EPOLLIN, callback)

    def on_writable(self, fd: int, callback: Callable[[], object]) -> None:
        """As `on_readable`, whenever there is room to write to `fd`, or nobody who would read."""
        self._on_ready(fd, select.EPOLLOUT, callback)

    def _on_ready(self, fd: int, events: int, callback: Callable[[], object]) -> None:
        self._start()
        with self._lock:
            if self._epoll is not None:
                self._epoll.register(fd, events)
                self._ready[fd] = callback

    def forget_ready(self, fd: int) -> None:
        """Ends `on_readable` or `on_writable`. A callback that is running goes on. Idempotent."""
        with self._lock:
            if self._ready.pop(fd, None) is not None and self._epoll is not None:
                self._epoll.unregister(fd)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Runs `callback` in the loop's thread. Raises as `watch` does."""
        self._start()
        with self._lock:
            self._soon.append(callback)
            self._wake()

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Runs `callback` in the loop's thread after `delay` seconds. Raises as `watch` does."""
        self._start()
        timer = Timer(monotonic() + delay, callback)
        with self._lock:
            heapq.heappush(self._timers, (timer.due, next(self._order), timer))
            if self._timers[0][2] is timer:
                self._wake()
        return timer

    def cancel(self, timer: Timer) -> None:
        """Forgets the timer's callback. One that is running already goes on. Idempotent."""
        with self._lock:
            if timer.callback is None:
                return
            timer.callback = None
            self._cancelled += 1
            if self._cancelled > max(_SPARSE, len(self._timers) // 2):
                left = [entry for entry in self._timers if entry[2].callback is not None]
                heapq.heapify(left)
                self._timers = left
                self._cancelled = 0

    def stop(self) -> None:
        """Ends the thread. Watches and timers are forgotten; the loop can start again."""
        with self._lock:
            self._watches.clear()
            self._ready.clear()
            self._soon.clear()
            self._timers = []
            self._cancelled = 0
            running = self._epoll is not None and self._pid == os.getpid()
            self._epoll, self._pid = None, 0
            if running:
                os.eventfd_write(self._wakeup, 1)

    def forget(self, client: ClientSocket) -> None:
        """Stops watching `client`; it is the caller who closes it."""
        with self._lock:
            if self._watches.get(client.fd) is client and self._epoll is not None:
                del self._watches[client.fd]
                self._epoll.unregister(client.fd)

    def _start(self) -> None:
        if self._pid == os.getpid():
            return
        with self._starting, busy_without_descriptors():
            if self._pid == os.getpid():
                return
            if self._pid:
                self._reset()  # forked: the thread and all it watched are the parent's
            with self._lock:
                self._start_thread()
                self._pid = os.getpid()

    def _start_thread(self) -> None:
        epoll = native.epoll()
        wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        epoll.register(wakeup, select.EPOLLIN)
        self._epoll, self._wakeup = epoll, wakeup
        try:
            native.start_thread(partial(self._run, epoll, wakeup), "chatstream-loop")
        except RuntimeError as error:  # can't start new thread
            self._epoll = None
            epoll.close()
            os.close(wakeup)
            raise Busy("This worker has no free thread. Please try again.") from error

    def _wake(self) -> None:
        """Interrupts the thread's sleep. Under the lock: the descriptor is there while it runs."""
        if self._epoll is None or self._pid != os.getpid() or native.get_ident() == self._thread:
            return
        os.eventfd_write(self._wakeup, 1)

    def _run(self, epoll: select.epoll, wakeup: int) -> None:
        self._thread = native.get_ident()
        ready = self._ready
        # What another thread changes, it changes under the lock before it writes to `wakeup`: so
        # what is read here without the lock is seen again if it was too old.
        while self._epoll is epoll:
            timers = self._timers  # another list may take its place
            due = timers[0][0] if timers else math.inf
            wait = 0.0 if self._soon else -1.0 if due == math.inf else max(0.0, due - monotonic())
            events = epoll.poll(wait)
            self.now = monotonic()
            for fd, _ in events:
                try:
                    if callback := ready.get(fd):
                        callback()
                    elif fd == wakeup:
                        os.eventfd_read(wakeup)
                    else:
                        self._hang_up_of(fd)()
                except Exception:  # must not end the thread that every stop depends on
                    native.report()
            if self._soon or due <= self.now:
                self._run_due()
        with self._lock:  # whoever ended this has written by now
            epoll.close()
            os.close(wakeup)

    def _run_due(self) -> None:
        """What these callbacks ask for in turn has to wait for the sockets' events."""
        for callback in self._due():
            try:
                callback()
            except Exception:
                native.report()

    def _due(self) -> list[Callable[[], object]]:
        with self._lock:
            due = list(self._soon)
            self._soon.clear()
            while self._timers and self._timers[0][0] <= self.now:
                timer = heapq.heappop(self._timers)[2]
                if timer.callback is None:
                    self._cancelled -= 1
                else:
                    due.append(timer.callback)
                    timer.callback = None
        return due

    def _hang_up_of(self, fd: int) -> Callable[[], object]:
        """The callback for `fd`, which is watched no more.

        The descriptor may have been released and its number given to another watch since epoll
        spoke, so the socket that has it now is asked again.
        """
        with self._lock:
            client = self._watches.get(fd)
            if client is None or self._epoll is None or not native.hung_up(fd):
                return _nothing
            del self._watches[fd]
            self._epoll.unregister(fd)
            return client.on_hang_up


def _nothing() -> None:
    pass
