"""Locks, threads and epoll as the kernel gives them, also under gevent.

gevent replaces `_thread`, `threading` and `select` with cooperative versions. The loop
(`chatstream.sockets.loop`) is a native thread that has to wake while every greenlet sleeps, and
what it touches must never wait for a greenlet: a native thread that takes a patched lock was seen
to wait 0.3 s. So the few primitives shared with it come from here. Only this module knows gevent;
without gevent each function is the standard library's.

Nothing is cached at import time: gevent may patch after chatstream was imported (`preload_app`).
"""

from __future__ import annotations

import _thread
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any


def _original(module: str, name: str, current: Any) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    return current if monkey is None else monkey.get_original(module, name)


written_as: Callable[[str], bytes] = partial(str.encode, errors="replace")
"""What `report` writes of a text. Can be set anew."""


def report() -> None:
    """Writes the exception that is being handled to stderr, for who must not log.

    A logger's handlers have locks, which may be gevent's.
    """
    os.write(2, written_as(traceback.format_exc()))


def patched() -> bool:
    """Whether gevent has made this process's threads cooperative."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def allocate_lock() -> _thread.LockType:
    """A lock of the operating system. Hold it for a few assignments, never across I/O."""
    lock: _thread.LockType = _original("_thread", "allocate_lock", _thread.allocate_lock)()
    return lock


def get_ident() -> int:
    """Which thread of the operating system this is."""
    ident: int = _original("_thread", "get_ident", _thread.get_ident)()
    return ident


def epoll() -> select.epoll:
    """A new epoll object; gevent hides the class from `select`."""
    new: select.epoll = _original("select", "epoll", getattr(select, "epoll", None))()
    return new


def hung_up(fd: int) -> bool:
    """Whether the peer of `fd` has closed or reset the connection. Never blocks."""
    poll = _original("select", "poll", getattr(select, "poll", None))()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


def bare(sock: Any) -> Any:
    """What the loop can use of a socket: gevent's want a hub, and have the kernel's inside.

    Returns:
        What has `recv`, `send`, `fileno` and `settimeout` (and `pending`, of TLS). It does not
        block where `sock` is gevent's. Nobody else may use `sock` meanwhile.
    """
    if not type(sock).__module__.startswith("gevent."):
        return sock
    tls = getattr(sock, "_sslobj", None)
    return sock._sock if tls is None else _BareTLS(tls, sock.fileno())


class _BareTLS:
    """OpenSSL's connection, below gevent's SSLSocket."""

    def __init__(self, tls: Any, fd: int) -> None:
        self._fd = fd
        self.send = tls.write
        self.pending = tls.pending
        self._read = tls.read

    def recv(self, size: int) -> bytes:
        import ssl  # gevent may patch it after this module was imported

        try:
            data: bytes = self._read(size)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        return data

    def fileno(self) -> int:
        return self._fd

    def settimeout(self, timeout: float | None) -> None:
        """It is the kernel's socket that has one."""


def runner() -> Callable[[Callable[[], object]], None]:
    """A way out of a native thread, for what must not run there: logging, above all.

    Returns:
        A function that has its argument run soon, in a thread of its own, or under gevent in a
        greenlet of the thread that called `runner`. Safe from any thread, never blocks.
    """
    if not patched():
        return lambda call: threading.Thread(target=call, daemon=True).start()
    gevent = sys.modules["gevent"]
    loop = gevent.get_hub().loop
    return lambda call: loop.run_callback_threadsafe(gevent.spawn, call)


def start_bare_thread(target: Callable[[], None]) -> None:
    """Run `target` in a thread of the operating system. Takes no lock, so signal handlers may."""
    _original("_thread", "start_new_thread", _thread.start_new_thread)(target, ())


def start_thread(target: Callable[[], None], name: str) -> None:
    """Run `target` in a daemon thread of the operating system, named where Python can name it."""
    if patched():
        start_bare_thread(target)
    else:
        threading.Thread(target=target, name=name, daemon=True).start()
