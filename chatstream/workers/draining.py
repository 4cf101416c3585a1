"""How a process ends: its server's word for it is heard, and its streams are drained first.

WSGI has no such word. gunicorn has no hook for SIGTERM, and its workers end by themselves after
`max_requests`; so a worker's signal handlers are taken over, to speak to this process's services
first, and each request looks whether its worker still is to live.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, Protocol

from chatstream.sockets import native
from chatstream.workers.server import gunicorn_worker

_ENDS = (signal.SIGINT, signal.SIGTERM)
"""What uWSGI's master sends to workers that are to end."""


def drain_at_sigterm() -> bool:
    """Has SIGTERM drain this process's streams first, under waitress and uWSGI.

        ChatStream(app)
        drain_at_sigterm()

    They may go on for `CHATSTREAM_DRAIN` seconds; what is left is aborted and told, and then the
    process ends. A second SIGTERM ends them at once (waitress). Until then new requests are served;
    in the end, streams are refused with 503. gunicorn's workers drain without this: there, and
    where the app has a handler of its own for SIGTERM, it does nothing. Call it where the app is
    made, in the main thread.

    Returns:
        Whether it was of use.
    """
    if uwsgi := sys.modules.get("uwsgi"):
        return _in_uwsgi(uwsgi)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    signal.signal(signal.SIGTERM, _SigtermHandler())
    return True


class _SigtermHandler:
    """SIGTERM's, where there was none: streams first, then the server's main thread."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._begun = self._over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that the app has forked has no streams
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._over:
            raise SystemExit(0)
        else:
            native.start_bare_thread(partial(self._see_out, again=self._begun))
            self._begun = True

    def _see_out(self, again: bool) -> None:
        drain(at_once=again)
        if not again:
            _await_rest()
            self._over = True
            os.kill(self._pid, signal.SIGTERM)


def _in_uwsgi(uwsgi: Any) -> bool:
    if not uwsgi.has_threads:  # then none of ours runs while its main thread waits
        return False
    before = getattr(uwsgi, "post_fork_hook", None)

    def forked() -> None:
        if before is not None:
            before()
        _await_signal(uwsgi)

    uwsgi.post_fork_hook = forked
    _await_signal(uwsgi)  # with lazy-apps it has been called already
    return True


def _await_signal(uwsgi: Any) -> None:
    if not uwsgi.worker_id():  # the master, or a mule
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # threads that start from now on do so, too
    native.start_bare_thread(_end_when_told)


def _end_when_told() -> None:
    signal.sigwait(_ENDS)
    drain()
    _await_rest()
    os._exit(0)  # as uWSGI's own handler does


def _await_rest() -> None:
    """Returns when no stream is left, or a little after the time when none may be."""
    enrolled = services()
    changed = threading.Event()
    forget = [service.on_rest(changed.set) for service in enrolled]
    longest = max((service.settings.drain for service in enrolled), default=0.0)
    until = monotonic() + longest + GRACE
    while not all(service.at_rest() for service in enrolled) and monotonic() < until:
        changed.wait(until - monotonic())
        changed.clear()
    for each in forget:
        each()


GRACE = 3.0
"""Seconds of gunicorn's `graceful_timeout` that are for the clients to take their last bytes."""

_AT_ONCE = {
    signal.SIGTERM: False,
    signal.SIGQUIT: True,
    signal.SIGINT: True,
    signal.SIGABRT: True,  # the arbiter's, for a worker that hangs
}
"""The signals that end a gunicorn worker, and whether its streams end with it or are drained."""


class Drains(Protocol):
    """What has streams in this process: an app's Service."""

    settings: Any

    def join(self) -> None:
        """Joins its other workers, if it can by now. After the process's fork; idempotent."""

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


def join() -> None:
    """Has this process's services join their other workers, now that it begins to serve."""
    for service in services():
        service.join()


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
        if not callable(handler) or isinstance(handler, _GunicornHandler):
            continue
        try:
            signal.signal(number, _GunicornHandler(handler, at_once))
        except ValueError:  # not the main thread
            return False
        if not at_once:  # as gunicorn has it: requests go on, so no system call is interrupted
            signal.siginterrupt(number, False)
    return True


def post_worker_init(worker: object) -> None:
    """gunicorn's hook of this name, for a configuration with `preload_app` (see docs/operate.md).

        from chatstream.workers.draining import post_worker_init

    There the app is made in the master, so it cannot take over a worker's signals.
    """
    follow_signals()
    join()


def notice_end() -> None:
    """Drains this process's services if its worker is not to live on. Before each request.

    That is how `max_requests` shows: gunicorn tells nobody.
    """
    if not getattr(gunicorn_worker(), "alive", True):
        drain()


class _GunicornHandler:
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
