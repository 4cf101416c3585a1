"""stream: what a stream is. Real sockets, no provider, and nobody who moves it."""

from __future__ import annotations

import itertools
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from chatstream.errors import Busy, StreamAborted, UpstreamError
from chatstream.sockets.handle import SocketHandle
from chatstream.stream.outcome import Cause, Kind, Outcome, Phase
from chatstream.stream.stream import Stream
from tests.conftest import descriptors
from tests.stream.moving import SocketpairBody

pytestmark = pytest.mark.usefixtures("nothing_left")


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
    stream: Stream,
    pair: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    answered: bool,
) -> None:
    """The shutdown wakes the reader, whose outcome may be asked for before `abort` returns.

    It is whole even then, in every phase: it has the time that the stop took, which the log prints.
    """
    outcomes: list[Outcome] = []
    reader = threading.Thread(target=lambda: outcomes.append(stream.outcome()))
    shutdown = SocketHandle.shutdown

    def shutdown_and_be_overtaken(handle: SocketHandle) -> None:
        shutdown(handle)
        reader.start()
        reader.join(0.2)  # the outcome is there, or waits for `abort`

    monkeypatch.setattr(SocketHandle, "shutdown", shutdown_and_be_overtaken)
    stream.arm(pair[0])
    if answered:
        stream.answered(SocketpairBody(pair[0]))
    stream.abort(Cause.CLIENT)
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
