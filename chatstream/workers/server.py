"""The server around the app: its worker, its threads, its clients.

WSGI tells an app none of these.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from chatstream.settings.table import Settings
from chatstream.sockets import native
from chatstream.workers.slots import UNKNOWN, Slots, of_server, of_threads, of_whole_requests

if TYPE_CHECKING:
    from _typeshed import HasFileno


_HANDLED = (
    signal.SIGUSR1,
    signal.SIGWINCH,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGINT,
    signal.SIGABRT,
)
"""The signals that a gunicorn worker handles; an app may have taken some of them over."""


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


def slots_shown(environ: Mapping[str, Any]) -> int | None:
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


def stream_slots(settings: Settings, environ: Mapping[str, Any] = MappingProxyType({})) -> Slots:
    """The stream slots of this process, in which nothing runs before a server's fork."""
    worker, wanted = gunicorn_worker(), settings.max_streams
    if worker is None:
        known = wanted or slots_shown(environ) or UNKNOWN
        return Slots(known, known)
    return of_server(
        worker.cfg.threads,
        worker.cfg.worker_connections,
        greenlets=native.patched(),
        detaches=detaches(settings),
        wanted=wanted,
    )


def detaches(settings: Settings) -> bool:
    """Whether streams need no thread here, if nothing wraps them."""
    return settings.detach and getattr(gunicorn_worker(), "detaches", False)
