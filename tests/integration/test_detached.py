"""Streams that hold no thread: many more of them than there are, in one real worker."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatstream.upstream.threads import KEPT
from tests.conftest import eventually
from tests.integration.client import SHUT_DOWN, Client
from tests.integration.conftest import Certificate, Rig, serving
from tests.integration.processes import Provider, ends, is_running

THREADS = 8
MANY = 100
"""Streams at a time: of these threads each would have a dozen."""

Rigs = Callable[..., Rig]


@pytest.fixture
def rig(rigs: Rigs) -> Iterator[Rig]:
    """A server whose threads are few, left as it was found."""
    rig = rigs("plain", "gthread", CHATSTREAM_THREADS=str(THREADS))
    yield rig
    rig.check_leaks()


@contextlib.contextmanager
def few_threads(log: Path, provider: Provider, *options: str, **more: object) -> Iterator[Rig]:
    """A server of a test's own, with a few threads, and no error in its log."""
    with serving(log, provider, *options, CHATSTREAM_THREADS=str(THREADS), **more) as rig:
        yield rig
        assert rig.server.errors() == []


def crowd(rig: Rig, prefix: str, count: int = MANY, **simulate: object) -> list[Client]:
    """So many streams, each of which has begun. Others than detached ones could not have."""
    clients = []
    for number in range(count):
        name = f"{prefix}-{number}"
        clients.append(rig.client().post(name, simulate={"id": name, **simulate}))
    for client in clients:
        client.until(b'"content"')
        client.head()
    assert rig.server.debug()["live"] == count > THREADS
    return clients


def test_a_hundred_streams_on_eight_threads(rig: Rig) -> None:
    """All get all of their events, and nothing is late for it: pages and cancels are answered.

    Their connections go on: for a page that was asked for meanwhile, or for the next stream.
    """
    clients = crowd(rig, "all", rate=10, tokens=50)
    get = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
    early = clients[MANY // 2 :]
    for client in early:
        client.sock.sendall(get)
    before = time.monotonic()
    assert rig.server.get("/hello") == (200, b"hello")
    assert rig.server.cancel("all-7")[0] == 200
    assert time.monotonic() - before < 2
    assert rig.provider.request("all-7", "closed")["closed_by"] == "client"
    for number, client in enumerate(clients[: MANY // 2]):
        body = client.body()
        assert body.endswith(b"data: [DONE]\n\n") == (number != 7)
        assert (body.count(b'"content"') == 50) == (number != 7)
        assert client.ask("GET", "/hello")[2] == b"hello"
        client.post(f"next-{number}", simulate={"tokens": 1, "rate": 100})
        client.head()
        assert client.body().endswith(b"data: [DONE]\n\n")
    for client in early:
        client.until(b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert " cause=cancel " in rig.server.ending_of("all-7")
    for number in (0, MANY - 1):
        assert " completed " in rig.server.ending_of(f"all-{number}")


def test_its_threads_are_few(rig: Rig) -> None:
    """The kernel's count: the pool, the loop, the main one, those that called; not one a stream."""
    crowd(rig, "few", rate=10, tokens=5000)
    eventually(lambda: rig.server.debug()["calls"] == [], "the end of all calls")
    tasks = os.listdir(f"/proc/{rig.server.worker}/task")
    assert len(tasks) <= THREADS + KEPT + 4


def test_a_hundred_clients_leave_at_once(rig: Rig) -> None:
    """Each is noticed, by its socket, and its provider told."""
    clients = crowd(rig, "leave", silent_after=1)
    for number, client in enumerate(clients):
        (client.close if number % 2 else client.reset)()
    for number in range(MANY):
        assert rig.provider.request(f"leave-{number}", "closed")["closed_by"] == "client"
    assert " cause=client " in rig.server.ending_of("leave-0")


def test_streams_that_await_their_headers_hold_no_thread(rig: Rig) -> None:
    """A provider that hangs takes nothing from a cancel, nor from a page."""
    clients = [
        rig.client().post(f"wait-{n}", simulate={"id": f"wait-{n}", "headers_after": 60})
        for n in range(20)
    ]
    for number in range(20):
        rig.provider.request(f"wait-{number}")
    before = time.monotonic()
    assert rig.server.get("/hello") == (200, b"hello")
    for number in range(20):
        assert rig.server.cancel(f"wait-{number}")[0] == 200
    assert time.monotonic() - before < 5
    for client in clients:
        assert client.head()[0] == 200
        assert client.body() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_tells_them_all(
    tmp_path: Path, provider: Provider, number: signal.Signals
) -> None:
    """SIGTERM drains them, SIGQUIT ends them at once: each client has its last words, each
    stream its line, and then the worker goes.
    """
    drain = "1" if number is signal.SIGTERM else "3600"
    with few_threads(tmp_path / "log", provider, CHATSTREAM_DRAIN=drain) as rig:
        worker = rig.server.worker
        clients = crowd(rig, "told", silent_after=2)
        os.kill(worker, number)
        for client in clients:
            assert client.body().endswith(SHUT_DOWN)
        rig.close_clients()
        eventually(lambda: not is_running(worker), "the worker's end")
        lines = [line for line in rig.server.log().splitlines() if ends(line)]
        assert sum(" aborted by shutdown " in line for line in lines) == len(lines) == MANY
        eventually(lambda: rig.server.workers and rig.server.worker, "the next worker")


def test_max_requests_waits_for_them(tmp_path: Path, provider: Provider) -> None:
    """Who can finish does; the rest is told when its time is over. Streams count as requests."""
    options = ["--max-requests", "60", "--max-requests-jitter", "0"]
    with few_threads(tmp_path / "log", provider, *options, CHATSTREAM_DRAIN="2.5") as rig:
        worker = rig.server.worker
        short = crowd(rig, "short", 20, rate=15, tokens=30)
        long = [
            rig.client().post(f"long-{n}", simulate={"id": f"long-{n}", "silent_after": 1})
            for n in range(20)
        ]
        for client in long:
            client.until(b'"content"')
            client.head()
        for _ in range(20):
            with contextlib.suppress(OSError):
                rig.server.get("/hello")
        assert "Autorestarting worker" in rig.server.log()
        for client in short:
            assert client.body().endswith(b"data: [DONE]\n\n")
        for client in long:
            assert client.body().endswith(SHUT_DOWN)
        rig.close_clients()
        eventually(lambda: not is_running(worker), "the worker's end")
        eventually(lambda: rig.server.workers and rig.server.worker, "the next worker")


def test_tls_on_both_sides(log_file: Path, certificate: Certificate) -> None:
    """As many, over TLS: what a client is slow to take comes whole; a stop is a stop."""
    trust = ssl.create_default_context(cafile=certificate.authority)
    options = ["--certfile", certificate.cert]
    with (
        contextlib.closing(Provider(certfile=certificate.cert)) as provider,
        few_threads(
            log_file, provider, *options, tls=trust, REQUESTS_CA_BUNDLE=certificate.authority
        ) as rig,
    ):
        simulate = {"rate": 0, "tokens": 50, "pad": 16_384}
        slow = [
            rig.client(tls=trust, receive_buffer=4096).post(f"slow-{n}", simulate=simulate)
            for n in range(2 * THREADS)
        ]
        silent = rig.client(tls=trust).post("silent", simulate={"id": "silent", "silent_after": 1})
        silent.until(b'"content"')
        assert rig.server.cancel("silent")[0] == 200
        assert provider.request("silent", "closed")["closed_by"] == "client"
        silent.head()
        assert silent.body().endswith(b"\n\n")
        with ThreadPoolExecutor(len(slow)) as threads:
            bodies = list(threads.map(lambda client: (client.head(), client.body())[1], slow))
        for body in bodies:
            assert body.endswith(b"data: [DONE]\n\n")
            assert len(body) > 50 * 16_384
        assert silent.ask("GET", "/hello")[2] == b"hello", "its connection goes on"


def test_a_middleware_that_sees_responses_keeps_them(log_file: Path, provider: Provider) -> None:
    """They are walked, a thread each: one line says so. Those for cancels are left to them."""
    with few_threads(log_file, provider, app="tests.integration.app:watched") as rig:
        walked = [
            rig.client().post(f"walked-{n}", simulate={"id": f"walked-{n}", "silent_after": 1})
            for n in range(THREADS - 4)
        ]
        for client in walked:
            client.until(b'"content"')
        for number in range(5):
            client = rig.client().post(f"beyond-{number}")
            status, headers = client.head()
            assert (status, headers["retry-after"]) == (503, "1")
            assert b'"busy"' in client.exactly(int(headers["content-length"]))
        assert rig.server.cancel("walked-1")[0] == 200
        assert rig.provider.request("walked-1", "closed")["closed_by"] == "client"
        lines = [line for line in rig.server.log().splitlines() if "(a middleware)" in line]
        assert len(lines) == 1
        assert f"{THREADS - 4} at a time" in lines[0]
