"""Threads that were told to end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator

PATIENCE = 5.0
"""Seconds that threads which were told to end may take."""


def join(threads: Collection[threading.Thread]) -> int:
    """Waits for threads to end. Returns how many have not, after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    for thread in list(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    return sum(thread.is_alive() for thread in list(threads))


@contextlib.contextmanager
def ended_threads() -> Iterator[None]:
    """Waits, in the end, for the threads of chatstream that began meanwhile: they were told."""
    before = set(threading.enumerate())
    yield
    join([t for t in threading.enumerate() if t.name.startswith("chatstream-") and t not in before])
