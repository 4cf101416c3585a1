"""The server around the app: its worker, its threads, its clients, and the word that it ends.

WSGI tells an app none of these. gunicorn has no hook for SIGTERM, and its workers end by themselves
after `max_requests`; so a worker's signal handlers are taken over, to speak to this process's
services first, and each request looks whether its worker still is to live.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from chatstream import native
from chatstream.slots import of_threads, of_whole_requests

if TYPE_CHECKING:
    from _typeshed import HasFileno

GRACE = 3.0
"""Seconds of gunicorn's `graceful_timeout` that are for the clients to take their last bytes."""

_AT_ONCE = {
    signal.SIGTERM: False,
    signal.SIGQUIT: True,
    signal.SIGINT: True,
    signal.SIGABRT: True,  # the arbiter's, for a worker that hangs
}
"""The signals that end a gunicorn worker, and whether its streams end with it or are drained."""

_HANDLED = (signal.SIGUSR1, signal.SIGWINCH, *_AT_ONCE)
"""The signals that a gunicorn worker handles; an app may have taken some of them over."""


class Drains(Protocol):
    """What has streams in this process: an app's Service."""

    settings: Any

    def drain(self, *, at_once: bool = False) -> None:
        """Streams come to an end, soon or at once. From any thread, also of the system's own."""

    def at_rest(self) -> bool:
        """Whether no stream is left, also none that has only to be sent. From any thread."""

    def on_rest(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Has `listener` called when the last stream has gone. Returns what ends that."""

    def stop(self) -> None:
        """Streams are aborted, connections closed, and threads end. From any thread."""


_services: weakref.WeakSet[Drains] = weakref.WeakSet()


def enrol(service: Drains) -> None:
    """Has `service` drained when the server ends, for as long as it lives; also in forks."""
    _services.add(service)


def services() -> list[Drains]:
    """Those that were enrolled."""
    return list(_services)


@contextlib.contextmanager
def client_socket(environ: Mapping[str, Any]) -> Iterator[HasFileno | None]:
    """The client's connection, for the block, where the server shows it; else None.

    gunicorn and werkzeug show the socket itself. waitress and uWSGI show what has it: there it is a
    descriptor of our own, since theirs may be closed meanwhile. Behind uWSGI's `--http` the peer is
    its router. In the thread that serves the request.

    Raises:
        OSError: The process has no descriptor left.
    """
    shown = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    own = None if shown is not None else _of_waitress(environ) or _of_uwsgi(environ)
    try:
        yield own if shown is None else shown
    finally:
        if own is not None:
            own.close()


def _of_waitress(environ: Mapping[str, Any]) -> _socket.socket | None:
    """waitress's main thread closes the socket, after it has marked the channel."""
    channel = _waitress_channel(environ)
    fd = -1 if channel is None else channel.socket.fileno()
    if fd < 0:
        return None
    try:
        own = os.dup(fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # closed just now
            return None
        raise
    if channel.connected:
        return _socket.socket(fileno=own)
    os.close(own)  # its number may have been another's already, and that no socket's
    return None


def _of_uwsgi(environ: Mapping[str, Any]) -> _socket.socket | None:
    uwsgi = _uwsgi(environ)
    # The C class: with --gevent, gevent's own would make a descriptor that does not block.
    return uwsgi and _socket.socket(fileno=os.dup(uwsgi.connection_fd()))


def slots(environ: Mapping[str, Any]) -> int | None:
    """How many streams may keep a thread each, where waitress or uWSGI tells; else None."""
    if channel := _waitress_channel(environ):
        return of_whole_requests(channel.server.adj.threads)
    if uwsgi := _uwsgi(environ):
        return of_threads(int(uwsgi.opt.get("threads") or 1))
    return None


def _waitress_channel(environ: Mapping[str, Any]) -> Any:
    """What has the client's socket in waitress: the method that it shows is this one's."""
    channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
    return channel if hasattr(channel, "socket") else None


def _uwsgi(environ: Mapping[str, Any]) -> Any:
    """uWSGI's module, which only programs inside it have."""
    return sys.modules.get("uwsgi") if "uwsgi.version" in environ else None


def gunicorn_worker() -> Any:
    """The gunicorn worker that this process is; None for another server, or gunicorn's master."""
    # An app has no other way to its worker than the methods that this made its signal handlers.
    for number in _HANDLED:
        worker = getattr(signal.getsignal(number), "__self__", None)
        if getattr(worker, "sockets", None) is not None:
            return worker
    return None


def follow_signals() -> bool:
    """Takes over the signals that end this gunicorn worker; its own handlers come after ours.

    Main thread only: elsewhere, and under another server, it does nothing. Idempotent.

    Returns:
        Whether they are taken over.
    """
    if gunicorn_worker() is None:
        return False
    for number, at_once in _AT_ONCE.items():
        handler = signal.getsignal(number)
        if not callable(handler) or isinstance(handler, _Handler):
            continue
        try:
            signal.signal(number, _Handler(handler, at_once))
        except ValueError:  # not the main thread
            return False
        if not at_once:  # as gunicorn has it: requests go on, so no system call is interrupted
            signal.siginterrupt(number, False)
    return True


def post_worker_init(worker: object) -> None:
    """gunicorn's hook of this name, for a configuration with `preload_app` (see docs/operate.md).

        from chatstream.server import post_worker_init

    There the app is made in the master, so it cannot take over a worker's signals.
    """
    follow_signals()


def notice_end() -> None:
    """Drains this process's services if its worker is not to live on. Before each request.

    That is how `max_requests` shows: gunicorn tells nobody.
    """
    if not getattr(gunicorn_worker(), "alive", True):
        drain()


class _Handler:
    """A signal's handler: ours, then the one that was there."""

    def __init__(self, then: Callable[[int, FrameType | None], Any], at_once: bool) -> None:
        self._then = then
        self._at_once = at_once
        self.__self__ = getattr(then, "__self__", None)  # as that's: the worker is found by it
        self._pid = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # A process that the app has forked has this handler and the sockets, but no streams.
        if os.getpid() == self._pid:
            # No thread to be had is no reason for the worker to live on, nor to fail here.
            with contextlib.suppress(RuntimeError):
                # The thread that is interrupted here may hold any lock, the loop's too.
                native.start_bare_thread(partial(drain, at_once=self._at_once))
        self._then(number, frame)


def drain(*, at_once: bool = False) -> None:
    """Has this process's services drained, soon or at once. As `Drains.drain`."""
    for service in services():
        service.drain(at_once=at_once)
