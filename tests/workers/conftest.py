"""This process as a worker of gunicorn's, as far as its signals tell."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

SIGNALS = [
    *(signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGABRT),
    *(signal.SIGUSR1, signal.SIGWINCH),
]
"""Those that gunicorn's workers handle."""


class SignalledWorker:
    """As gunicorn's: its signal handlers are methods."""

    def __init__(self) -> None:
        self.sockets: Any = []
        self.alive = True
        self.handled: list[int] = []

    def handle(self, number: int, frame: object) -> None:
        self.handled.append(number)


@pytest.fixture
def worker() -> Iterator[SignalledWorker]:
    """The one that this process is."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    worker = SignalledWorker()
    for number in SIGNALS:
        signal.signal(number, worker.handle)
    yield worker
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: faulthandler's
