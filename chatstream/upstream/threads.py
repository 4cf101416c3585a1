"""The threads that call the provider: one for each call under way, and a few that wait for one.

To start a thread for each call took a third of the time to the first event.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

KEPT = 8
"""Threads that may wait for a call."""

IDLE = 30.0
"""Seconds that a thread waits for a call before it ends."""


class CallThreads:
    """Runs each call in a thread of its own, under gevent in a greenlet. Make it after fork.

    Safe from any thread.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the two below; held for assignments only
        self._idle = 0  # threads that wait, less the calls they will find
        self._closed = False

    def run(self, call: Callable[[], object]) -> None:
        """Has `call` run at once; returns before it is done.

        Raises:
            RuntimeError: The process has no thread left.
        """
        with self._lock:
            waited_for = self._idle > 0
            self._idle -= waited_for
        if waited_for:
            self._calls.put(call)
        else:
            threading.Thread(target=self._work, args=([call],), daemon=True).start()

    def close(self) -> None:
        """Ends the threads that wait, and the others after their calls. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._calls.put(None)

    def _work(self, first: list[Callable[[], object]]) -> None:
        thread = threading.current_thread()
        # While it waits, nothing of a stream is kept: neither here nor in the thread's arguments.
        call: Callable[[], object] | None = first.pop()
        while call is not None:
            thread.name = "chatstream-call"
            call()
            thread.name = "chatstream-idle"
            call = None
            call = self._next()

    def _next(self) -> Callable[[], object] | None:
        """The next call, awaited; None when this thread is not needed."""
        with self._lock:
            if self._closed or self._idle >= KEPT:
                return None
            self._idle += 1
        try:
            return self._calls.get(timeout=IDLE)
        except queue.Empty:
            pass
        with self._lock:
            if self._idle:
                self._idle -= 1
                return None
        return self._calls.get()  # it came in this moment
