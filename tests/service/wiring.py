"""What the tests of a service share: its provider, its other workers, who walks its streams."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from chatstream import (
    Service,
    StreamIterable,
)
from chatstream.bus.base import Bus
from chatstream.bus.messages import Claim, Enquiry, Page, Request, Worker

URL = "https://provider.test/v1/chat"
KEY = "sk-very-secret"
PAYLOAD = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"

MakeService = Callable[..., Service]
Lines = Callable[[], list[str]]


class OtherWorkers(Bus):
    """A bus to workers that are what a test says they are."""

    name = "fake"

    def __init__(self, service: Service) -> None:
        super().__init__(service._neighbours.receive, service._neighbours.lives)
        self.workers: list[Worker] | Exception = []
        self.answer: bool | Exception = False  # to a cancel of what is not here
        self.asked: list[Request] = []
        self.early: bool | BaseException = False  # to a claim
        self.on_claim: Callable[[], object] = lambda: None
        self.claims: list[tuple[Claim, bool]] = []
        self.limits: list[int | None] = []
        self.on_release: Callable[[], object] = lambda: None
        self.released: list[Claim] = []
        self.closed = 0

    def start(self) -> None:
        raise AssertionError("it was put in place")

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        self.claims.append((claim, reject))
        self.limits.append(limit)
        self.on_claim()
        if isinstance(self.early, BaseException):
            raise self.early
        return self.early

    def check(self) -> None:
        self._others()

    def release(self, claim: Claim) -> None:
        self.released.append(claim)
        self.on_release()

    def cancel_elsewhere(self, request: Request) -> bool:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def _here(self) -> Worker:
        return Worker("here", os.getpid(), "host")

    def _others(self) -> list[Worker]:
        if isinstance(self.workers, Exception):
            raise self.workers
        return self.workers

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        return dict.fromkeys(enquiries)

    def close(self) -> None:
        self.closed += 1


def others(service: Service) -> OtherWorkers:
    """Puts a bus in place, as if this process had joined it."""
    bus = OtherWorkers(service)
    service._neighbours.bus, service._neighbours.joined = bus, os.getpid()
    return bus


class Gate:
    """A provider that has the request and does not answer before it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.answers = 0

    def __call__(self, request: Any) -> tuple[int, dict[str, str], bytes]:
        self.asked.set()
        assert self.go_on.wait(10)
        self.answers += 1
        return 200, {}, EVENT + DONE


def walked(iterable: StreamIterable) -> bytes:
    """What a server would send, to the end, and closed."""
    try:
        return b"".join(iterable)
    finally:
        iterable.close()


def told(iterable: StreamIterable) -> tuple[str, int]:
    """How a stream that has nothing to send is refused: code and status. Closes it."""
    assert list(iterable) == []
    assert iterable.refusal is not None
    iterable.close()
    return iterable.refusal.code, iterable.refusal.status


def all_at_once(*actions: Callable[[], object]) -> None:
    """Runs each in a thread of its own, from one moment on, to their ends."""
    barrier = threading.Barrier(len(actions))

    def act(action: Callable[[], object]) -> None:
        barrier.wait(5)
        action()

    threads = [threading.Thread(target=act, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


def run_alone(script: str, *arguments: str) -> None:
    """Runs it in a process of its own, which has to end well and soon."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 0, run.stderr
