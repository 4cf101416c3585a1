"""Where it happens: two gunicorns as two hosts, a Redis and a provider, each a process."""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import eventually
from tests.integration.chaos.plan import SEND_TIMEOUT, Shock
from tests.integration.conftest import Fleet
from tests.integration.processes import ROOT, Provider, Server, is_running, tcp
from tests.redis_server import RedisServer

WORKERS = 2  # of each host
THREADS = 64
TTL = 3.0
IDLE_TIMEOUT = 3.0
HEADERS_TIMEOUT = 3.5
DRAIN = 1.0
SECOND = 1_000_000_000  # ns

AFTER_KILL = 2.0
"""Seconds until all connections of a worker that was killed are known to be broken; and more."""

AFTER_REDIS = 2.5 + 0.5
"""Seconds until Redis is there for all: a listener's longest pause and attempt; and some more."""

AFTER_LOSS = AFTER_REDIS + 4.0 + 0.5
"""The same where the data was lost, and "not found" is a 503 until all can have put theirs back."""

_OVERSLEPT = 0.02  # seconds


class Window(NamedTuple):
    """A stretch in which a shock may show."""

    kind: str
    begin_ns: int
    end_ns: int


class Canary:
    """How late this machine is: a thread that sleeps for a moment and looks at the clock."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._late: list[tuple[int, int]] = []  # instant, ns too late
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic_ns()
        while not self._over.is_set():
            due += int(_OVERSLEPT * SECOND)
            self._over.wait(_OVERSLEPT)
            now = time.monotonic_ns()
            if now - due > _OVERSLEPT * SECOND:
                self._late.append((now, now - due))
            due = now

    def late_ns(self, begin_ns: int, end_ns: int) -> int:
        """The worst of what was slept too long between two instants."""
        first = bisect.bisect_left(self._late, (begin_ns, 0))
        found = [late for at, late in self._late[first:] if at - late <= end_ns]
        return max(found, default=0)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class FarProvider(Provider):
    """A simulator in a process of its own: its stamps do not wait for this one's threads."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "chatstream.simulator", "--port", "0", "--quiet"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        match = re.search(r"http://127\.0\.0\.1:(\d+)", self._process.stdout.readline())
        assert match, "the simulator did not start"
        self.port = int(match[1])
        self.scheme = "http"
        self._context = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/v1/chat/completions"

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Stage:
    """Two hosts, their Redis and their provider; what befell them."""

    def __init__(
        self, hosts: tuple[Fleet, Fleet], redis: RedisServer, provider: Provider, canary: Canary
    ) -> None:
        self.hosts = hosts
        self.redis = redis
        self.provider = provider
        self.canary = canary
        self.windows: list[Window] = []
        self.killed: set[int] = set()
        self.terminated: set[int] = set()
        self._said = dict.fromkeys(self.hosts, 0)

    def log(self) -> str:
        """What the hosts have said since `ready`."""
        return "".join(fleet.server.log()[said:] for fleet, said in self._said.items())

    # Shocks

    def befall(self, shock: Shock) -> None:
        """Does it, and waits until it is over; its window reaches further."""
        begin = time.monotonic_ns()
        if shock.kind in ("kill", "term"):
            self._end_worker(shock)
            after = AFTER_KILL
        else:
            {
                "redis kill": self._restart_redis,
                "redis term": self._restart_redis,
                "redis pause": self._pause_redis,
                "redis freeze": self._freeze_redis,
            }[shock.kind](shock)
            after = AFTER_LOSS if shock.kind in ("redis kill", "redis term") else AFTER_REDIS
        end = time.monotonic_ns() + int(after * SECOND)
        self.windows.append(Window(shock.kind, begin, end))

    def _end_worker(self, shock: Shock) -> None:
        workers = self.hosts[shock.pick % 2].server.workers
        pid = workers[shock.pick // 2 % len(workers)]
        how = signal.SIGKILL if shock.kind == "kill" else signal.SIGTERM
        (self.killed if shock.kind == "kill" else self.terminated).add(pid)
        os.kill(pid, how)

    def _restart_redis(self, shock: Shock) -> None:
        if shock.kind == "redis term":
            self.redis.process.terminate()
        else:
            self.redis.process.kill()
        self.redis.process.wait(10)
        time.sleep(shock.seconds)  # it is away so long
        self.redis.start()

    def _pause_redis(self, shock: Shock) -> None:
        self.redis.command("CLIENT", "PAUSE", int(shock.seconds * 1000))
        time.sleep(shock.seconds)

    def _freeze_redis(self, shock: Shock) -> None:
        self.redis.process.send_signal(signal.SIGSTOP)
        time.sleep(shock.seconds)
        self.redis.process.send_signal(signal.SIGCONT)

    def shocks_between(self, begin_ns: int, end_ns: int, of: str = "") -> list[Window]:
        """The windows, of that kind ("redis": any of Redis), that reach into this stretch."""
        return [
            window
            for window in self.windows
            if window.begin_ns <= end_ns and begin_ns <= window.end_ns
            if not of or of in (window.kind, window.kind.split()[0])
        ]

    # Before and after

    def ready(self) -> None:
        """Every worker warm, Redis there with its data for long; what has been is forgotten."""
        self.redis.command("SET", "chatstream:since", 0)
        for fleet in self.hosts:
            fleet.ready()
        self.windows.clear()
        self._said = {fleet: len(fleet.server.log()) for fleet in self.hosts}
        forget = urllib.request.Request(
            f"http://127.0.0.1:{self.provider.port}/requests", method="DELETE"
        )
        urllib.request.urlopen(forget, timeout=20).close()

    def check_rest(self) -> None:
        """Fails unless everything that a run took is given back."""
        for fleet in self.hosts:
            eventually(lambda fleet=fleet: len(fleet.server.workers) == WORKERS, "all workers", 20)
            fleet.expect_of_the_new()
            fleet.check_leaks()
            for pid in fleet.server.workers:
                threads = len(os.listdir(f"/proc/{pid}/task"))
                assert threads <= THREADS + 8, f"{threads} threads in {pid}"
        eventually(lambda: not self._half_closed(), "no connection that only we keep")
        eventually(lambda: not self.entries(), "no entry in Redis", TTL + 10)

    def _half_closed(self) -> list[int]:
        """Connections to the provider or Redis that their other side has closed.

        One that was swept is closed by its worker's next stream.
        """
        found = [
            port
            for remote in (self.provider.port, self.redis.port)
            for port in tcp("CLOSE_WAIT", remote=remote)
        ]
        if found:
            for fleet in self.hosts:
                fleet.stream_through()
        return found

    def entries(self) -> dict[str, str]:
        """What is in Redis and should not be, once nothing is live.

        By design there are, each with a time to live, markers of streams that have been ("gone"),
        early cancels, the workers' names, and the empty or unread mailboxes of those that were
        killed; and `since`, which has none.
        """
        left: dict[str, str] = {}
        with contextlib.closing(self.redis.client(decode_responses=True)) as client:
            alive = {
                key.rpartition(":")[2]
                for key in client.keys("chatstream:worker:*")
                if is_running(int((client.get(key) or "0").split()[0]))
            }
            for key in client.scan_iter():
                _, kind, *name = key.split(":")
                if kind != "since" and client.pttl(key) == -1:
                    left[key] = "it never expires"
                elif kind in ("session", "stream"):
                    value = client.get(key) or "gone"
                    if not value.startswith("gone "):
                        left[key] = value
                elif kind == "mail" and name[0] in alive and client.xlen(key):
                    left[key] = f"{client.xlen(key)} messages unread"
                elif kind not in ("since", "early", "worker", "workers", "mail"):
                    left[key] = "what is it?"
        return left


@contextlib.contextmanager
def stage(worker_class: str, folder: Path) -> Iterator[Stage]:
    """A stage of that worker class; its logs go to `folder`."""
    with contextlib.ExitStack() as stack:
        redis = RedisServer(folder)
        stack.callback(redis.stop)
        provider = stack.enter_context(contextlib.closing(FarProvider()))
        servers = [
            Server(
                folder / f"{worker_class}-{name}.log",
                app="tests.integration.chaos.app:app",
                CHATSTREAM_WORKER_CLASS=worker_class,
                CHATSTREAM_THREADS=str(THREADS),
                CHATSTREAM_UPSTREAM_URL=provider.url,
                CHATSTREAM_UPSTREAM_IDLE_TIMEOUT=str(IDLE_TIMEOUT),
                CHATSTREAM_UPSTREAM_HEADERS_TIMEOUT=str(HEADERS_TIMEOUT),
                CHATSTREAM_PING_INTERVAL="0.4",
                CHATSTREAM_SEND_TIMEOUT=str(SEND_TIMEOUT),
                CHATSTREAM_DRAIN=str(DRAIN),
                CHATSTREAM_BUS=redis.url,
                CHATSTREAM_BUS_TTL=str(TTL),
                WEB_CONCURRENCY=str(WORKERS),
            )
            for name in "ab"
        ]
        for server in servers:
            stack.callback(server.stop)
        canary = stack.enter_context(contextlib.closing(Canary()))
        one, two = (Fleet(server, provider, redis.port) for server in servers)
        yield Stage((one, two), redis, provider, canary)
        for server in servers:
            server.terminate()  # all at once; `stop` then waits for each
