"""Every way of stopping, in every phase, on both worker classes: the provider is told at once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import MODES, Rig
from tests.integration.processes import tcp
from tests.integration.scenes import SCENES, begin

numbers = itertools.count(1)


@pytest.fixture(params=MODES)
def worker_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


WAYS: dict[str, Callable[[Rig, str, Client], None]] = {
    "cancel": lambda rig, session, client: _cancel(rig, session),
    "close": lambda rig, session, client: client.close(),
    "reset": lambda rig, session, client: client.reset(),
    "half-close": lambda rig, session, client: client.half_close(),
    "pipelined close": lambda rig, session, client: client.pipeline_and_close(),
}


def _cancel(rig: Rig, session: str) -> None:
    """Cancels; by the time of the 200, the kernel has closed the provider's side."""
    figure = rig.provider.request(session)
    answer = rig.server.cancel(session)
    still_open = list(tcp("ESTABLISHED", local=rig.provider.port, remote=figure["peer"]))
    assert answer == (200, {"ok": True, "cancelled": True})
    assert not still_open, "200 means that it has stopped"


def assert_stopped(
    rig: Rig, session: str, by: str = "aborted by client/cancel", blocked: Client | None = None
) -> None:
    """The provider saw the close before its answer was whole, and the log tells the truth.

    A client that is `blocked` goes then: it would hold its stream's end up for two seconds, which
    `test_a_blocked_client_is_let_go` has the time for.
    """
    figure = rig.provider.request(session, "closed")
    assert figure["closed_ns"] is not None
    assert not figure["finished"]
    if blocked is not None:
        blocked.close()
    assert by in rig.server.ending_of(session)
    assert rig.server.errors() == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scene", SCENES)
def test_stop(rig: Rig, scene: str, way: str) -> None:
    """Cases 1, 2, 12, 13, 16: whatever either side is doing, a stop reaches the provider."""
    session = f"stop-{next(numbers)}"
    client = begin(rig, scene, session)
    WAYS[way](rig, session, client)
    assert_stopped(rig, session, blocked=client if scene == "blocked" else None)


@pytest.mark.parametrize(
    ("scene", "way"),
    [("headers", "cancel"), ("chatty", "close"), ("silent", "close"), ("blocked", "cancel")],
)
@pytest.mark.parametrize("kind", ["tls", "proxy", "proxy tls"])
def test_stop_on_other_ways_to_the_provider(
    rigs: Callable[..., Rig], worker_class: str, kind: str, scene: str, way: str
) -> None:
    """TLS and proxies change nothing: the socket is the same, and who stops does not know of it."""
    rig = rigs(kind, worker_class)
    session = f"stop-{next(numbers)}"
    client = begin(rig, scene, session)
    if way == "cancel":
        assert rig.server.cancel(session)[0] == 200
    else:
        client.close()
    assert_stopped(rig, session, blocked=client if scene == "blocked" else None)
    if "proxy" in kind:
        assert rig.extra.seen[-1] == ("CONNECT" if "tls" in kind else "POST")
    rig.check_leaks()


@pytest.mark.parametrize("way", ["cancel", "close", "reset"])
def test_stop_while_connecting(rigs: Callable[..., Rig], worker_class: str, way: str) -> None:
    """Case 1: a SYN without an answer is given up at once, and nothing else is dialled."""
    rig = rigs("black hole", worker_class)
    session = f"stop-{next(numbers)}"
    client = rig.client().post(session)
    dialling = eventually(lambda: _dialling(rig), "a SYN")
    if way == "cancel":
        assert rig.server.cancel(session)[0] == 200
        assert not _dialling(rig), "200 means that it has stopped"
        assert client.head()[0] == 200
        assert client.body() == b""
    else:
        getattr(client, way)()
    eventually(lambda: not _dialling(rig), f"an end of {dialling}", 2)
    ending = rig.server.ending_of(session)
    assert "aborted by client/cancel" in ending
    assert "phase=connecting" in ending
    rig.check_leaks()


def _dialling(rig: Rig) -> list[int]:
    return [port for port in tcp("SYN_SENT", remote=rig.extra.port) if _is_workers(rig, port)]


def _is_workers(rig: Rig, port: int) -> bool:
    """The black hole's own fillers are waiting too; they are this process's."""
    fillers = {filler.getsockname()[1] for filler in rig.extra._fillers}
    return port not in fillers


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_stop_in_the_tls_handshake(rigs: Callable[..., Rig], worker_class: str, way: str) -> None:
    """Case 1: a provider that accepts and then does not shake hands."""
    rig = rigs("stalled tls", worker_class)
    session = f"stop-{next(numbers)}"
    client = rig.client().post(session)
    eventually(lambda: rig.server.debug()["live"], "the stream")
    eventually(lambda: list(tcp("ESTABLISHED", local=rig.extra.port)), "a connection")
    if way == "cancel":
        assert rig.server.cancel(session)[0] == 200
        assert not list(tcp("ESTABLISHED", local=rig.extra.port))
    else:
        client.close()
    eventually(lambda: not list(tcp("ESTABLISHED", local=rig.extra.port)), "its end", 2)
    assert "aborted by client/cancel" in rig.server.ending_of(session)
    rig.check_leaks()


def test_a_cancelled_client_that_reads_sees_a_proper_end(rig: Rig) -> None:
    """CANCEL adds nothing: no error, no [DONE]; the body ends as HTTP says."""
    session = f"stop-{next(numbers)}"
    client = begin(rig, "silent", session)
    assert rig.server.cancel(session)[0] == 200
    assert client.head()[0] == 200
    body = client.body()
    assert b"error" not in body
    assert b"[DONE]" not in body
    assert body.endswith(b"\n\n")


def test_a_cancel_before_the_headers_answers_an_empty_stream(rig: Rig) -> None:
    """CANCEL before the provider's headers: 200, the usual headers, no body."""
    session = f"stop-{next(numbers)}"
    client = begin(rig, "headers", session)
    assert rig.server.cancel(session)[0] == 200
    status, headers = client.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert headers["x-session-id"] == session
    assert client.body() == b""


def test_a_blocked_client_is_let_go(rig: Rig) -> None:
    """A client that takes nothing after its stop has its socket shut down: the slot comes back."""
    session = f"stop-{next(numbers)}"
    client = begin(rig, "blocked", session)
    assert rig.server.cancel(session)[0] == 200
    eventually(lambda: rig.server.debug()["slots"] == 0, "the slot")
    assert "phase=sending" in rig.server.ending_of(session)
    client.head()
    with pytest.raises((EOFError, ConnectionResetError)):
        client.body()  # it broke off; it did not end


def test_a_thousand_mixed_stops_leave_nothing(rig: Rig) -> None:
    """Case 5: descriptors, threads, slots and connections are back after 1,000 stops."""
    chance = random.Random(20240601)
    scenes = [scene for scene in SCENES if scene != "blocked"]
    before = rig.provider.stats()["requests"]
    for round_ in range(50):
        streams = []
        for index in range(20):
            session = f"mixed-{round_}-{index}"
            scene = "blocked" if index == 0 and round_ % 10 == 0 else chance.choice(scenes)
            blocked = {"receive_buffer": 4096} if scene == "blocked" else {}
            client = rig.client(**blocked)
            client.post(session, simulate={"id": session, **SCENES[scene]})
            streams.append((session, client))
        if chance.random() < 0.7:
            eventually(lambda: rig.server.debug()["live"] >= 15, "most of the streams")
        for session, client in streams:
            if chance.random() < 0.4:
                rig.server.cancel(session)
            WAYS[chance.choice(["close", "reset", "half-close"])](rig, session, client)
        for _, client in streams:
            client.close()
        rig.clients.clear()
    eventually(lambda: rig.server.debug()["slots"] == 0, "every slot")
    rig.check_leaks()
    assert rig.provider.stats()["requests"] > before + 500
    lines = [line for line in rig.server.log().splitlines() if "[SSE] mixed-" in line]
    begun = sum("started" in line for line in lines)
    assert sum("aborted by client/cancel" in line for line in lines) == begun > 900
    assert len(lines) == 2 * begun, "nothing completed, nothing failed"
