"""stream: what a stream is, and the iterable that a server walks. Real sockets, no provider."""

from __future__ import annotations

import itertools
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream import sse
from chatstream.errors import Busy, StreamAborted, StreamError, UpstreamError
from chatstream.iterable import StreamIterable
from chatstream.loop import Loop
from chatstream.outcome import Cause, Kind, Outcome, Phase
from chatstream.stream import DRAIN, ProviderEvent, SocketHandle, Stream
from tests.conftest import eventually

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
FAULT = b'data: {"error":{"message":"overloaded"}}\n\n'


MakeWalk = Callable[..., "Walk"]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a descriptor behind."""
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= threads, "threads as before")
    eventually(lambda: descriptors() <= fds, "descriptors as before")


@pytest.fixture
def pair(nothing_left: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: our end and the provider's."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def stream() -> Stream:
    return Stream("s", "t", "me")


def in_threads(*targets: Callable[[], object]) -> list[Any]:
    """What the targets return, run at once."""
    barrier = threading.Barrier(len(targets))
    results: list[Any] = [None] * len(targets)

    def run(number: int, target: Callable[[], object]) -> None:
        barrier.wait(5)
        results[number] = target()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# How it ends


def test_the_first_of_fifty_causes_wins() -> None:
    """Case 39: of fifty threads that abort at once one ends the stream, and its cause stays."""
    causes = list(itertools.islice(itertools.cycle(Cause), 50))
    for _ in range(10):
        stream = Stream("s", "t")
        won = in_threads(*(partial(stream.abort, cause) for cause in causes))
        assert won.count(True) == 1
        assert stream.cause is causes[won.index(True)]
        assert stream.outcome().cause is stream.cause


def test_a_stop_and_the_end_at_once_are_one_outcome() -> None:
    """Case 10: a stop in the instant of `[DONE]` makes one outcome, and it is the winner's."""
    for _ in range(100):
        stream = Stream("s", "t")
        aborted, completed, failed = in_threads(
            partial(stream.abort, Cause.CANCEL),
            stream.complete,
            partial(stream.fail, UpstreamError("x")),
        )
        assert [aborted, completed, failed].count(True) == 1
        kinds = {Kind.ABORTED: aborted, Kind.COMPLETED: completed, Kind.FAILED: failed}
        assert kinds[stream.outcome().kind]


ENDS: dict[str, tuple[Callable[[Stream], bool], Kind, Cause | None, str | None]] = {
    "abort": (lambda stream: stream.abort(Cause.CANCEL), Kind.ABORTED, Cause.CANCEL, None),
    "deadline": (lambda stream: stream.abort(Cause.DEADLINE), Kind.ABORTED, Cause.DEADLINE, None),
    "fail": (
        lambda stream: stream.fail(UpstreamError("x", code="upstream_idle")),
        Kind.FAILED,
        None,
        "upstream_idle",
    ),
    "complete": (lambda stream: stream.complete(), Kind.COMPLETED, None, None),
}
first_ends = pytest.mark.parametrize("first", ENDS)
second_ends = pytest.mark.parametrize("second", ENDS)


@first_ends
@second_ends
def test_nothing_overwrites_how_it_ended(stream: Stream, first: str, second: str) -> None:
    """The first end is True and stays; every later one is False and changes nothing."""
    end, kind, cause, code = ENDS[first]
    assert not stream.ended
    assert end(stream) is True
    assert stream.ended
    assert ENDS[second][0](stream) is False
    outcome = stream.outcome()
    assert (outcome.kind, outcome.cause, outcome.code) == (kind, cause, code)
    assert stream.cause is cause


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (Cause.CLIENT, None),
        (Cause.CANCEL, None),
        (Cause.SUPERSEDED, None),
        (Cause.STALLED, None),
        (Cause.DEADLINE, ("deadline", 504)),
        (Cause.SHUTDOWN, ("shutting_down", 503)),
    ],
)
def test_which_causes_a_client_is_told_of(
    stream: Stream, cause: Cause, told: tuple[str, int] | None
) -> None:
    """A client knows of its own stops; only a deadline and a shutdown are told, with a code."""
    assert stream.error is None
    stream.abort(cause)
    error = stream.error
    assert (error and (error.code, error.status)) == told


def test_a_failure_is_told(stream: Stream) -> None:
    """The error of a failure is what the client gets to hear; a completed stream has none."""
    error = UpstreamError("x")
    stream.fail(error)
    assert stream.error is error
    done = Stream("s", "t")
    done.complete()
    assert done.error is None


def test_what_the_outcome_says(stream: Stream) -> None:
    """Names, owner, phase at the end, duration, and the time the stop took."""
    stream.phase = Phase.HEADERS
    stream.abort(Cause.CANCEL)
    stream.phase = Phase.BODY
    outcome = stream.outcome()
    assert (outcome.session_id, outcome.stream_id, outcome.owner) == ("s", "t", "me")
    assert outcome.phase is Phase.HEADERS
    assert (outcome.events, outcome.bytes, outcome.code, outcome.detail) == (0, 0, None, "")
    assert outcome.stop_ms is not None
    assert 0 <= outcome.stop_ms < 1000
    assert 0 <= outcome.duration < 60


def test_an_errors_detail_reaches_the_outcome(stream: Stream) -> None:
    """What only the log may say travels apart from the message."""
    error = UpstreamError("The provider could not be connected to.", code="upstream_connect")
    error.detail = "ConnectionRefusedError"
    stream.fail(error)
    assert (stream.outcome().code, stream.outcome().detail) == (
        "upstream_connect",
        "ConnectionRefusedError",
    )


@pytest.mark.parametrize("answered", [False, True])
def test_the_reader_may_be_faster_than_the_stop(
    walk: MakeWalk, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """The shutdown wakes the reader, whose outcome may be asked for before `abort` returns.

    It is whole even then, in every phase: it has the time that the stop took, which the log prints.
    """
    w = walk()
    outcomes: list[Outcome] = []
    reader = threading.Thread(target=lambda: outcomes.append(w.stream.outcome()))
    shutdown = SocketHandle.shutdown

    def shutdown_and_be_overtaken(handle: SocketHandle) -> None:
        shutdown(handle)
        reader.start()
        reader.join(0.2)  # the outcome is there, or waits for `abort`

    monkeypatch.setattr(SocketHandle, "shutdown", shutdown_and_be_overtaken)
    w.stream.arm(w.sock)
    if answered:
        w.stream.answered(w.body)
    w.stream.abort(Cause.CLIENT)
    reader.join(5)
    assert outcomes[0].cause is Cause.CLIENT
    assert outcomes[0].stop_ms
    assert outcomes[0].stop_ms > 0


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda stream: None, "body"),
        (lambda stream: stream.abort(Cause.CANCEL), "CANCEL"),
        (lambda stream: stream.complete(), "COMPLETED"),
        (lambda stream: stream.fail(UpstreamError("x")), "failed"),
    ],
)
def test_repr_shows_the_state(stream: Stream, end: Callable[[Stream], Any], state: str) -> None:
    """A stream in a debugger says which one it is and how it stands."""
    stream.phase = Phase.BODY
    end(stream)
    assert repr(stream) == f"<Stream s/t {state}>"


# The upstream socket


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_a_stop_reaches_the_provider_before_it_returns(
    stream: Stream, pair: tuple[socket.socket, socket.socket], end: str
) -> None:
    """When `abort` (or `fail`) returns, the provider's end of the connection reads EOF."""
    ours, theirs = pair
    stream.arm(ours)
    ENDS[end][0](stream)
    theirs.setblocking(False)
    assert theirs.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        theirs.send(b"x")


def test_a_stop_wakes_a_blocked_reader(
    stream: Stream, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A thread that sleeps in `recv` on the socket itself returns at once."""
    ours, _ = pair
    stream.arm(ours)
    ours.settimeout(30)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(ours.recv(1)))
    reader.start()
    stream.abort(Cause.CANCEL)
    reader.join(5)
    assert got == [b""]


def test_a_handle_made_before_connect_reaches_the_connection(stream: Stream) -> None:
    """The handle is taken before `connect()`, so that no phase is out of reach."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as ours:
        stream.arm(ours)
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(5)
            stream.abort(Cause.CANCEL)
            assert theirs.recv(1) == b""


def test_a_stop_before_connect_is_no_error(stream: Stream) -> None:
    """A socket that is not connected yet has nothing to shut down; the stop is recorded."""
    with socket.socket() as ours:
        stream.arm(ours)
        assert stream.abort(Cause.CANCEL) is True


@pytest.mark.parametrize("end", ENDS)
def test_an_ended_stream_arms_nothing(
    stream: Stream, pair: tuple[socket.socket, socket.socket], end: str
) -> None:
    """After any end `arm` and `check` raise StreamAborted, and no descriptor is kept."""
    ours, _ = pair
    ENDS[end][0](stream)
    before = descriptors()
    with pytest.raises(StreamAborted):
        stream.arm(ours)
    with pytest.raises(StreamAborted):
        stream.check()
    assert descriptors() == before


def test_a_live_stream_passes_the_check(stream: Stream) -> None:
    """`check` is silent as long as nothing has ended the stream."""
    stream.check()


def test_a_second_socket_replaces_the_first(stream: Stream) -> None:
    """A stop reaches the last armed socket; the one before is left as it is, with no descriptor."""
    (a, a_peer), (b, b_peer) = socket.socketpair(), socket.socketpair()
    with a, a_peer, b, b_peer:
        before = descriptors()
        stream.arm(a)
        stream.arm(b)
        assert descriptors() == before + 1
        stream.abort(Cause.CANCEL)
        assert b_peer.recv(1) == b""
        a.sendall(b"x")
        assert a_peer.recv(1) == b"x"


def test_a_disarmed_socket_is_out_of_reach(
    stream: Stream, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Case 4: after `disarm` a late stop does not touch the connection: another stream has it."""
    ours, theirs = pair
    stream.arm(ours)
    assert stream.disarm() is True
    assert stream.abort(Cause.CANCEL) is True
    ours.sendall(b"next request")
    assert theirs.recv(20) == b"next request"


@pytest.mark.parametrize(
    ("end", "fit"), [("abort", False), ("deadline", False), ("fail", False), ("complete", True)]
)
def test_what_a_stop_touched_is_not_fit_for_reuse(
    stream: Stream, pair: tuple[socket.socket, socket.socket], end: str, fit: bool
) -> None:
    """`disarm` says whether the connection can carry another request: only after a whole answer."""
    ours, _ = pair
    stream.arm(ours)
    ENDS[end][0](stream)
    assert stream.disarm() is fit


@pytest.mark.parametrize("end", ["abort", "deadline", "fail", "complete"])
def test_the_handle_is_given_back(
    stream: Stream, pair: tuple[socket.socket, socket.socket], end: str
) -> None:
    """After a stop, and after `disarm`, no second descriptor is open: closing sends a FIN."""
    ours, theirs = pair
    before = descriptors()
    stream.arm(ours)
    assert descriptors() == before + 1
    ENDS[end][0](stream)
    if end == "complete":
        stream.disarm()
        stream.disarm()
    assert descriptors() == before
    ours.close()
    assert theirs.recv(1) == b""


def test_a_completed_stream_leaves_the_connection_alone(
    stream: Stream, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A whole answer shuts nothing down: its connection is reused."""
    ours, theirs = pair
    stream.arm(ours)
    stream.complete()
    stream.abort(Cause.CLIENT)
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x"
    stream.disarm()


def test_arming_without_a_descriptor_is_busy(
    stream: Stream, pair: tuple[socket.socket, socket.socket]
) -> None:
    """EMFILE is Busy: the client gets a 503, not a 502 that blames the provider."""
    with no_descriptor_left(), pytest.raises(Busy) as caught:
        stream.arm(pair[0])
    assert isinstance(caught.value.__cause__, OSError)


def test_a_closed_socket_is_no_lack_of_descriptors(stream: Stream) -> None:
    """Another OSError stays what it is."""
    ours, theirs = socket.socketpair()
    ours.close()
    theirs.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        stream.arm(ours)


def test_a_stop_gives_the_client_its_patience(
    stream: Stream, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an abort a client that takes no bytes has its socket shut down; not before one."""
    monkeypatch.setattr("chatstream.stream.CLIENT_PATIENCE", 0.1)
    loop = Loop()
    server, _client = pair
    server.settimeout(5)
    ended = threading.Event()
    stream.client = loop.watch(server, lambda: None)

    def write() -> None:
        try:
            while True:
                server.sendall(b"x" * 65536)
        except BrokenPipeError:
            ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert not ended.wait(0.3)
    stream.abort(Cause.CANCEL)
    assert ended.wait(4)
    writer.join(5)
    stream.client.release()
    loop.stop()


# What goes through it


def test_feed_passes_whole_events_only(stream: Stream) -> None:
    """An event comes out when it is whole, byte for byte, however it came in."""
    assert [stream.feed(EVENT[:9]), stream.feed(EVENT[9:] + b"da")] == [b"", EVENT]
    assert stream.feed(b"ta: b\n\n: c\n\ndata: tail") == b"data: b\n\n: c\n\n"
    assert not stream.ended


def test_feed_counts(stream: Stream) -> None:
    """Events are events; comments count as bytes only; what is not whole counts as nothing."""
    stream.feed(b": keep-alive\n\n" + EVENT + EVENT + b"data: tail")
    stream.complete()
    outcome = stream.outcome()
    assert outcome.events == 2
    assert outcome.bytes == len(b": keep-alive\n\n" + EVENT + EVENT)


def test_done_completes_and_drops_what_follows(stream: Stream) -> None:
    """Case 17: `[DONE]` is relayed and ends the stream; nothing after it comes out or counts."""
    assert stream.feed(EVENT + DONE + EVENT + b"data: tail") == EVENT + DONE
    assert stream.outcome().kind is Kind.COMPLETED
    assert stream.outcome().events == 2
    assert stream.outcome().bytes == len(EVENT + DONE)


def test_done_before_an_event_too_long_completes(stream: Stream) -> None:
    """What comes after `[DONE]` cannot fail the stream any more."""
    assert stream.feed(DONE + b"x" * (sse.MAX_EVENT + 1)) == DONE
    assert stream.outcome().kind is Kind.COMPLETED


@pytest.mark.parametrize("cause", [Cause.CLIENT, Cause.CANCEL, Cause.DEADLINE])
def test_after_a_cause_nothing_comes_out(stream: Stream, cause: Cause) -> None:
    """Once a cause is recorded no byte is handed over, not even `[DONE]`, and none is counted."""
    stream.feed(EVENT)
    stream.abort(cause)
    assert stream.feed(EVENT + DONE) == b""
    outcome = stream.outcome()
    assert outcome.cause is cause
    assert (outcome.events, outcome.bytes) == (1, len(EVENT))


def test_a_providers_error_is_relayed_and_fails(stream: Stream) -> None:
    """A provider's own error event goes through, ends the stream, and adds nothing of ours."""
    assert stream.feed(EVENT + FAULT + DONE) == EVENT + FAULT
    assert isinstance(stream.error, ProviderEvent)
    outcome = stream.outcome()
    assert (outcome.kind, outcome.code, outcome.events) == (Kind.FAILED, "upstream_error", 2)


def test_an_event_too_long_fails(stream: Stream) -> None:
    """The events before one that is too long come out; the stream has failed."""
    assert stream.feed(EVENT + b"data: " + b"x" * sse.MAX_EVENT) == EVENT
    assert stream.outcome().code == "event_too_large"


MIXTURE = st.lists(
    st.sampled_from(
        [
            *[EVENT, EVENT, EVENT, b": c\n\n", EVENT[:-2] + b"\r\n\r\n", b"data: {}\r\r", b"\n"],
            *[FINISH, b"data: text\n\n", EVENT.replace(b'"a"', b'"error"'), EVENT * 60],
        ]
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    before=MIXTURE,
    last=st.sampled_from([b"", DONE, FAULT, b"event: error\ndata: x\n\n"]),
    after=MIXTURE,
    cuts=st.lists(st.integers(0, 60_000), max_size=4),
)
def test_feed_is_what_a_look_at_each_block_gives(
    before: list[bytes], last: bytes, after: list[bytes], cuts: list[int]
) -> None:
    """However events come and whatever lies between them: the same bytes, count and end."""
    data = b"".join([*before, last, *after])
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    relayed: list[tuple[bytes, Outcome]] = []
    for each in (False, True):
        stream, out = Stream("s", "t"), b""
        with pytest.MonkeyPatch.context() as patch:
            if each:
                patch.setattr(sse, "plain_events", lambda blocks: None)
            for start, end in itertools.pairwise(edges):
                if not stream.ended:  # a mover asks no further
                    out += stream.feed(data[start:end])
            stream.eof()
        relayed.append((out, replace(stream.outcome(), duration=0)))
    assert relayed[0] == relayed[1]
    if last:
        assert relayed[0][0] == b"".join([*before, last])


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        (b"", Kind.FAILED, "upstream_truncated"),
        (EVENT, Kind.FAILED, "upstream_truncated"),
        (EVENT + FINISH, Kind.COMPLETED, None),
        (FINISH + b'data: {"choices":[],"usage":{}}\n\n', Kind.COMPLETED, None),
        (FINISH[:-1], Kind.FAILED, "upstream_truncated"),
        (EVENT + DONE, Kind.COMPLETED, None),
    ],
    ids=["nothing", "an event", "finish", "finish and usage", "finish cut off", "done"],
)
def test_the_end_of_the_body(stream: Stream, data: bytes, kind: Kind, code: str | None) -> None:
    """Case 8: an end without `[DONE]` or a finish_reason is a failure, never `completed`."""
    stream.feed(data)
    stream.eof()
    assert (stream.outcome().kind, stream.outcome().code) == (kind, code)


def test_the_end_of_an_aborted_body_is_no_completion(stream: Stream) -> None:
    """Case 2: a stop surfaces as a clean end of a close-delimited body; the cause stays."""
    stream.feed(EVENT + FINISH)
    stream.abort(Cause.CANCEL)
    stream.eof()
    assert stream.outcome().cause is Cause.CANCEL


# The iterable


class SocketpairBody:
    """The provider's side of the `Body` protocol, over a socket that the test writes to."""

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

    def drain(self, timeout: float) -> None:
        self.calls.append(("drain", timeout))

    def close(self) -> None:
        self.calls.append("close")
        self._sock.close()


class Walk:
    """One stream, its iterable, and the provider's end of a connection that answers it."""

    def __init__(self, *, answers: bool = True, **times: float) -> None:
        self.stream = Stream("s", "t")
        self.provider, self.sock = socket.socketpair()
        self.provider.settimeout(5)
        self.body = SocketpairBody(self.sock)
        self.connects = 0
        self.outcomes: list[Outcome] = []
        self._answers = answers
        defaults = {"ping_interval": 30.0, "headers_timeout": 30.0, "idle_timeout": 30.0}
        self.iterable = StreamIterable(
            self.stream, self._connect, on_close=self.outcomes.append, **{**defaults, **times}
        )

    def _connect(self, stream: Stream) -> None:
        self.connects += 1
        assert stream is self.stream
        if self._answers:
            self.answer()

    def answer(self) -> None:
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
def walk(nothing_left: None) -> Iterator[Callable[..., Walk]]:
    walks: list[Walk] = []

    def make(**options: Any) -> Walk:
        walks.append(Walk(**options))
        return walks[-1]

    yield make
    for one in walks:
        one.close()


def error_of(event: bytes) -> str:
    """The code of an error event of ours."""
    assert sse.classify(event) is sse.Kind.ERROR
    return event.decode().rpartition('"code": "')[2].partition('"')[0]


def test_events_are_handed_over_as_they_arrive(walk: MakeWalk) -> None:
    """Each `next` returns when a whole event is there, not later and not with half of one."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT
    w.say(b"data: b\n\nda")
    assert w.next() == b"data: b\n\n"
    w.say(b"ta: c\n\n")
    assert w.next() == b"data: c\n\n"
    w.say(DONE)
    assert w.next() == DONE
    assert w.rest() == []
    assert w.end().kind is Kind.COMPLETED


def test_nothing_follows_done(walk: MakeWalk) -> None:
    """Case 17: after the terminal event the body ends at once: no event, no error, no ping."""
    w = walk(ping_interval=0.02, idle_timeout=0.1)
    w.say(DONE + EVENT)
    assert w.next() == DONE
    w.say(EVENT)
    threading.Event().wait(0.15)  # the clocks run on: neither may speak
    assert w.rest() == []
    assert w.end().kind is Kind.COMPLETED


def test_the_provider_is_called_once_at_the_first_next(walk: MakeWalk) -> None:
    """Making the iterable calls nobody; the first `next` does, and no later one."""
    w = walk()
    assert w.connects == 0
    w.say(EVENT, DONE)
    w.rest()
    assert w.connects == 1


def test_a_ping_shows_life_in_silence(walk: MakeWalk) -> None:
    """After each ping interval without a byte a ping goes out, and events come as before."""
    w = walk(ping_interval=0.05)
    w.say(EVENT)
    begin = time.monotonic()
    assert [w.next(), w.next(), w.next()] == [EVENT, sse.PING, sse.PING]
    assert time.monotonic() - begin >= 0.1
    w.say(DONE)
    assert w.rest() == [DONE]
    assert w.end().bytes == len(EVENT + DONE)


def test_a_ping_goes_out_while_the_headers_are_awaited(walk: MakeWalk) -> None:
    """A provider that queues the request is waited for with pings, and is called once."""
    w = walk(answers=False, ping_interval=0.05)
    assert [w.next(), w.next(), w.next()] == [sse.PING] * 3
    assert w.connects == 1
    w.answer()
    w.say(DONE)
    assert w.rest() == [DONE]


def test_a_ping_goes_between_events_only(walk: MakeWalk) -> None:
    """Half an event in hand is kept back: the ping goes out before it, not into it."""
    w = walk(ping_interval=0.05)
    w.say(EVENT[:20])
    assert w.next() == sse.PING
    w.say(EVENT[20:])
    assert w.next() == EVENT


def test_bytes_that_are_not_handed_over_do_not_put_a_ping_off(walk: MakeWalk) -> None:
    """An event that trickles in is silence for the client: it gets its ping."""
    w = walk(ping_interval=0.1)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            w.say(b"x")

    trickler = threading.Thread(target=trickle)
    trickler.start()
    try:
        assert w.next() == sse.PING
    finally:
        stop.set()
        trickler.join(5)


def test_the_servers_own_time_is_not_silence(walk: MakeWalk) -> None:
    """The clocks start anew at each `next`: a slow client is no quiet provider."""
    w = walk(idle_timeout=0.2, ping_interval=0.2)
    w.say(EVENT)
    assert w.next() == EVENT
    threading.Event().wait(0.3)  # the server sends to a slow client
    later = threading.Timer(0.05, w.say, [DONE])
    later.start()
    assert w.next() == DONE
    later.join(5)


@pytest.mark.parametrize("ping_interval", [30.0, 0.03])
def test_a_quiet_provider_fails_the_stream(walk: MakeWalk, ping_interval: float) -> None:
    """Case 7: no byte for the idle timeout is `upstream_idle`; our own pings do not count."""
    w = walk(idle_timeout=0.2, ping_interval=ping_interval)
    w.say(EVENT)
    *before, last = w.rest()
    assert set(before) <= {EVENT, sse.PING}
    assert error_of(last) == "upstream_idle"
    assert w.end().code == "upstream_idle"


def test_keep_alive_comments_are_life(walk: MakeWalk) -> None:
    """Case 6: a provider that sends comments is not idle, and they are relayed."""
    w = walk(idle_timeout=0.3)
    said = 0

    def queue() -> None:
        nonlocal said
        for _ in range(6):
            threading.Event().wait(0.1)
            w.say(b": keep-alive\n\n")
            said += 1
        w.say(DONE)

    provider = threading.Thread(target=queue)
    provider.start()
    assert b"".join(w.rest()) == b": keep-alive\n\n" * 6 + DONE
    provider.join(5)
    outcome = w.end()
    assert (outcome.kind, outcome.events) == (Kind.COMPLETED, 1)


def test_headers_that_do_not_come_are_a_504(walk: MakeWalk) -> None:
    """No answer within the headers timeout, and nothing sent yet: a refusal with a true status."""
    w = walk(answers=False, headers_timeout=0.1)
    assert w.iterable.refusal is None
    assert w.rest() == []
    assert w.iterable.refusal is not None
    assert (w.iterable.refusal.code, w.iterable.refusal.status) == ("upstream_timeout", 504)
    assert w.end().code == "upstream_timeout"


def test_headers_that_do_not_come_after_a_ping_are_an_event(walk: MakeWalk) -> None:
    """Once a ping has begun the response, the same fault is an error event, in the same time."""
    w = walk(answers=False, headers_timeout=0.2, ping_interval=0.05)
    begin = time.monotonic()
    *pings, last = w.rest()
    assert time.monotonic() - begin < 5
    assert len(pings) >= 1
    assert set(pings) == {sse.PING}
    assert error_of(last) == "upstream_timeout"
    assert w.iterable.refusal is None


def test_a_refusal_before_any_byte_keeps_its_status(walk: MakeWalk) -> None:
    """What the provider refused before the first byte is the refusal, and no byte of the body."""
    w = walk(answers=False)
    error = UpstreamError("No.", code="upstream_rate_limited", status=429, retry_after="7")
    threading.Timer(0.02, w.stream.fail, [error]).start()
    assert w.rest() == []
    assert w.iterable.refusal is error


def test_a_refusal_after_a_ping_is_an_event(walk: MakeWalk) -> None:
    """A provider that refuses after the first ping is told of in the stream, once."""
    w = walk(answers=False, ping_interval=0.05)
    assert w.next() == sse.PING
    w.stream.fail(UpstreamError("No.", code="upstream_auth"))
    assert [error_of(event) for event in w.rest()] == ["upstream_auth"]


TOLD = [(Cause.DEADLINE, "deadline", 504), (Cause.SHUTDOWN, "shutting_down", 503)]


@pytest.mark.parametrize(("cause", "code", "status"), TOLD)
def test_a_told_cause_before_the_headers_is_a_status(
    walk: MakeWalk, cause: Cause, code: str, status: int
) -> None:
    """A deadline or a shutdown while the headers are awaited is a 504 or a 503."""
    w = walk(answers=False)
    threading.Timer(0.02, w.stream.abort, [cause]).start()
    assert w.rest() == []
    assert w.iterable.refusal is not None
    assert (w.iterable.refusal.code, w.iterable.refusal.status) == (code, status)
    assert w.end().cause is cause


@pytest.mark.parametrize(("cause", "code", "status"), TOLD)
def test_a_told_cause_in_the_body_is_an_event(
    walk: MakeWalk, cause: Cause, code: str, status: int
) -> None:
    """The same causes after the first byte: one error event, and the end."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT
    threading.Timer(0.02, w.stream.abort, [cause]).start()
    assert [error_of(event) for event in w.rest()] == [code]
    assert w.end().cause is cause


SILENT = [Cause.CLIENT, Cause.CANCEL, Cause.SUPERSEDED, Cause.STALLED]


@pytest.mark.parametrize("cause", SILENT)
def test_a_stop_ends_the_body_properly(walk: MakeWalk, cause: Cause) -> None:
    """A client that is still there gets the end: no error, no `[DONE]`, no event in flight."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT

    threading.Timer(0.02, w.stream.abort, [cause]).start()
    assert w.rest() == []
    assert w.provider.recv(1) == b""
    assert w.iterable.refusal is None
    assert w.end().cause is cause


@pytest.mark.parametrize("cause", SILENT)
def test_a_stop_before_the_headers_is_an_empty_body(walk: MakeWalk, cause: Cause) -> None:
    """A stop while the headers are awaited wakes the server's thread; no refusal, no byte."""
    w = walk(answers=False)
    threading.Timer(0.02, w.stream.abort, [cause]).start()
    assert w.rest() == []
    assert w.iterable.refusal is None
    assert w.end().cause is cause


def test_a_stream_born_aborted_calls_nobody(walk: MakeWalk) -> None:
    """A cancel that came first: the provider is never called."""
    w = walk()
    w.stream.abort(Cause.CANCEL)
    assert w.rest() == []
    assert w.connects == 0
    assert w.end().cause is Cause.CANCEL


def test_a_client_gone_before_the_first_next_calls_nobody(walk: MakeWalk) -> None:
    """Case 14: `close` without a single `next` ends the stream; a generator would run nothing."""
    w = walk()
    outcome = w.end()
    assert w.connects == 0
    assert (outcome.kind, outcome.cause, outcome.phase) == (Kind.ABORTED, Cause.CLIENT, Phase.NEW)
    assert w.rest() == []
    assert w.connects == 0


def test_a_broken_body_is_an_event(walk: MakeWalk) -> None:
    """A connection that breaks in the middle of an answer: one error event, outcome failed."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT
    w.sock.close()
    assert [error_of(event) for event in w.rest()] == ["upstream_truncated"]
    assert w.end().code == "upstream_truncated"


def test_an_unterminated_tail_is_dropped(walk: MakeWalk) -> None:
    """An event that the provider did not end never reaches the client; the error does."""
    w = walk()
    w.say(EVENT + b"data: half")
    w.provider.close()
    first, last = w.rest()
    assert first == EVENT
    assert error_of(last) == "upstream_truncated"


def test_an_answer_with_a_finish_reason_may_just_end(walk: MakeWalk) -> None:
    """Some providers send no `[DONE]`: a finish_reason and the end are a whole answer."""
    w = walk()
    w.say(EVENT + FINISH)
    w.provider.close()
    assert w.rest() == [EVENT + FINISH]
    assert w.end().kind is Kind.COMPLETED


def test_a_providers_error_event_is_all_the_client_gets(walk: MakeWalk) -> None:
    """The provider's own error is relayed and nothing is added to it."""
    w = walk()
    w.say(EVENT, FAULT)
    assert b"".join(w.rest()) == EVENT + FAULT
    assert w.end().kind is Kind.FAILED


def test_a_providers_error_event_may_come_first(walk: MakeWalk) -> None:
    """As the first event it is the body too, not a refusal."""
    w = walk()
    w.say(FAULT)
    assert w.rest() == [FAULT]
    assert w.iterable.refusal is None


def test_an_endless_event_is_an_error_after_what_was_whole(walk: MakeWalk) -> None:
    """Case 11: the events before it are relayed, then comes `event_too_large`, and the end."""
    w = walk()
    writer = threading.Thread(target=w.say, args=(EVENT, b"data: " + b"x" * (sse.MAX_EVENT + 10)))
    writer.start()
    first, last = w.rest()
    writer.join(5)
    assert first == EVENT
    assert error_of(last) == "event_too_large"


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
    if end != "client":
        ENDS[end][0](w.stream)
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


def test_the_phases(walk: MakeWalk) -> None:
    """A stop says what the stream was doing: waiting for the provider, or writing to the client."""
    w = walk()
    w.say(EVENT)
    assert w.next() == EVENT
    assert w.stream.phase is Phase.SENDING
    seen: list[Phase] = []
    threading.Timer(0.05, lambda: (seen.append(w.stream.phase), w.say(DONE))).start()
    assert w.next() == DONE
    assert seen == [Phase.BODY]


def test_an_error_that_is_not_ours_is_not_swallowed(walk: MakeWalk) -> None:
    """Only the provider's faults become events: a bug of ours stays visible."""
    w = walk()

    def broken(timeout: float) -> bytes:
        raise ZeroDivisionError

    w.body.receive = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        w.next()
    assert issubclass(UpstreamError, StreamError)
