"""The one native thread per worker that waits on sockets and clocks.

It watches the clients' connections (a client that leaves is noticed by its socket, not by a write),
answers what arrives for the worker (`on_readable`) and runs what is due later. It sleeps in epoll
until one of these happens. Its callbacks record and shut down; they must not block, log or take a
lock that gevent may have patched.
"""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import heapq
import itertools
import math
import os
import select
import socket
import struct
import termios
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from chatstream import liveness, native
from chatstream.errors import Busy, busy_without_descriptors

if TYPE_CHECKING:
    from _typeshed import HasFileno

_HANG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

UNSENT = 64 * 1024
"""Bytes that may wait in the kernel for a client beyond what is on its way (tcp(7)).

Else its send buffer grows to megabytes (tcp_wmem), all of it tokens that a stop comes too late for.
"""

_BYTES_ACKED = 120
"""Offset of tcpi_bytes_acked in struct tcp_info (linux/tcp.h, since Linux 4.1)."""


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


class ClientSocket:
    """A second descriptor of a client's socket: watched, and shut down if nothing moves.

    At most `UNSENT` bytes and one write wait in it for a client that does not read.

    The server keeps its own; a kept-alive connection lives on after `release`.
    """

    def __init__(self, loop: Loop, sock: HasFileno, on_hang_up: Callable[[], object]) -> None:
        self.fd = os.dup(sock.fileno())
        self.on_hang_up = on_hang_up
        self._loop = loop
        # The C class: the loop's thread uses it, and gevent's own would need the hub.
        self._sock = _socket.socket(fileno=self.fd)
        self._lock = native.allocate_lock()  # held around system calls that return at once
        self._timer: Timer | None = None
        self._released = False
        self._taken = 0  # as a look saw it
        self._waiting_since: float | None = None  # of the looks, that saw no change: the first
        self._options = liveness.notice_vanished(self._sock)
        if self._sock.family in (socket.AF_INET, socket.AF_INET6):
            unsent = (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            self._options.append((*unsent, self._sock.getsockopt(*unsent)))
            self._sock.setsockopt(*unsent, UNSENT)

    def expect_end(self, patience: float) -> None:
        """From now on the peer must take bytes: none for `patience` seconds shuts the socket down.

        For a stream that was aborted while its thread is stuck in a write. Safe from any thread.
        """
        with self._lock:
            if self._released:
                return
            check = partial(self._check, patience, _taken(self._sock))
            self._timer = self._loop.call_later(patience, check)

    def stalled(self, timeout: float) -> bool:
        """Whether bytes wait for the peer, and in the last `timeout` seconds it took none.

        As far as calls before this one have seen: what was sent since the last one may just be on
        its way, however long there was nothing to send. Safe from any thread.
        """
        with self._lock:
            if self._released:
                return False
            taken, now = _taken(self._sock), monotonic()
            if not _send_queue(self._sock):
                self._waiting_since = None
                return False
            if taken != self._taken or self._waiting_since is None:
                self._taken, self._waiting_since = taken, now
            return now - self._waiting_since >= timeout

    def vanished(self) -> bool:
        """Whether the peer has gone without a word (`liveness`). Safe from any thread."""
        with self._lock:
            return not self._released and liveness.has_vanished(self._sock)

    def shutdown(self) -> None:
        """Ends the connection now, both ways: who writes to it is awake. Safe from any thread."""
        with self._lock:
            if not self._released:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Lets go of the socket. Owner only. Idempotent."""
        with self._lock:
            released, self._released = self._released, True
        if released:
            return
        if self._timer is not None:
            self._loop.cancel(self._timer)
        self._loop.forget(self)
        liveness.restore(self._sock, self._options)
        self._sock.close()
        self.on_hang_up = _nothing  # else stream and watch keep one another

    def _check(self, patience: float, last: int) -> None:
        # Under the lock: the descriptor must not be closed, and given away, meanwhile.
        with self._lock:
            if self._released:
                return
            if _send_queue(self._sock) and _taken(self._sock) == last:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                return
        self.expect_end(patience)


def _send_queue(sock: _socket.socket) -> int:
    """Bytes in the kernel's send queue that the peer has not taken (SIOCOUTQ, tcp(7))."""
    (size,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
    return int(size)


def _taken(sock: _socket.socket) -> int:
    """A number that grows while the peer takes bytes."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
        if len(info) == _BYTES_ACKED + 8:
            (acked,) = struct.unpack_from("=Q", info, _BYTES_ACKED)
            return int(acked)
    return -_send_queue(sock)


def _nothing() -> None:
    pass
