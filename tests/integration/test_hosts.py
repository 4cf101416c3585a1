"""Two gunicorns joined by one Redis: a stop crosses hosts, and Redis may come and go."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from tests.integration.conftest import Fleet
from tests.integration.fleets import (
    NOT_FOUND,
    UNCONFIRMED,
    assert_cancel_stops,
    begin,
    hanging,
    is_open,
)
from tests.integration.hosts import TTL, Hosts, Pairs, left_at_rest, starting
from tests.integration.processes import Server, is_running
from tests.integration.scenes import SCENES

UNAVAILABLE = {"ok": False, "reason": "bus_unavailable"}

numbers = itertools.count(1)


@pytest.fixture
def session() -> str:
    return f"hosts-{next(numbers)}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    with starting(tmp_path_factory) as pairs:
        yield pairs


@pytest.fixture
def hosts(pairs: Pairs, worker_class: str) -> Iterator[Hosts]:
    with left_at_rest(pairs(worker_class)) as hosts:
        yield hosts


def elsewhere(hosts: Hosts) -> Iterator[tuple[Fleet, Fleet]]:
    """Where a stream is, and where its cancel arrives: both ways round."""
    yield hosts.a, hosts.b
    yield hosts.b, hosts.a


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    before = time.monotonic()
    result = call()
    return time.monotonic() - before, result


# Stops


def test_any_host_stops_any_stream(hosts: Hosts) -> None:
    """Case 28: every cancel at the other host is a 200 that means it."""
    scenes = itertools.cycle(["silent", "chatty", "headers"])
    placed = []
    for here, there in elsewhere(hosts):
        for owner, at in itertools.product(here.server.workers, there.server.workers):
            session = f"any-{next(numbers)}"
            begin(here, session, at=owner, scene=next(scenes))
            placed.append((here, there, at, session))
    for here, there, at, session in placed:
        assert assert_cancel_stops(there, session, at=at) == at
        assert "aborted by client/cancel cause=cancel" in here.server.ending_of(session)
        assert not there.server.lines_of(session)


def test_unknown_and_foreign_streams_are_a_404(hosts: Hosts, session: str) -> None:
    """Case 20, across hosts."""
    stream = f"{session}.a"
    begin(hosts.a, session, stream, X_User="alice")
    for fleet in hosts.both:
        assert fleet.cancel("never-heard-of", X_User="alice")[:2] == (404, NOT_FOUND)
        assert fleet.cancel(session[:-1], X_User="alice")[:2] == (404, NOT_FOUND)
        assert fleet.cancel(session, f"{stream}a", X_User="alice")[:2] == (404, NOT_FOUND)
        for name in (None, stream):
            assert fleet.cancel(session, name)[:2] == (404, NOT_FOUND)
    assert is_open(hosts.a, stream)
    assert hosts.b.cancel(session, stream, X_User="alice")[0] == 200
    assert not is_open(hosts.a, stream)


def test_an_early_cancel_is_remembered_for_every_host(hosts: Hosts, session: str) -> None:
    """Case 19: wherever the stream then starts, it is born aborted; the provider hears nothing."""
    for index, (here, there) in enumerate(elsewhere(hosts)):
        stream = f"{session}.{index}"
        assert there.cancel(session, stream)[:2] == (404, NOT_FOUND)
        client = here.client()
        client.post(session, stream, simulate={"id": stream, **SCENES["silent"]})
        assert "aborted by client/cancel cause=cancel" in here.server.ending_of(session, stream)
        assert client.head()[0] == 200
        assert client.body() == b""
        assert stream not in hosts.provider.names()


def test_an_early_cancel_is_not_taken_for_a_late_one(hosts: Hosts, session: str) -> None:
    """Another session has just had a stream of this streamId: that was another stream."""
    stream = f"{session}.a"
    begin(hosts.a, f"{session}.other", stream)
    assert_cancel_stops(hosts.b, f"{session}.other", stream)
    assert "aborted by" in hosts.a.server.ending_of(f"{session}.other")
    assert hosts.b.cancel(session, stream)[0] == 404
    hosts.a.client().post(session, stream, simulate={"id": session, **SCENES["silent"]}).head()
    assert session not in hosts.provider.names()
    assert "aborted by client/cancel cause=cancel" in hosts.a.server.ending_of(session)


def test_parallel_cancels_stop_once(hosts: Hosts, session: str) -> None:
    """Case 21: one of fifty at both hosts did it, and only that one says so."""
    begin(hosts.a, session, scene="chatty")
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda i: hosts.both[i % 2].cancel(session), range(50)))
    assert Counter(status for status, _, _ in answers) == {200: 1, 404: 49}
    assert "aborted by client/cancel cause=cancel" in hosts.a.server.ending_of(session)


def test_a_late_cancel_finds_nothing(hosts: Hosts, session: str) -> None:
    """Case 22: a cancel for stream 1 leaves stream 2 of the session, at another host, alone."""
    old, new = f"{session}.old", f"{session}.new"
    begin(hosts.a, session, old)
    begin(hosts.b, session, new)
    assert "aborted by superseded" in hosts.a.server.ending_of(session, old)
    for fleet in hosts.both:
        assert fleet.cancel(session, old)[:2] == (404, NOT_FOUND)
    assert is_open(hosts.b, new)
    assert_cancel_stops(hosts.a, session, new)


# The conflict policy


def test_a_newer_stream_supersedes_at_every_host(hosts: Hosts, session: str) -> None:
    """Case 23: each one ends the one before, silently, and has the session."""
    chain = [hosts.a, hosts.b, hosts.a, hosts.b]
    clients = []
    for index, fleet in enumerate(chain):
        clients.append(begin(fleet, session, f"{session}.{index}"))
        assert not index or not is_open(fleet, f"{session}.{index - 1}")
    for index, (fleet, client) in enumerate(zip(chain[:-1], clients, strict=False)):
        assert "aborted by superseded" in fleet.server.ending_of(session, f"{session}.{index}")
        client.head()
        body = client.body()
        assert b"error" not in body
        assert b"[DONE]" not in body
    assert_cancel_stops(hosts.a, session, name=f"{session}.3")


def test_of_streams_that_begin_at_once_one_stays(hosts: Hosts, session: str) -> None:
    """Case 23: twelve at once at two hosts; none is orphaned, one is left, a cancel stops it."""
    clients = [hosts.both[index % 2].client() for index in range(12)]

    def post(index: int) -> int:
        stream = f"{session}.{index}"
        clients[index].post(session, stream, simulate={"id": stream, **SCENES["silent"]})
        return clients[index].head()[0]

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(post, range(12))) == {200}
    alive = eventually(lambda: _only_one(hosts, session), "one stream")
    at = hosts.both[1 - int(alive.rpartition(".")[2]) % 2]  # the other host
    assert_cancel_stops(at, session, name=alive)
    for index in range(12):
        stream = f"{session}.{index}"
        by = "client/cancel" if stream == alive else "superseded"
        ending = hosts.both[index % 2].server.ending_of(session, stream)
        assert f"aborted by {by}" in ending


def _only_one(hosts: Hosts, session: str) -> str | None:
    figures = [f for f in hosts.provider.get("/requests") if f["id"].startswith(f"{session}.")]
    still_open = [figure["id"] for figure in figures if figure["open"]]
    lines = [line for fleet in hosts.both for line in fleet.server.lines_of(session)]
    ended = sum(" aborted by superseded " in line for line in lines)
    return still_open[0] if len(still_open) == 1 and ended == 11 else None


def test_a_stream_id_is_live_at_every_host(hosts: Hosts, session: str) -> None:
    """The same streamId is a 409 while it is live; the live one goes on."""
    stream = f"{session}.a"
    begin(hosts.a, session, stream)
    for fleet in hosts.both:
        assert fleet.client().post(f"{session}.other", stream).head()[0] == 409
    assert is_open(hosts.a, stream)
    assert_cancel_stops(hosts.b, session, stream)
    begin(hosts.b, f"{session}.other", stream)
    assert_cancel_stops(hosts.a, f"{session}.other", stream)


# Workers that die or hang


@pytest.mark.parametrize("worker_class", ["gthread"])
def test_a_killed_worker_is_forgotten(hosts: Hosts, session: str) -> None:
    """Case 33: 504 until its entries have expired, then 404; its session can be asked at once."""
    owner = hosts.a.worker()
    for name in (session, f"{session}.again"):
        begin(hosts.a, name, at=owner)
    before = hosts.a.server.workers
    os.kill(owner, signal.SIGKILL)
    eventually(lambda: not is_running(owner), "its end")
    took, _ = timed(lambda: begin(hosts.b, f"{session}.again", f"{session}.new"))
    assert took < 3
    assert_cancel_stops(hosts.a, f"{session}.again", name=f"{session}.new")
    answers = []

    def forgotten() -> bool:
        status, answer, _ = hosts.b.cancel(session)
        answers.append((status, answer))
        return status == 404

    eventually(forgotten, "404", TTL + 10)
    assert [answer for answer in answers if answer != (504, UNCONFIRMED)] == [(404, NOT_FOUND)]
    eventually(lambda: set(hosts.a.server.workers) - set(before), "a new worker")
    begin(hosts.a, session, f"{session}.b")
    assert_cancel_stops(hosts.b, session, name=f"{session}.b")


def test_the_first_stream_of_a_worker_is_stopped(hosts: Hosts, session: str) -> None:
    """Case 30: a stop that arrives while the worker has barely joined is not lost."""
    for here, there in elsewhere(hosts):
        old = here.worker()
        before = here.server.workers
        os.kill(old, signal.SIGKILL)
        new = eventually(lambda: set(here.server.workers) - set(before), "a new worker").pop()  # noqa: B023
        client = here.client_of(new)
        name = f"{session}.{new}"
        client.post(name, simulate={"id": name, "headers_after": 60})
        assert_cancel_stops(there, name)


def test_a_worker_that_hangs_is_unconfirmed(hosts: Hosts, session: str) -> None:
    """504 within a second, not a false 200 or 404; what was asked is done when it can be."""
    owner = hosts.a.worker()
    begin(hosts.a, session, at=owner)
    with hanging(owner):
        took, (status, answer, _) = timed(lambda: hosts.b.cancel(session))
        assert (status, answer) == (504, UNCONFIRMED)
        assert took < 3
        assert is_open(hosts.a, session)
    assert hosts.provider.request(session, "closed")["closed_by"] == "client"
    assert "aborted by client/cancel cause=cancel" in hosts.a.server.ending_of(session)


def test_a_session_of_a_worker_that_hangs_can_be_asked_again(hosts: Hosts, session: str) -> None:
    """The new stream does not wait for long; the old one ends when its worker goes on."""
    owner = hosts.a.worker()
    begin(hosts.a, session, f"{session}.old", at=owner)
    with hanging(owner):
        took, _ = timed(lambda: begin(hosts.b, session, f"{session}.new"))
        assert took < 3
    assert hosts.provider.request(f"{session}.old", "closed")["closed_by"] == "client"
    assert "aborted by superseded" in hosts.a.server.ending_of(session)
    assert is_open(hosts.b, f"{session}.new")
    assert_cancel_stops(hosts.a, session, name=f"{session}.new")


# Redis comes and goes


def test_redis_is_killed_and_started_again(hosts: Hosts, session: str) -> None:
    """Case 29: streams go on, stops say what they can, and all is found again without a restart."""
    away, back = hosts.said("away"), hosts.said("back")
    owner = hosts.a.worker()
    chatty = begin(hosts.a, f"{session}.chatty", at=owner, scene="chatty")
    begin(hosts.a, f"{session}.local", at=owner)
    begin(hosts.a, f"{session}.remote", at=owner)
    begin(hosts.a, f"{session}.ended", at=owner)
    hosts.redis.stop()
    eventually(lambda: len(hosts.said("away") - away) == 4, "everybody notices")

    # Streams go on, and new ones start without delay.
    delivered = hosts.provider.request(f"{session}.chatty")["delivered"]
    hosts.provider.request(f"{session}.chatty", "delivered", count=delivered + 20)
    for fleet in hosts.both:
        took, _ = timed(lambda fleet=fleet: begin(fleet, f"{session}.{fleet.server.port}"))
        assert took < 1.5

    # Here a stop works; elsewhere it cannot be said whether there is such a stream.
    assert_cancel_stops(hosts.a, f"{session}.local", at=owner)
    for name in (f"{session}.remote", "never-heard-of"):
        took, (status, answer, _) = timed(lambda name=name: hosts.b.cancel(name))
        assert (status, answer) == (503, UNAVAILABLE)
        assert took < 1.5
    assert is_open(hosts.a, f"{session}.remote")
    assert_cancel_stops(hosts.a, f"{session}.ended", at=owner)

    hosts.redis.start()
    eventually(lambda: len(hosts.said("back") - back) == 4, "it is back for everybody")
    for name in (f"{session}.remote", f"{session}.{hosts.a.server.port}", f"{session}.chatty"):
        assert_cancel_stops(hosts.b, name)
    assert_cancel_stops(hosts.a, f"{session}.{hosts.b.server.port}")
    # It is not said to be unknown before all can have told what they have.
    assert hosts.b.cancel(f"{session}.ended")[:2] == (503, UNAVAILABLE)
    eventually(lambda: hosts.b.cancel(f"{session}.ended")[:2] == (404, NOT_FOUND), "a word")
    once = Counter(dict.fromkeys(hosts.workers, 1))
    assert hosts.said("away") - away == once
    assert hosts.said("back") - back == once
    assert chatty.head()[0] == 200
    assert b"error" not in chatty.body()


def test_redis_stops_answering(hosts: Hosts, session: str) -> None:
    """Case 29: CLIENT PAUSE. Nobody waits for long, no answer is false; then all works again."""
    away, back = hosts.said("away"), hosts.said("back")
    owner = hosts.a.worker()
    for name in ("first", "second", "local"):
        begin(hosts.a, f"{session}.{name}", at=owner)
    hosts.redis.command("CLIENT", "PAUSE", 3000)
    for name in ("first", "second", "never-heard-of"):
        took, (status, answer, _) = timed(lambda name=name: hosts.b.cancel(f"{session}.{name}"))
        assert (status, answer) in ((503, UNAVAILABLE), (504, UNCONFIRMED))
        assert took < 3
    assert_cancel_stops(hosts.a, f"{session}.local", at=owner)
    took, _ = timed(lambda: begin(hosts.b, f"{session}.new"))
    assert took < 3
    eventually(lambda: hosts.joined() and hosts.said("away") != away, "it is back")
    for name in ("first", "second"):
        eventually(lambda name=name: hosts.b.cancel(f"{session}.{name}")[0] in (200, 404), "a word")
        assert not is_open(hosts.a, f"{session}.{name}")
        assert "aborted by client/cancel" in hosts.a.server.ending_of(f"{session}.{name}")
    assert_cancel_stops(hosts.a, f"{session}.new")
    assert set((hosts.said("away") - away).values()) == {1}
    assert hosts.said("away") - away == hosts.said("back") - back


@pytest.mark.parametrize("worker_class", ["gthread"])
def test_redis_comes_late(hosts: Hosts, tmp_path: Path, session: str) -> None:
    """A gunicorn that starts while there is no Redis serves, and joins when there is one."""
    hosts.redis.stop()
    eventually(lambda: not hosts.joined(), "it is missed")
    try:
        server = Server(
            tmp_path / "late.log",
            CHATSTREAM_UPSTREAM_URL=hosts.provider.url,
            CHATSTREAM_BUS=hosts.redis.url,
        )
    finally:
        hosts.redis.start()
    late = Fleet(server, hosts.provider, hosts.redis.port)
    try:
        begin(late, session)
        begin(late, f"{session}.2")
        eventually(hosts.joined, "the others are back")
        eventually(lambda: hosts.a.cancel(session)[0] == 200, "it has joined")
        assert not is_open(late, session)
        assert_cancel_stops(hosts.b, f"{session}.2")
    finally:
        late.close_clients()
        server.stop()


def listeners(hosts: Hosts) -> dict[str, int]:
    """The connections on which workers wait for mail, and their ages in seconds."""
    with contextlib.closing(hosts.redis.client(decode_responses=True)) as client:
        found = client.client_list()
    return {entry["id"]: int(entry["age"]) for entry in found if entry["cmd"] == "xread"}


def entries(hosts: Hosts) -> set[str]:
    """The keys of live streams."""
    with contextlib.closing(hosts.redis.client(decode_responses=True)) as client:
        found = {key: client.get(key) or "gone" for key in client.keys("*:s[et]*:*")}
    return {key for key, value in found.items() if not value.startswith("gone")}


def test_a_long_silence_changes_nothing(pairs: Pairs, session: str) -> None:
    """Cases 29 and 34: no listener gives up, as redis-py 8 does after 5 s if it is let, and no
    entry expires while its worker lives; a stop still arrives."""
    assert TTL < 7
    begun = []
    for hosts in map(pairs, ("gthread", "gevent")):
        for fleet in hosts.both:
            fleet.ready()
        eventually(lambda hosts=hosts: not entries(hosts), "nothing left of others")
        begin(hosts.a, session)
        waiting = eventually(lambda hosts=hosts: len(listeners(hosts)) == 4 and listeners(hosts))
        begun.append((hosts, hosts.said("away"), entries(hosts), waiting))
    for hosts, away, kept, waiting in begun:

        def idle(hosts: Hosts = hosts, waiting: dict[str, int] = waiting) -> bool:
            now = listeners(hosts)
            return all(now.get(name, 0) >= age + 7 for name, age in waiting.items())

        eventually(idle, "7 s of silence on the same connections", 20)
        assert entries(hosts) == kept
        assert len(kept) == 2
        assert_cancel_stops(hosts.b, session)
        assert hosts.said("away") == away
        eventually(lambda hosts=hosts: not entries(hosts), "nothing left")
        for fleet in hosts.both:
            fleet.check_leaks()
