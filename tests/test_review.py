"""What the loop, the pool and the provider's connection must not do to a stream between them."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gunicorn")

from chatstream import sse
from chatstream.body import SocketBody
from chatstream.config import Settings
from chatstream.detached import Detached
from chatstream.extension import Service
from chatstream.loop import Loop
from chatstream.outcome import Kind, Phase
from chatstream.simulator import Simulator
from chatstream.stream import Stream
from chatstream.workers.exchange import Kept
from chatstream.workers.gthread import ThreadWorker
from tests.conftest import eventually, fill

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"


class FakeExchange:
    """A response without a head or a framing, begun and ended in bare threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ended: list[bool] = []
        sock.setblocking(False)

    def begin(self, data: bytes) -> bytes:
        return data

    def fail(self, error: Exception) -> None:
        raise error

    def frame(self, data: bytes) -> bytes:
        return data

    def end(self) -> bytes:
        return b""

    def run(self, callback: Callable[[], object]) -> None:
        threading.Thread(target=callback).start()

    def over(self, whole: bool) -> None:
        self.ended.append(whole)


class FakeBody:
    """A provider's answer of which all is there at once, as of TLS: the socket shows nothing."""

    def __init__(self, fd: int, *pieces: bytes | None) -> None:
        self._fd = fd
        self._pieces = list(pieces)
        self.more = True

    def receive(self, timeout: float) -> bytes:
        raise AssertionError

    def detach(self) -> int:
        return self._fd

    def receive_now(self) -> bytes | None:
        piece = self._pieces.pop(0) if self._pieces else None
        self.more = bool(self._pieces)
        return piece

    def drain(self, timeout: float) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.stop()


@pytest.fixture
def client() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: the server's end and the client's."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def silent() -> Iterator[int]:
    """The descriptor of a provider's socket that never shows anything."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.fileno()


def detached(stream: Stream, loop: Loop, sock: socket.socket, **clocks: float) -> FakeExchange:
    exchange = FakeExchange(sock)
    clocks = {"ping_interval": 60, "headers_timeout": 60, "idle_timeout": 60, **clocks}
    Detached(stream, loop, exchange, lambda data: data, **clocks).start(lambda _: None)  # type: ignore[arg-type]
    return exchange


def test_framing_alone_does_not_hold_up_what_is_behind_it(
    loop: Loop, client: tuple[socket.socket, socket.socket], silent: int
) -> None:
    """A piece without a byte of the body: what TLS has beyond it moves, and to the end."""
    stream = Stream("s", "t")
    exchange = detached(stream, loop, client[0])
    stream.answered(FakeBody(silent, None, EVENT, None, DONE, None, b""))
    eventually(lambda: exchange.ended == [True], "the end", patience=5)
    assert client[1].recv(65536) == EVENT + DONE
    assert stream.outcome().kind is Kind.COMPLETED


def test_the_rest_of_an_answer_may_begin_with_framing(
    loop: Loop,
    client: tuple[socket.socket, socket.socket],
    silent: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind `[DONE]` likewise: the connection is reused, whatever its last bytes come in."""
    monkeypatch.setattr("chatstream.detached.DRAIN", 60.0)
    stream = Stream("s", "t")
    exchange = detached(stream, loop, client[0])
    stream.answered(FakeBody(silent, DONE, None, b""))
    eventually(lambda: exchange.ended == [True], "the end", patience=5)


def test_a_ping_that_waits_for_the_client_is_not_the_phase(
    loop: Loop, client: tuple[socket.socket, socket.socket]
) -> None:
    """While the provider is called, that is what a stream does, also if its client is slow."""
    stream = Stream("s", "t")
    fill(client[0])
    detached(stream, loop, client[0], ping_interval=0.05)
    stream.phase = Phase.HEADERS
    waiting = {"_ready": loop._ready}
    eventually(lambda: waiting["_ready"], "a ping that waits")
    assert Phase.HEADERS is stream.phase
    received = b""
    while not received.endswith(sse.PING):
        received += client[1].recv(65536)
    eventually(lambda: not waiting["_ready"], "a ping that was sent")
    assert Phase.HEADERS is stream.phase


class NoMoreThreads(ThreadPoolExecutor):
    """A pool of one thread in a process that cannot start another."""

    def __init__(self) -> None:
        super().__init__(max_workers=8)
        self.submit(int).result()
        self._adjust_thread_count = self._fail  # type: ignore[method-assign]

    def _fail(self) -> None:
        raise RuntimeError("can't start new thread")


def test_a_connection_comes_back_though_no_thread_can_be_started(
    client: tuple[socket.socket, socket.socket],
) -> None:
    """Where the pool cannot grow, its threads do what the loop asks for, once, when they can."""
    finished: list[Any] = []
    worker = SimpleNamespace(
        raw=None,
        method_queue=SimpleNamespace(raw=None, defer=lambda call, *args: call(*args)),
        finish_request=lambda conn, fs: finished.append((conn, fs.result())),
        _keepalive_after=lambda conn, keepalive: keepalive,
        tpool=NoMoreThreads(),
    )
    busy = threading.Event()
    with worker.tpool:
        with pytest.raises(RuntimeError):
            worker.tpool.submit(busy.wait, 10)
        worker._finish = ThreadWorker._finish.__get__(worker)
        exchange, conn = SimpleNamespace(raw=None, finish=lambda: Kept.YES), object()
        ThreadWorker.resume(worker, conn, exchange)  # type: ignore[arg-type]
        busy.set()
        eventually(lambda: finished, "the connection")
    assert [(conn, Kept.YES)] == finished


def test_a_request_is_not_kept_while_its_answer_comes() -> None:
    """A chat's history may be long, and its stream too: what was sent is let go of."""
    payload = b'{"stream": true, "messages": [{"role": "user", "content": "%b"}]}' % (b"x" * 10_000)
    alone = sys.getrefcount(payload)
    with Simulator() as provider:
        service = Service(Settings(upstream_url=provider.url))
        try:
            iterable = service.open(payload)
            next(iterable)
            eventually(lambda: sys.getrefcount(payload) == alone, "nobody else who has it")
            iterable.close()
        finally:
            service.stop()


def test_a_detached_body_is_drained_once(
    client: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has waited for the provider's end; no thread does so again."""
    message: Any = SimpleNamespace(raw=None, status=200, chunked=True, fp=client[0].makefile("rb"))
    body = SocketBody(
        SimpleNamespace(
            raw=None,
        ),
        message,
        client[0],
        Stream("s", "t"),
    )  # type: ignore[arg-type]
    asked: list[float] = []
    monkeypatch.setattr(body, "receive", lambda timeout: asked.append(timeout) or b"")
    body.drain(1.0)
    assert len(asked) == 1
    body.detach()
    body.drain(1.0)
    assert len(asked) == 1
    message.fp.close()
