"""From a process's first stream to its last: the lock of a start, the drain, the rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from chatstream.errors import Busy
from chatstream.service.registry import Registry
from chatstream.sockets import native
from chatstream.sockets.loop import Loop
from chatstream.stream.outcome import Cause
from chatstream.workers import draining, server


class Lifetime:
    """The time in which a service's streams may live, in one process. Safe from any thread.

    Attributes:
        over: The streams have been ended: new ones are refused.
    """

    def __init__(self, loop: Loop, registry: Registry) -> None:
        """
        Args:
            loop: Whose thread ends with the last stream, and has the clock of the drain.
            registry: The streams.
        """
        self._loop = loop
        self._registry = registry
        self.over = False
        self._draining = False
        self._stopped = False  # the loop is to end with the last stream
        self._on_rest: dict[object, Callable[[], object]] = {}  # changed in one step
        self._locks: tuple[int, threading.Lock] = (0, threading.Lock())
        self._forked = native.allocate_lock()  # guards the one above

    def making(self) -> threading.Lock:
        """The lock under which this process's things are made: nobody can go on without them.

        Made in the process: with preload_app, one that was made before gevent patched would block
        all greenlets when one of them waits.
        """
        with self._forked:
            if self._locks[0] != os.getpid():
                self._locks = (os.getpid(), threading.Lock())
            return self._locks[1]

    def begin(self) -> None:
        """After a `stop`: the loop's thread goes on again when no stream is left."""
        self._stopped = False

    def drain(self, seconds: float, *, at_once: bool = False) -> None:
        """Has the streams come to an end; see `Service.drain`.

        Args:
            seconds: The time that they have.
            at_once: It is over now.
        """
        if at_once:
            self.end_streams()
        elif not self._draining:
            self._draining = True
            try:
                self._loop.call_later(seconds, self.end_streams)
            except Busy:  # no clock can be had
                self.end_streams()

    def draining(self) -> bool:
        """Whether this process is to end, so that new streams had better go elsewhere."""
        alive = getattr(server.gunicorn_worker(), "alive", True)
        return self._draining or self.over or not alive

    def end_streams(self) -> None:
        """Aborts what lives (cause SHUTDOWN), and what is opened from now on."""
        self.over = True  # before the list is made: a stream that is not in it sees this
        for stream in self._registry.live():
            stream.abort(Cause.SHUTDOWN)

    def at_rest(self) -> bool:
        """Whether no stream is left, also none that has ended and only has to be sent."""
        return len(self._registry) == 0

    def on_rest(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Has `listener` called whenever the last stream has gone; see `Service.on_rest`."""
        key = object()
        self._on_rest[key] = listener

        def forget() -> None:
            self._on_rest.pop(key, None)

        return forget

    def gone(self) -> None:
        """A stream has gone. After the last one the loop's thread ends, if `stop` left it that."""
        if not self.at_rest():
            return
        if self._stopped:
            self._loop.stop()
        for listener in list(self._on_rest.values()):
            listener()

    def stop(self) -> None:
        """The loop's thread ends with the last stream; later ones are welcome. Does not wait."""
        self._stopped = True
        self.gone()
        self._draining = self.over = False


def time_to_drain(longest: float) -> float:
    """Seconds that streams may go on: `longest`, or what gunicorn's `graceful_timeout` leaves."""
    worker = server.gunicorn_worker()
    if worker is None:
        return longest
    graceful: int = worker.cfg.graceful_timeout
    return max(0.0, min(longest, graceful - draining.GRACE))
