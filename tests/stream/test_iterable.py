"""iterable: what is the walker's own. What both movers have in common is in test_movers."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chatstream.dialects import sse
from chatstream.errors import Busy, StreamError, UpstreamError
from chatstream.sockets.loop import Loop
from chatstream.stream.forms import EventStream
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.outcome import Cause, Kind, Outcome, Phase
from chatstream.stream.stream import DRAIN, Stream
from tests.stream.moving import CLOCKS, DONE, EVENT, FakeExchange, SocketpairBody

pytestmark = pytest.mark.usefixtures("nothing_left")

MakeWalk = Callable[..., "Walk"]


class Walk:
    """One stream, its iterable, and the provider's end of a connection that answers it."""

    def __init__(self, *, answers: bool = True, **options: Any) -> None:
        self.stream = EventStream("s", "t")
        self.provider, self.sock = socket.socketpair()
        self.provider.settimeout(5)
        self.body = SocketpairBody(self.sock)
        self.connects = 0
        self.outcomes: list[Outcome] = []
        self._answers = answers
        self.iterable = StreamIterable(
            self.stream, self._connect, on_close=self.outcomes.append, **{**CLOCKS, **options}
        )

    def _connect(self, stream: Stream) -> None:
        self.connects += 1
        assert stream is self.stream
        if self._answers:
            self.stream.arm(self.sock)
            self.stream.answered(self.body)

    def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.provider.sendall(piece)

    def next(self) -> bytes:
        return next(self.iterable, b"")

    def rest(self) -> list[bytes]:
        """What else comes; stops a test that would go on for ever."""
        return list(itertools.islice(self.iterable, 100))

    def end(self) -> Outcome:
        self.iterable.close()
        [outcome] = self.outcomes
        return outcome

    def close(self) -> None:
        self.iterable.close()
        self.stream.disarm()
        self.sock.close()
        self.provider.close()


@pytest.fixture
def walk(nothing_left: None) -> Iterator[MakeWalk]:
    walks: list[Walk] = []

    def make(**options: Any) -> Walk:
        walks.append(Walk(**options))
        return walks[-1]

    yield make
    for one in walks:
        one.close()


@pytest.fixture
def pair(nothing_left: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: the server's end and the client's."""
    server, client = socket.socketpair()
    with server, client:
        yield server, client


def test_the_provider_is_called_once_at_the_first_next(walk: MakeWalk) -> None:
    """Making the iterable calls nobody; the first `next` does, and no later one."""
    w = walk()
    assert w.connects == 0
    w.say(EVENT, DONE)
    w.rest()
    assert w.connects == 1


def test_a_client_gone_before_the_first_next_calls_nobody(walk: MakeWalk) -> None:
    """Case 14: `close` without a single `next` ends the stream; a generator would run nothing."""
    w = walk()
    outcome = w.end()
    assert w.connects == 0
    assert (outcome.kind, outcome.cause, outcome.phase) == (Kind.ABORTED, Cause.CLIENT, Phase.NEW)
    assert w.rest() == []
    assert w.connects == 0


@pytest.mark.parametrize("after", ["nothing", "an event", "done", "the end"])
def test_close_is_idempotent_and_tells_once(walk: MakeWalk, after: str) -> None:
    """However often and early `close` comes: one outcome is told, the body is closed once."""
    w = walk()
    w.say(EVENT, DONE)
    if after != "nothing":
        assert w.next()
    if after == "the end":
        w.rest()
    for _ in range(3):
        w.iterable.close()
    assert len(w.outcomes) == 1
    assert w.body.calls.count("close") == (after != "nothing")
    assert w.rest() == []


def test_what_nobody_is_sent_is_not_waited_for(walk: MakeWalk) -> None:
    """Dropped, a stream ends at once, also one that would outlive its client."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT
    w.stream.outlives_client = True
    dropping = threading.Thread(target=w.iterable.drop)
    dropping.start()
    dropping.join(5)
    waits = dropping.is_alive()
    w.provider.close()
    dropping.join()
    assert not waits
    [outcome] = w.outcomes
    assert (outcome.cause, outcome.client_left) == (Cause.CLIENT, False)


def test_a_whole_answer_is_drained_then_closed(walk: MakeWalk) -> None:
    """After `[DONE]` the rest gets a moment, so that the connection can be reused."""
    w = walk()
    w.say(DONE)
    w.rest()
    w.end()
    assert w.body.calls == [("drain", DRAIN), "close"]


def test_an_outcome_is_told_even_if_the_body_cannot_be_closed(walk: MakeWalk) -> None:
    """Slot and log line do not depend on the connection's end going well."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT

    def broken() -> None:
        raise ZeroDivisionError

    w.body.close = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        w.iterable.close()
    assert len(w.outcomes) == 1


@pytest.mark.parametrize("end", ["abort", "fail", "client"])
def test_what_was_stopped_is_not_drained(walk: MakeWalk, end: str) -> None:
    """A stop waits for nothing: the body is closed at once."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT
    if end == "abort":
        w.stream.abort(Cause.CANCEL)
    elif end == "fail":
        w.stream.fail(UpstreamError("x"))
    w.end()
    assert w.body.calls == ["close"]


def test_an_answer_that_comes_too_late_is_not_taken(walk: MakeWalk) -> None:
    """A provider that answers after the end finds nobody: who called it closes it."""
    w = walk(answers=False, ping_interval=0.02)
    assert w.next() == sse.PING
    w.end()
    assert w.stream.answered(w.body) is False
    assert w.stream.body is None
    assert w.body.calls == []


def test_the_client_is_let_go_before_the_outcome_is_told(
    walk: MakeWalk, pair: tuple[socket.socket, socket.socket]
) -> None:
    """`close` releases the watched socket: its next request is not this stream's."""
    loop = Loop()
    server, client = pair
    w = walk()
    left = threading.Event()
    w.stream.client = loop.watch(server, left.set)
    w.say(DONE)
    w.rest()
    w.end()
    client.close()
    done = threading.Event()
    loop.call_later(0.05, done.set)
    assert done.wait(5)
    assert not left.is_set()
    loop.stop()


def test_an_error_that_is_not_ours_is_not_swallowed(walk: MakeWalk) -> None:
    """Only the provider's faults become events: a bug of ours stays visible."""
    w = walk()

    def broken(timeout: float) -> bytes:
        raise ZeroDivisionError

    w.body.receive = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        w.next()
    assert issubclass(UpstreamError, StreamError)


# Whether it is walked at all


def test_a_walk_is_announced_before_the_provider_is_called(walk: MakeWalk) -> None:
    """A thread is about to be held: who counts them hears of it once, at the first `next`."""
    seen: list[tuple[Stream, int]] = []
    w = walk(walk=lambda stream: seen.append((stream, w.connects)))
    assert seen == []
    w.say(EVENT, DONE)
    w.rest()
    assert seen == [(w.stream, 0)]


def test_a_walk_that_may_not_be_is_a_refusal(walk: MakeWalk) -> None:
    """No thread for one more: busy, with a true status, and the provider is not called."""

    def busy(stream: Stream) -> None:
        raise Busy("Every thread is taken.")

    w = walk(walk=busy)
    assert w.rest() == []
    assert w.iterable.refusal is not None
    assert (w.iterable.refusal.code, w.iterable.refusal.status) == ("busy", 503)
    assert w.connects == 0
    assert w.end().code == "busy"


def test_without_a_loop_nothing_is_detached(
    walk: MakeWalk, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Where detaching is switched off the server is told to walk, and nothing has begun."""
    w = walk()
    exchange = FakeExchange(pair[0], w.iterable.close, chunked=False)
    assert not w.iterable.detach(exchange, lambda data: data)
    assert w.connects == 0
    w.say(EVENT, DONE)
    assert b"".join(w.rest()) == EVENT + DONE
    assert exchange.made == b""
