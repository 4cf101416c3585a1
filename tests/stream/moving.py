"""A stream that is moved: its provider's end, its client's end, and the server between them."""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from chatstream.dialects import base, openai_chat
from chatstream.errors import StreamAborted, StreamError, UpstreamError
from chatstream.sockets.loop import Loop
from chatstream.stream.forms import EventStream
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.outcome import Cause, Outcome, Phase
from chatstream.stream.sides import Body
from chatstream.stream.stream import Stream
from tests.conftest import PATIENCE, eventually

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
FAULT = b'data: {"error":{"message":"overloaded"}}\n\n'

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
"""Of every response here."""

CLOCKS = {"ping_interval": 30.0, "headers_timeout": 30.0, "idle_timeout": 30.0}
"""None of them strikes, unless a test says so."""


def big(size: int) -> bytes:
    """A whole event of so many bytes."""
    return b"data: " + b"x" * (size - 8) + b"\n\n"


def error_of(event: bytes) -> str:
    """The code of an error event of ours."""
    assert openai_chat.classify(event) is base.Kind.ERROR
    return event.decode().rpartition('"code": "')[2].partition('"')[0]


class SocketpairBody:
    """A `Body` over a socket that the test writes to."""

    more = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.calls: list[object] = []

    def receive(self, timeout: float) -> bytes:
        try:
            self._sock.settimeout(timeout)
            return self._sock.recv(65536)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise UpstreamError("It broke.", code="upstream_truncated") from error

    def detach(self) -> int:
        self._sock.settimeout(0)
        return self._sock.fileno()

    def receive_now(self) -> bytes | None:
        try:
            return self.receive(0)
        except TimeoutError:
            return None

    def drain(self, timeout: float) -> None:
        self.calls.append(("drain", timeout))

    def close(self) -> None:
        self.calls.append("close")
        self._sock.close()


class FakeExchange:
    """The server's part in it: every response has the same head; its body may be in chunks."""

    def __init__(self, sock: socket.socket, close: Callable[[], None], *, chunked: bool) -> None:
        self.sock = sock
        self.pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        """Of the body, before they are framed; b"" when all is over."""
        self.made = b""
        """What the client is to get."""
        self.over_with: list[bool] = []
        """What `over` was called with."""
        self.errors: list[Exception] = []
        """What its threads raised."""
        self._close = close
        self._chunked = chunked
        self.trailer = 2 if chunked else 0
        self._threads: list[threading.Thread] = []

    def begin(self, data: bytes) -> bytes:
        self.made += HEAD
        return HEAD + (self.frame(data) if data else b"")

    def frame(self, data: bytes) -> bytes:
        assert data
        self.pieces.put(data)
        framed = b"%X\r\n%b\r\n" % (len(data), data) if self._chunked else data
        self.made += framed
        return framed

    def end(self) -> bytes:
        end = b"0\r\n\r\n" if self._chunked else b""
        self.made += end
        return end

    def fail(self, error: Exception) -> None:
        self.errors.append(error)

    def run(self, callback: Callable[[], object]) -> None:
        thread = threading.Thread(target=self._guarded, args=(callback,))
        self._threads.append(thread)
        thread.start()

    def over(self, whole: bool) -> None:
        self.over_with.append(whole)
        self.run(self._finish)

    def _guarded(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception as error:
            self.errors.append(error)

    def _finish(self) -> None:
        """In a thread, as a server does: the iterable is closed, then the connection."""
        try:
            self._close()
        finally:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.pieces.put(b"")

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)


class Moved:
    """One stream and who moves it; the test is its provider and its client.

    It begins when it is first asked for something.

    Attributes:
        stream: The stream.
        provider: The provider's end of its connection.
        client: The client's end of its own.
        outcomes: What `on_close` was told.
        refusal: What `start_response` found: the error that is the whole response.
        starts: How often that was called.
        connects: How often the provider was.
    """

    def __init__(
        self,
        *,
        answers: bool = True,
        chunked: bool = False,
        buffers: int | None = None,
        loop: Loop | None = None,
        call: Callable[[Stream], None] | None = None,
        body: Callable[[socket.socket], Body] = SocketpairBody,
        form: Callable[[str, str], Stream] = EventStream,
        **times: float,
    ) -> None:
        """
        Args:
            answers: Whether the provider does, at once.
            chunked: Whether the response is in chunks.
            buffers: Bytes of the client's connection, each way of looking at it.
            loop: Who watches the client; None for one of its own.
            call: Calls another provider, in a thread.
            body: Makes the provider's answer, of our end of its connection.
            form: Makes the stream.
            times: Others than `CLOCKS`.
        """
        self.stream = form("s", "t")
        self.provider, self.sock = socket.socketpair()
        self.provider.settimeout(PATIENCE)
        self.server, self.client = connected(buffers)
        self.loop = loop or Loop()
        self._own_loop = loop is None
        self.body = body(self.sock)
        self.exchange = FakeExchange(self.server, self._close_iterable, chunked=chunked)
        self.outcomes: list[Outcome] = []
        self.refusal: StreamError | None = None
        self.starts = self.connects = 0
        self._answers = answers
        self._call = call
        self._started = self._left = False
        self._received = b""
        self.stream.client = self.loop.watch(self.server, self.stream.client_gone)
        self.iterable = StreamIterable(
            self.stream,
            self._connect,
            on_close=self.outcomes.append,
            loop=self.loop,
            **{**CLOCKS, **times},
        )

    def start(self) -> None:
        """Has it moved. Idempotent."""
        if not self._started:
            self._started = True
            self._move()

    def _move(self) -> None:
        raise NotImplementedError

    def _connect(self, stream: Stream) -> None:
        self.connects += 1
        assert stream is self.stream
        if self._call is not None:
            self.exchange.run(partial(self._call, stream))
        elif self._answers:
            self.answer()

    def _close_iterable(self) -> None:
        self.iterable.close()

    def start_response(self, data: bytes) -> bytes:
        """What the app's response does. Of a refusal the body is not made here."""
        self.starts += 1
        self.refusal = None if data else self.iterable.refusal
        return data or (b"" if self.refusal else self.stream.last_words())

    # As the provider

    def answer(self) -> None:
        with contextlib.suppress(StreamAborted):
            self.stream.arm(self.sock)
            self.stream.answered(self.body)

    def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.provider.sendall(piece)

    def breaks(self) -> None:
        """The provider resets its connection."""
        self.sock.sendall(b"not read by it")
        self.provider.close()

    def hears_the_end(self) -> bool:
        """Waits until our side is closed; whether it is."""
        return self.provider.recv(1) == b""

    # As the client

    def next(self) -> bytes:
        """The next piece of the body that was made for the client; b"" at its end."""
        self.start()
        piece = self.exchange.pieces.get(timeout=PATIENCE)
        if not piece:
            self.exchange.pieces.put(b"")
        return piece

    def rest(self) -> list[bytes]:
        """What else comes; stops a test that would go on for ever."""
        return list(itertools.islice(iter(self.next, b""), 100))

    def take(self, count: int) -> bytes:
        """The next bytes on the client's socket, head included; fewer only at the end."""
        self.start()
        data = b""
        while len(data) < count and (piece := self.client.recv(count - len(data))):
            data += piece
        self._received += data
        return data

    def leave(self, how: str = "close") -> None:
        """The client goes."""
        self._left = True
        if how == "half-close":
            self.client.shutdown(socket.SHUT_WR)
            return
        if how == "reset":
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()

    def blocked(self) -> None:
        """Waits until the client's socket has no room: it does not read."""
        self.start()
        eventually(self._is_blocked, "a full socket")

    def _is_blocked(self) -> bool:
        before = len(self.exchange.made)
        time.sleep(0.05)  # a moment later nothing has changed
        return self.stream.phase is Phase.SENDING and len(self.exchange.made) == before

    def end(self) -> Outcome:
        """The one outcome, once it is over."""
        eventually(lambda: self.outcomes, "an outcome")
        [outcome] = self.outcomes
        return outcome

    def close(self) -> None:
        """Ends it, and looks at what every stream leaves, whatever came of it."""
        if self._started:
            self.stream.abort(Cause.CANCEL)
        else:
            self.iterable.close()
        self._drain_client()
        self.end()
        self.exchange.join()
        if self._started and not self._left:
            whole = self.exchange.over_with == [True]
            assert self.exchange.made[: None if whole else len(self._received)] == self._received
        assert len(self.exchange.over_with) == self.starts == self._started
        assert self.exchange.errors == []
        if self._own_loop:
            assert_at_rest(self.loop)
            self.loop.stop()
        self.stream.disarm()
        for sock in (self.sock, self.provider, self.server, self.client):
            sock.close()

    def _drain_client(self) -> None:
        if self._started and not self._left:
            with contextlib.suppress(ConnectionError):
                while data := self.client.recv(1 << 20):
                    self._received += data


class Walked(Moved):
    """By the iterable: a server's thread walks it."""

    def _move(self) -> None:
        self.exchange.run(self._walk)

    def _walk(self) -> None:
        whole = False
        try:
            self.server.sendall(self.exchange.begin(self.start_response(next(self.iterable, b""))))
            for data in self.iterable:
                self.server.sendall(self.exchange.frame(data))
            self.server.sendall(self.exchange.end())
            whole = True
        except OSError:
            pass  # the client has gone
        finally:
            self.exchange.over(whole)


class Detached(Moved):
    """By the loop."""

    def _move(self) -> None:
        self.server.setblocking(False)
        assert self.iterable.detach(self.exchange, self.start_response)


def connected(buffers: int | None) -> tuple[socket.socket, socket.socket]:
    """The server's and the client's end of a TCP connection."""
    with socket.socket() as listener:
        if buffers is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.socket()
        if buffers is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        client.settimeout(PATIENCE)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    return server, client


def assert_at_rest(loop: Loop) -> None:
    """Nobody is watched, nothing is awaited, nothing is due."""
    assert loop._watches == {}
    assert loop._ready == {}
    assert [timer for _, _, timer in loop._timers if timer.callback is not None] == []


MOVERS: dict[str, Callable[..., Any]] = {"iterable": Walked, "detached": Detached}
