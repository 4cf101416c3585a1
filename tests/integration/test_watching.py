"""Who watches over many workers, over HTTP: what lives, a stop of all, who is ready."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from tests.integration.conftest import Fleet
from tests.integration.fleets import begin, is_open
from tests.integration.hosts import Hosts, Pairs, left_at_rest, starting
from tests.integration.processes import Provider, is_running
from tests.integration.servers import run
from tests.integration.test_ending import begin as begin_at
from tests.integration.test_ending import draining

SESSIONS, CANCEL_ALL = "/api/chat/sessions", "/api/chat/cancel-all"

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    with starting(tmp_path_factory, CHATSTREAM_HEALTH="/") as pairs:
        yield pairs


@pytest.fixture
def hosts(pairs: Pairs, worker_class: str) -> Iterator[Hosts]:
    with left_at_rest(pairs(worker_class)) as hosts:
        yield hosts


def asked(fleet: Fleet, method: str, path: str, **headers: str) -> tuple[int, Any]:
    status, body = fleet.server.ask(method, path, **headers)
    return status, json.loads(body)


@contextlib.contextmanager
def everywhere(hosts: Hosts) -> Iterator[tuple[str, dict[str, str]]]:
    """A stream of a user in each worker of each host, and one of another's. Yields user, owners."""
    user = f"user-{next(numbers)}"
    owners = {}
    for fleet, number in itertools.product(hosts.both, (0, 1)):
        at = fleet.server.workers[number]
        session = f"{user}-{at}"
        begin(fleet, session, at=at, X_User=user)
        owners[session] = user
    other = f"other-{user}"
    begin(hosts.b, other, X_User=other)
    owners[other] = other
    yield user, owners
    asked(hosts.a, "POST", f"{CANCEL_ALL}?all=1", X_Admin="yes")


def test_what_lives_on_every_host(hosts: Hosts) -> None:
    """One's own, wherever one asks; everybody's for an admin, with owner and worker."""
    with everywhere(hosts) as (user, owners):
        mine = {session for session, owner in owners.items() if owner == user}
        for fleet in hosts.both:
            status, answer = asked(fleet, "GET", SESSIONS, X_User=user)
            assert (status, answer["complete"]) == (200, True)
            assert {one["sessionId"] for one in answer["sessions"]} == mine
            assert {one["phase"] for one in answer["sessions"]} == {"body"}
            assert asked(fleet, "GET", f"{SESSIONS}?all=1", X_User=user)[0] == 403
            status, answer = asked(fleet, "GET", f"{SESSIONS}?all=1", X_Admin="yes")
            seen = {one["sessionId"]: one["owner"] for one in answer["sessions"]}
            assert owners.items() <= seen.items()
            assert {one["pid"] for one in answer["sessions"]} >= {
                int(name.rpartition("-")[2]) for name in mine
            }


def test_all_of_ones_own_are_stopped_on_every_host(hosts: Hosts) -> None:
    """By any worker; when it is answered, the providers' connections are closed. Nobody else's."""
    with everywhere(hosts) as (user, owners):
        status, answer = asked(hosts.a, "POST", CANCEL_ALL, X_User=user)
        still_open = [name for name in owners if is_open(hosts.a, name)]
        assert (status, answer) == (200, {"ok": True, "cancelled": 4})
        assert still_open == [f"other-{user}"]
        assert asked(hosts.b, "POST", f"{CANCEL_ALL}?owner=other-{user}", X_User=user)[0] == 403
        assert is_open(hosts.b, f"other-{user}")
        for name in set(owners) - set(still_open):
            log = "".join(fleet.server.log() for fleet in hosts.both)
            eventually(lambda log=log, name=name: f"{name} aborted by client/cancel" in log)  # type: ignore[misc]


def test_who_is_ready_while_redis_comes_and_goes(hosts: Hosts) -> None:
    """Without it a cancel cannot be sure, so new streams had better go elsewhere; all are alive."""
    assert asked(hosts.a, "GET", "/readyz") == (200, {"ok": True})
    hosts.redis.stop()
    try:
        status, answer = asked(hosts.a, "GET", "/readyz")
        assert (status, answer["reason"]) == (503, "bus_unavailable")
        assert asked(hosts.a, "GET", "/healthz") == (200, {"ok": True})
    finally:
        hosts.redis.start()
        hosts.redis.command("SET", "chatstream:since", 0)
    for fleet in hosts.both:
        eventually(lambda fleet=fleet: asked(fleet, "GET", "/readyz")[0] == 200, "ready again")  # type: ignore[misc]


def test_who_drains_is_not_ready(tmp_path: Path, provider: Provider) -> None:
    """It still answers (here under waitress, which takes connections until it ends)."""
    kind = draining("waitress")
    clocks = {"CHATSTREAM_DRAIN": "60", "CHATSTREAM_HEALTH": "/"}
    with run(kind, tmp_path / "log", provider, **clocks) as rig:
        silent = begin_at(rig, "silent", silent_after=1)
        assert rig.server.get("/readyz")[0] == 200
        rig.server.terminate()
        eventually(lambda: rig.server.get("/readyz")[0] == 503, "its word")
        status, body = rig.server.get("/readyz")
        assert (status, json.loads(body)["reason"]) == (503, "shutting_down")
        assert rig.server.get("/healthz")[0] == 200
        assert rig.server.cancel("silent") == (200, {"ok": True, "cancelled": True})
        silent.close()
        eventually(lambda: not is_running(rig.server.pid), "its end")
