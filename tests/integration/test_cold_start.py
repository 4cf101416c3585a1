"""Hosts that have just been started, joined by one Redis: their workers find each other unasked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually, require
from tests.integration.conftest import Fleet
from tests.integration.processes import Provider, Server
from tests.integration.test_workers import assert_cancel_stops, begin
from tests.redis_server import RedisServer

UNAVAILABLE = {"ok": False, "reason": "bus_unavailable"}


def workers_on_the_bus(redis: RedisServer) -> list[int]:
    """The pids of those that can be found."""
    with contextlib.closing(redis.client(decode_responses=True)) as client:
        return [int(client.get(key).split()[0]) for key in client.keys("*:worker:*")]


class Cold:
    """Hosts of which nobody has been asked anything: they are found by their logs alone."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, **environ: str) -> None:
        self.redis = RedisServer(folder)
        stack.callback(self.redis.stop)
        self.provider = stack.enter_context(contextlib.closing(Provider()))
        self._folder = folder
        self._stack = stack
        self._environ = environ

    def host(self, name: str, *options: str) -> Fleet:
        server = Server(
            self._folder / name,
            *options,
            asks=False,
            WEB_CONCURRENCY="1",
            CHATSTREAM_UPSTREAM_URL=self.provider.url,
            CHATSTREAM_BUS=self.redis.url,
            **self._environ,
        )
        self._stack.callback(server.stop)
        fleet = Fleet(server, self.provider, self.redis.port)
        self._stack.callback(fleet.close_clients)
        return fleet


@pytest.fixture
def cold(tmp_path: Path, worker_class: str) -> Iterator[Cold]:
    require("redis-server")
    with contextlib.ExitStack() as stack:
        yield Cold(tmp_path, stack, CHATSTREAM_WORKER_CLASS=worker_class)


def test_workers_join_when_they_start(cold: Cold) -> None:
    """Not with their first request, which would have to wait for that; also with preload_app."""
    hosts = [cold.host("a"), cold.host("b", "--preload")]
    started = {pid for fleet in hosts for pid in fleet.server.workers}
    eventually(lambda: set(workers_on_the_bus(cold.redis)) == started, "all on the bus, unasked")


def test_a_cancel_that_is_a_hosts_first_request_stops(cold: Cold) -> None:
    """A 200 that means it, in a service that has just begun: 503 is for what is not found."""
    here = cold.host("here")
    begin(here, "s")
    cold.redis.command("SET", "chatstream:since", 2**53)  # for as long as the test may take
    there = cold.host("there")
    assert_cancel_stops(there, "s")
    assert "aborted by client/cancel cause=cancel" in here.server.ending_of("s")
    assert there.cancel("never-heard-of")[:2] == (503, UNAVAILABLE)
