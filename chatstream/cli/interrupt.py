"""Ctrl-C: it stops the answer, and leaves at the prompt."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from types import FrameType, TracebackType

from chatstream.sockets import native

AGAIN = 1.0
"""Seconds after a Ctrl-C that stopped an answer in which another one does not leave the program."""


class Interrupt:
    """SIGINT's handler, for as long as it is entered. Main thread only.

    While an answer comes, nothing is raised: the handler has the stream aborted, in a thread of the
    system's own, since the thread that it interrupts may hold any lock. Whatever that one waits for
    then ends by itself, in every phase. At the prompt it is a KeyboardInterrupt.

    Attributes:
        pressed: Whether Ctrl-C was pressed since the present answer was asked for.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._answering = False
        self._stop: Callable[[], object] | None = None
        self._deaf_until = 0.0

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """An answer is asked for, and comes."""
        self.pressed, self._answering = False, True
        try:
            yield
        finally:
            self._answering, self._stop = False, None

    def stop_with(self, stop: Callable[[], object]) -> None:
        """From now on Ctrl-C runs `stop`; at once, if it was pressed already."""
        self._stop = stop  # first: the handler may run after either line
        if self.pressed:
            stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        if not self._answering:
            if now < self._deaf_until:
                return
            raise KeyboardInterrupt
        self.pressed, self._deaf_until = True, now + AGAIN
        if self._stop is not None:
            try:
                native.start_bare_thread(partial(_call, self._stop))
            except RuntimeError:  # no thread is to be had
                raise KeyboardInterrupt from None


def _call(stop: Callable[[], object]) -> None:
    stop()
