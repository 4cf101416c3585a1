"""The end of a process whose server waits for nobody: its streams are drained before it goes.

waitress ends at once at SIGTERM, as Python does. So does a worker of uWSGI's, at the SIGINT or
SIGTERM that its master sends; and its main thread waits in C, where no handler of Python's is run.
So the worker's threads block these signals, and one of ours takes them (sigwait(3)).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any

from chatstream import native, server

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
    signal.signal(signal.SIGTERM, _Handler())
    return True


class _Handler:
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
        server.drain(at_once=again)
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
    server.drain()
    _await_rest()
    os._exit(0)  # as uWSGI's own handler does


def _await_rest() -> None:
    """Returns when no stream is left, or a little after the time when none may be."""
    services = server.services()
    changed = threading.Event()
    forget = [service.on_rest(changed.set) for service in services]
    longest = max((service.settings.drain for service in services), default=0.0)
    until = monotonic() + longest + server.GRACE
    while not all(service.at_rest() for service in services) and monotonic() < until:
        changed.wait(until - monotonic())
        changed.clear()
    for each in forget:
        each()
