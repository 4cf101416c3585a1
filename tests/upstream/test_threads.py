"""call_threads: each call at once in a thread of its own, and few threads left afterwards."""

from __future__ import annotations

import gc
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from chatstream.upstream import threads as threads_
from chatstream.upstream.threads import KEPT, CallThreads
from tests.conftest import eventually


@pytest.fixture
def threads() -> Iterator[CallThreads]:
    """Fails a test that leaves a thread behind."""
    before = set(threading.enumerate())
    made = CallThreads()
    yield made
    made.close()
    eventually(lambda: set(threading.enumerate()) <= before, "threads as before")


class Burst:
    """Calls that are all under way, until `end`."""

    def __init__(self, threads: CallThreads, calls: int) -> None:
        self._calls = calls
        self._begun = threading.Semaphore(0)
        self._go = threading.Event()
        self._done = threading.Semaphore(0)
        self.idents: list[int] = []
        for _ in range(calls):
            threads.run(self._call)
        assert all(self._begun.acquire(timeout=5) for _ in range(calls))

    def _call(self) -> None:
        self.idents.append(threading.get_ident())
        self._begun.release()
        assert self._go.wait(10)
        self._done.release()

    def end(self) -> None:
        self._go.set()
        assert all(self._done.acquire(timeout=5) for _ in range(self._calls))


def named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def waiting(threads: CallThreads, count: int) -> None:
    """Returns when so many threads wait for a call."""
    eventually(lambda: (threads._idle, named("chatstream-idle")) == (count, count), "idle threads")


def test_each_call_has_a_thread_of_its_own(threads: CallThreads) -> None:
    """However many are under way, none waits for another; who starts them waits for none."""
    burst = Burst(threads, 3 * KEPT)
    assert len(set(burst.idents)) == 3 * KEPT
    assert threading.get_ident() not in burst.idents
    burst.end()


def test_the_next_call_finds_a_thread(threads: CallThreads) -> None:
    """One after the other they run in one and the same."""
    idents = []
    for _ in range(5):
        burst = Burst(threads, 1)
        burst.end()
        idents += burst.idents
        waiting(threads, 1)
    assert len(set(idents)) == 1


def test_a_burst_leaves_few_threads(threads: CallThreads) -> None:
    """Of many that were needed at once, KEPT wait for the next calls, and are the ones used."""
    burst = Burst(threads, 5 * KEPT)
    burst.end()
    waiting(threads, KEPT)
    eventually(lambda: named("chatstream-call") == 0, "the others' end")
    again = Burst(threads, KEPT)
    assert set(again.idents) <= set(burst.idents)
    again.end()


def test_what_a_thread_does_is_its_name(threads: CallThreads) -> None:
    """In a stack dump: which wait for a provider, and which for a call."""
    burst = Burst(threads, 2)
    assert (named("chatstream-call"), named("chatstream-idle")) == (2, 0)
    burst.end()
    waiting(threads, 2)
    assert named("chatstream-call") == 0
    assert all(t.daemon for t in threading.enumerate() if t.name == "chatstream-idle")


def test_a_thread_that_nobody_needs_ends(
    threads: CallThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After IDLE seconds without a call; the next one has a new thread."""
    monkeypatch.setattr(threads_, "IDLE", 0.01)
    Burst(threads, 3).end()
    eventually(lambda: named("chatstream-call") + named("chatstream-idle") == 0, "no thread")
    Burst(threads, 1).end()


class Crossing(queue.SimpleQueue[Any]):
    """A queue whose readers give up in the moment in which they are given a call."""

    def __init__(self, threads: CallThreads) -> None:
        self.threads = threads
        self.given_up = threading.Event()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if timeout is None:
            return super().get()
        eventually(lambda: self.threads._idle == 0, "a call")
        self.given_up.set()
        raise queue.Empty

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        assert self.given_up.wait(5)
        super().put(item)


def test_no_call_is_lost_to_a_thread_that_ends(threads: CallThreads) -> None:
    """A thread that gives up waiting in the moment in which it is given a call runs it."""
    threads._calls = Crossing(threads)
    Burst(threads, 1).end()
    waiting(threads, 1)
    Burst(threads, 1).end()


def test_calls_run_while_threads_end(threads: CallThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of many, each of which may find a thread that is about to end."""
    monkeypatch.setattr(threads_, "IDLE", 0.0)
    ran = threading.Semaphore(0)
    for _ in range(2000):
        threads.run(ran.release)
    assert all(ran.acquire(timeout=5) for _ in range(2000))


def test_a_waiting_thread_keeps_nothing(threads: CallThreads) -> None:
    """What a call held is gone when it is over, though its thread is not."""

    class Payload:
        def call(self) -> None:
            pass

    payload = Payload()
    gone = weakref.ref(payload)
    threads.run(payload.call)
    del payload
    waiting(threads, 1)
    eventually(lambda: (gc.collect(), gone())[1] is None, "the payload's end")


def test_close_ends_the_threads_that_wait(threads: CallThreads) -> None:
    """At once; those with a call end after it. Twice is once."""
    Burst(threads, 3).end()
    waiting(threads, 3)
    burst = Burst(threads, 1)
    threads.close()
    threads.close()
    eventually(lambda: named("chatstream-idle") == 0, "no idle thread")
    assert named("chatstream-call") == 1
    burst.end()
    eventually(lambda: named("chatstream-call") == 0, "no thread")


def test_a_call_after_close_runs(threads: CallThreads) -> None:
    """And leaves no thread."""
    threads.close()
    Burst(threads, 1).end()
    eventually(lambda: named("chatstream-call") + named("chatstream-idle") == 0, "no thread")


def test_without_a_thread_to_be_had(threads: CallThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said; a thread that waits can still be had."""

    def exhausted(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    burst = Burst(threads, 1)
    monkeypatch.setattr(threading.Thread, "start", exhausted)
    with pytest.raises(RuntimeError):
        threads.run(burst.end)
    burst.end()
    waiting(threads, 1)
    Burst(threads, 1).end()


GEVENT = """
from chatstream.upstream.threads import KEPT, CallThreads  # imported before the patch
from gevent import monkey
monkey.patch_all()
import gevent, gc, greenlet, threading

threads, seen = CallThreads(), []
def call():
    seen.append(threading.get_ident())
    gevent.sleep(0.01)
for _ in range(3):
    for _ in range(3 * KEPT):
        threads.run(call)
    gevent.sleep(0.05)
    assert threads._idle == KEPT, threads._idle
assert len(seen) == 9 * KEPT, len(seen)
assert len(set(seen)) < len(seen)
threads.close()
gevent.sleep(0.01)
assert threading.active_count() == 1, threading.enumerate()
"""


def test_under_gevent_they_are_greenlets() -> None:
    """Calls wait side by side in one thread, and a few greenlets are left for the next."""
    pytest.importorskip("gevent")
    subprocess.run([sys.executable, "-c", GEVENT], check=True, timeout=30)
