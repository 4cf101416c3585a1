"""How many live streams an owner may have, and a stop of all: over workers, and over hosts."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Fleet, Rig
from tests.integration.fleets import begin, hanging, is_open
from tests.integration.hosts import Hosts, Pairs, left_at_rest, starting
from tests.integration.processes import is_running
from tests.integration.scenes import SCENES

LIMIT = "2"

numbers = itertools.count(1)


@pytest.fixture
def owner() -> str:
    """A user of the test's own, and the beginning of its sessions' names."""
    return f"limit-{next(numbers)}"


@pytest.fixture
def fleet(rigs: Callable[..., Fleet], worker_class: str) -> Iterator[Fleet]:
    """Four workers in which a user may have two streams, left at rest."""
    environ = {"WEB_CONCURRENCY": "4", "CHATSTREAM_MAX_STREAMS_PER_OWNER": LIMIT}
    fleet = rigs("fleet", worker_class, **environ)
    fleet.ready()
    yield fleet
    fleet.check_leaks()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    with starting(tmp_path_factory, CHATSTREAM_MAX_STREAMS_PER_OWNER=LIMIT) as pairs:
        yield pairs


@pytest.fixture
def hosts(pairs: Pairs, worker_class: str) -> Iterator[Hosts]:
    with left_at_rest(pairs(worker_class)) as hosts:
        yield hosts


def ask(fleet: Rig, owner: str, session: str, at: int | None = None) -> tuple[Client, int]:
    """Begins a stream; returns its status."""
    client = fleet.client_of(at) if at and isinstance(fleet, Fleet) else fleet.client()
    client.post(session, headers={"X-User": owner}, simulate={"id": session, **SCENES["silent"]})
    return client, client.head()[0]


def refusal(fleet: Rig, owner: str, session: str) -> tuple[int, str | None, dict[str, Any]]:
    """Asks for a stream that is refused: status, Retry-After, body."""
    client = fleet.client()
    client.post(session, headers={"X-User": owner}, simulate={"id": session})
    status, headers = client.head()
    body = client.exactly(int(headers["content-length"]))
    return status, headers.get("retry-after"), json.loads(body)


def cancel_all(fleet: Rig, owner: str) -> dict[int, list[Any]]:
    """By each worker's pid: whether it answered, and the sessions that it stopped."""
    status, body = fleet.server.ask("POST", f"/debug/cancel-all/{owner}", b"")
    assert status == 200
    return {int(pid): found for pid, found in json.loads(body).items()}


# The limit


def test_one_more_is_a_429_that_says_what_to_do(fleet: Fleet, owner: str) -> None:
    """Whichever worker is asked. Another user has nothing to do with it."""
    one, other = fleet.server.workers[:2]
    begin(fleet, f"{owner}.1", at=one, X_User=owner)
    begin(fleet, f"{owner}.2", at=other, X_User=owner)
    for at in fleet.server.workers:
        assert ask(fleet, owner, f"{owner}.3", at)[1] == 429
    status, retry_after, body = refusal(fleet, owner, f"{owner}.3")
    assert (status, retry_after) == (429, "1")
    assert body == {
        "ok": False,
        "reason": "too_many_streams",
        "message": "You have 2 answers running. Stop one of them first, or wait.",
    }
    assert ask(fleet, f"{owner}-not", f"{owner}.4")[1] == 200
    assert is_open(fleet, f"{owner}.1")
    assert is_open(fleet, f"{owner}.2")
    assert f"{owner}.3" not in fleet.provider.names()


def test_of_many_at_once_so_many_run(fleet: Fleet, owner: str) -> None:
    """Forty at once, to whichever worker takes them."""
    with ThreadPoolExecutor(40) as pool:
        statuses = [
            status for _, status in pool.map(lambda n: ask(fleet, owner, f"{owner}.{n}"), range(40))
        ]
    assert Counter(statuses) == {200: 2, 429: 38}


def test_who_pressed_stop_can_ask_at_once(fleet: Fleet, owner: str) -> None:
    """Though the stopped stream's client does not take its end, nor anything else, for seconds."""
    begin(fleet, f"{owner}.other", X_User=owner)
    stopped = None
    for turn, at in enumerate(fleet.server.workers * 2):
        session, elsewhere = f"{owner}.{turn}", fleet.worker(at)
        client = fleet.client_of(at, receive_buffer=4096)
        more = fleet.client()
        if stopped:
            assert fleet.cancel(stopped, at=elsewhere, X_User=owner)[0] == 200
        flood = {"id": session, "tokens": 100_000, "rate": 0, "pad": 2000}
        client.post(session, headers={"X-User": owner}, simulate=flood)
        assert client.head()[0] == 200
        more.post(f"{owner}.more", headers={"X-User": owner})
        assert more.head()[0] == 429
        stopped = session


def test_a_session_that_asks_again_has_its_place(fleet: Fleet, owner: str) -> None:
    """Wherever it was: the superseded stream does not count."""
    begin(fleet, f"{owner}.other", X_User=owner)
    for at in [*fleet.server.workers, *reversed(fleet.server.workers)]:
        assert ask(fleet, owner, f"{owner}.s", at)[1] == 200
        assert refusal(fleet, owner, f"{owner}.more")[0] == 429
    assert is_open(fleet, f"{owner}.other")


def test_a_killed_workers_streams_do_not_count(fleet: Fleet, owner: str) -> None:
    """From that moment on: the kernel has taken their places back."""
    victim, before = fleet.worker(), fleet.server.workers
    for number in range(2):
        begin(fleet, f"{owner}.{number}", at=victim, X_User=owner)
    assert refusal(fleet, owner, f"{owner}.more")[0] == 429
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: not is_running(victim), "its end")
    at = fleet.worker(victim)
    assert [ask(fleet, owner, f"{owner}.{number}", at)[1] for number in (2, 3, 4)] == [
        200,
        200,
        429,
    ]
    eventually(lambda: set(fleet.server.workers) - set(before), "a new worker")
    fleet.expect_of_the_new()


def test_one_process_alone_keeps_to_it(
    rigs: Callable[..., Rig], worker_class: str, owner: str
) -> None:
    """With the bus of one process, under every mover."""
    environ = {"CHATSTREAM_BUS": "local", "CHATSTREAM_MAX_STREAMS_PER_OWNER": "1"}
    rig = rigs("plain", worker_class, **environ)
    for number in range(10):
        assert ask(rig, owner, f"{owner}.{number % 2}")[1] == 200
        assert refusal(rig, owner, f"{owner}.more")[0] == 429
        if number % 3:
            assert ask(rig, owner, f"{owner}.{number % 2}")[1] == 200
        path = f"/api/chat/cancel/{owner}.{number % 2}"
        assert rig.server.ask("POST", path, X_User=owner)[0] == 200
    rig.check_leaks()


# Over hosts


def test_the_limit_holds_over_hosts(hosts: Hosts, owner: str) -> None:
    """One more is a 429 at either; who stops one at the other host can ask at once."""
    begin(hosts.a, f"{owner}.1", X_User=owner)
    begin(hosts.b, f"{owner}.2", X_User=owner)
    for fleet in hosts.both:
        status, retry_after, body = refusal(fleet, owner, f"{owner}.3")
        assert (status, retry_after, body["reason"]) == (429, "1", "too_many_streams")
    assert hosts.b.cancel(f"{owner}.1", X_User=owner)[0] == 200
    assert ask(hosts.b, owner, f"{owner}.3")[1] == 200
    for fleet in hosts.both:
        assert refusal(fleet, owner, f"{owner}.4")[0] == 429
    for fleet in (*hosts.both, *hosts.both):
        assert ask(fleet, owner, f"{owner}.3")[1] == 200
    assert refusal(hosts.a, owner, f"{owner}.4")[0] == 429


def test_of_many_at_once_over_hosts_so_many_run(hosts: Hosts, owner: str) -> None:
    """Twenty at each."""
    with ThreadPoolExecutor(40) as pool:
        found = pool.map(lambda n: ask(hosts.both[n % 2], owner, f"{owner}.{n}"), range(40))
        assert Counter(status for _, status in found) == {200: 2, 429: 38}


@pytest.mark.parametrize("worker_class", ["gthread"])
def test_a_killed_workers_streams_count_until_they_expire(hosts: Hosts, owner: str) -> None:
    """Redis cannot know earlier."""
    victim, before = hosts.a.worker(), hosts.a.server.workers
    for number in range(2):
        begin(hosts.a, f"{owner}.{number}", at=victim, X_User=owner)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: not is_running(victim), "its end")
    assert refusal(hosts.b, owner, f"{owner}.more")[0] == 429
    eventually(lambda: ask(hosts.b, owner, f"{owner}.new")[1] == 200, "a place")
    eventually(lambda: set(hosts.a.server.workers) - set(before), "a new worker")
    hosts.a.expect_of_the_new()


# A stop of all


def test_all_of_ones_own_are_stopped_in_all_workers(fleet: Fleet, owner: str) -> None:
    """When it is answered they have ended; another user's go on."""
    one, other = fleet.server.workers[:2]
    begin(fleet, f"{owner}.1", at=one, X_User=owner)
    begin(fleet, f"{owner}.2", at=other, X_User=owner)
    begin(fleet, f"{owner}.not", at=one, X_User=f"{owner}-not")
    found = cancel_all(fleet, owner)
    still_open = [number for number in (1, 2) if is_open(fleet, f"{owner}.{number}")]
    assert still_open == []
    assert found[one] == [True, [f"{owner}.1"]]
    assert found[other] == [True, [f"{owner}.2"]]
    assert all(each == [True, []] for pid, each in found.items() if pid not in (one, other))
    for number in (1, 2):
        ending = fleet.server.ending_of(f"{owner}.{number}")
        assert "aborted by client/cancel cause=cancel" in ending
    assert is_open(fleet, f"{owner}.not")
    assert [ask(fleet, owner, f"{owner}.{number}")[1] for number in (3, 4)] == [200, 200]


def test_a_worker_that_hangs_keeps_no_other_from_stopping(fleet: Fleet, owner: str) -> None:
    """Case 27: it is named, and what it had is stopped when it wakes."""
    one, other = fleet.server.workers[:2]
    begin(fleet, f"{owner}.1", at=one, X_User=owner)
    begin(fleet, f"{owner}.2", at=other, X_User=owner)
    client = fleet.client_of(other)
    with hanging(one):
        status, _, body = client.ask("POST", f"/debug/cancel-all/{owner}")
        assert status == 200
        found = json.loads(body)
        assert found[str(one)] == [False, []]
        assert found[str(other)] == [True, [f"{owner}.2"]]
        assert not is_open(fleet, f"{owner}.2")
    eventually(lambda: not is_open(fleet, f"{owner}.1"), "its end")
    assert "cause=cancel" in fleet.server.ending_of(f"{owner}.1")


def test_all_of_ones_own_are_stopped_at_all_hosts(hosts: Hosts, owner: str) -> None:
    """Whichever host is asked."""
    for fleet in hosts.both:
        begin(hosts.a, f"{owner}.1", X_User=owner)
        begin(hosts.b, f"{owner}.2", X_User=owner)
        found = cancel_all(fleet, owner)
        assert not is_open(hosts.a, f"{owner}.1")
        assert not is_open(hosts.b, f"{owner}.2")
        stopped = {name: pid for pid, (_, names) in found.items() for name in names}
        assert set(stopped) == {f"{owner}.1", f"{owner}.2"}
        assert stopped[f"{owner}.1"] in hosts.a.server.workers
        assert stopped[f"{owner}.2"] in hosts.b.server.workers
