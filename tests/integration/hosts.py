"""Two gunicorns joined by one Redis."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import eventually, require
from tests.integration.conftest import Fleet
from tests.integration.processes import Provider, Server
from tests.redis_server import RedisServer

TTL = 3.0
"""Seconds that what a killed worker left is kept: short, so that it can be awaited."""


@dataclass
class Hosts:
    """Two gunicorns of two workers each, and the Redis that they share."""

    a: Fleet
    b: Fleet
    redis: RedisServer

    @property
    def both(self) -> tuple[Fleet, Fleet]:
        return self.a, self.b

    @property
    def provider(self) -> Provider:
        return self.a.provider

    def said(self, word: str) -> Counter[int]:
        """How often each worker has said that Redis is away, or is back."""
        pattern = rf"WARNING \[(\d+)\] \[bus\] redis is {word}"
        logs = "".join(fleet.server.log() for fleet in self.both)
        return Counter(map(int, re.findall(pattern, logs)))

    @property
    def workers(self) -> list[int]:
        return [pid for fleet in self.both for pid in fleet.server.workers]

    def joined(self) -> bool:
        """Whether no worker says that Redis is away, by its last word."""
        away, back = self.said("away"), self.said("back")
        return all(away[pid] == back[pid] for pid in self.workers)


class Pairs:
    """Hosts, started when first asked for."""

    def __init__(
        self, folders: pytest.TempPathFactory, stack: contextlib.ExitStack, **environ: str
    ) -> None:
        self._environ = environ
        self._folders = folders
        self._stack = stack
        self._made: dict[str, Hosts] = {}

    def __call__(self, worker_class: str) -> Hosts:
        if worker_class not in self._made:
            self._made[worker_class] = self._make(worker_class)
        return self._made[worker_class]

    def _make(self, worker_class: str) -> Hosts:
        folder = self._folders.mktemp("hosts")
        redis = RedisServer(folder)
        self._stack.callback(redis.stop)
        provider = self._stack.enter_context(contextlib.closing(Provider()))
        fleets = [self._fleet(folder / name, provider, redis, worker_class) for name in "ab"]
        return Hosts(*fleets, redis)

    def _fleet(self, log: Path, provider: Provider, redis: RedisServer, kind: str) -> Fleet:
        server = Server(
            log,
            CHATSTREAM_WORKER_CLASS=kind,
            CHATSTREAM_UPSTREAM_URL=provider.url,
            CHATSTREAM_BUS=redis.url,
            CHATSTREAM_BUS_TTL=str(TTL),
            WEB_CONCURRENCY="2",
            **self._environ,
        )
        self._stack.callback(server.stop)
        fleet = Fleet(server, provider, redis.port)
        self._stack.callback(fleet.close_clients)
        return fleet

    def terminate(self) -> None:
        for hosts in self._made.values():
            for fleet in hosts.both:
                fleet.close_clients()
                fleet.server.terminate()  # all at once; `stop` then waits for each


@contextlib.contextmanager
def starting(folders: pytest.TempPathFactory, **environ: str) -> Iterator[Pairs]:
    """Hosts of one module, with more in their environment."""
    require("redis-server")
    with contextlib.ExitStack() as stack:
        pairs = Pairs(folders, stack, **environ)
        yield pairs
        pairs.terminate()


@contextlib.contextmanager
def left_at_rest(hosts: Hosts) -> Iterator[Hosts]:
    """Two hosts with Redis there, left so and at rest. Its Redis is this module's alone."""
    for fleet in hosts.both:
        fleet.ready()
    hosts.redis.command("SET", "chatstream:since", 0)  # it has long had its data
    yield hosts
    for fleet in hosts.both:
        fleet.close_clients()
    for fleet in hosts.both:
        fleet.check_leaks()
    eventually(hosts.joined, "Redis is there for everybody")
