"""Streams in one worker of many, and stops that reach another."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Fleet
from tests.integration.processes import state, tcp
from tests.integration.scenes import SCENES

NOT_FOUND = {"ok": False, "reason": "not_found"}


UNCONFIRMED = {"ok": False, "reason": "unconfirmed"}


def begin(
    fleet: Fleet,
    session: str,
    stream: str | None = None,
    *,
    at: int | None = None,
    scene: str = "silent",
    **headers: str,
) -> Client:
    """A stream in the middle of its scene, in worker `at`; the provider knows it by its id."""
    client = fleet.client_of(at) if at else fleet.client()
    name = stream or session
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    client.post(session, stream, headers=named, simulate={"id": name, **SCENES[scene]})
    fleet.provider.request(name)
    if scene != "headers":
        client.until(b"data: ")
        fleet.provider.request(name, "delivered", count=2)
    return client


def is_open(fleet: Fleet, name: str) -> bool:
    """Whether the kernel still has the provider's connection of a stream, open on both sides."""
    return _is_established(fleet, fleet.provider.request(name)["peer"])


def _is_established(fleet: Fleet, peer: int) -> bool:
    return bool(list(tcp("ESTABLISHED", local=fleet.provider.port, remote=peer)))


def assert_cancel_stops(
    fleet: Fleet,
    session: str,
    stream: str | None = None,
    *,
    at: int | None = None,
    name: str | None = None,
) -> int:
    """The answer is 200, and by then the provider's side is closed. Returns who answered."""
    peer = fleet.provider.request(name or stream or session)["peer"]
    status, answer, worker = fleet.cancel(session, stream, at=at)
    still_open = _is_established(fleet, peer)
    assert (status, answer) == (200, {"ok": True, "cancelled": True})
    assert not still_open, "200 means that it has stopped"
    return worker


@contextlib.contextmanager
def hanging(worker: int) -> Iterator[int]:
    """A worker that does nothing until the end of the block."""
    os.kill(worker, signal.SIGSTOP)
    try:
        eventually(lambda: state(worker) == "T", "a stop")
        yield worker
    finally:
        os.kill(worker, signal.SIGCONT)
