"""ClientSocket: a client's connection, watched through a second descriptor."""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from chatstream.sockets import liveness, native

if TYPE_CHECKING:
    from _typeshed import HasFileno


UNSENT = 64 * 1024
"""Bytes that may wait in the kernel for a client beyond what is on its way (tcp(7)).

Else its send buffer grows to megabytes (tcp_wmem), all of it tokens that a stop comes too late for.
"""

_BYTES_ACKED = 120
"""Offset of tcpi_bytes_acked in struct tcp_info (linux/tcp.h, since Linux 4.1)."""


class Watcher(Protocol):
    """What watches it: the `Loop`."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> Any: ...
    def cancel(self, timer: Any) -> None: ...
    def forget(self, client: ClientSocket) -> None: ...


class ClientSocket:
    """A second descriptor of a client's socket: watched, and shut down if nothing moves.

    At most `UNSENT` bytes and one write wait in it for a client that does not read.

    The server keeps its own; a kept-alive connection lives on after `release`.
    """

    def __init__(self, loop: Watcher, sock: HasFileno, on_hang_up: Callable[[], object]) -> None:
        self.fd = os.dup(sock.fileno())
        self.on_hang_up = on_hang_up
        self._loop = loop
        # The C class: the loop's thread uses it, and gevent's own would need the hub.
        self._sock = _socket.socket(fileno=self.fd)
        self._lock = native.allocate_lock()  # held around system calls that return at once
        self._timer: Any = None
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
