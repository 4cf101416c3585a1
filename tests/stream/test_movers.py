"""Both movers, the same tests: what a client gets, what a provider sees, how it is told.

The tests here know nothing of who moves the stream: see `tests.stream.moving`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chatstream.dialects import sse
from chatstream.errors import UpstreamError
from chatstream.stream.outcome import Cause, Kind, Phase
from tests.conftest import eventually
from tests.stream.moving import (
    DONE,
    EVENT,
    FAULT,
    HEAD,
    MOVERS,
    Moved,
    big,
    error_of,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MakeMoved = Callable[..., Moved]


@pytest.fixture(params=MOVERS)
def move(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[MakeMoved]:
    """Makes a stream that is moved, by the one or the other."""
    made: list[Moved] = []

    def make(**options: Any) -> Moved:
        made.append(MOVERS[request.param](**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_nothing_follows_done(move: MakeMoved) -> None:
    """Case 17: after the terminal event the body ends at once: no event, no error, no ping."""
    m = move(ping_interval=0.02, idle_timeout=0.1)
    m.say(DONE + EVENT)
    assert m.next() == DONE
    m.say(EVENT)
    threading.Event().wait(0.15)  # the clocks run on: neither may speak
    assert m.rest() == []
    assert m.end().kind is Kind.COMPLETED


def test_a_ping_shows_life_in_silence(move: MakeMoved) -> None:
    """After each ping interval without a byte a ping goes out, and events come as before."""
    m = move(ping_interval=0.05)
    m.say(EVENT)
    begin = time.monotonic()
    assert [m.next(), m.next(), m.next()] == [EVENT, sse.PING, sse.PING]
    assert time.monotonic() - begin >= 0.1
    m.say(DONE)
    assert m.rest() == [DONE]
    assert m.end().bytes == len(EVENT + DONE)


def test_a_ping_goes_out_while_the_headers_are_awaited(move: MakeMoved) -> None:
    """A provider that queues the request is waited for with pings, and is called once."""
    m = move(answers=False, ping_interval=0.05)
    assert [m.next(), m.next(), m.next()] == [sse.PING] * 3
    assert m.connects == 1
    m.answer()
    m.say(DONE)
    assert m.rest() == [DONE]


def test_a_ping_goes_between_events_only(move: MakeMoved) -> None:
    """Half an event in hand is kept back: the ping goes out before it, not into it."""
    m = move(ping_interval=0.05)
    m.say(EVENT[:20])
    assert m.next() == sse.PING
    m.say(EVENT[20:])
    assert m.next() == EVENT


def test_bytes_that_are_not_handed_over_do_not_put_a_ping_off(move: MakeMoved) -> None:
    """An event that trickles in is silence for the client: it gets its ping."""
    m = move(ping_interval=0.1)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            m.say(b"x")

    trickler = threading.Thread(target=trickle)
    trickler.start()
    try:
        assert m.next() == sse.PING
    finally:
        stop.set()
        trickler.join(5)


@pytest.mark.parametrize("ping_interval", [30.0, 0.03])
def test_a_quiet_provider_fails_the_stream(move: MakeMoved, ping_interval: float) -> None:
    """Case 7: no byte for the idle timeout is `upstream_idle`; our own pings do not count."""
    m = move(idle_timeout=0.2, ping_interval=ping_interval)
    m.say(EVENT)
    *before, last = m.rest()
    assert set(before) <= {EVENT, sse.PING}
    assert error_of(last) == "upstream_idle"
    assert m.end().code == "upstream_idle"


def test_a_provider_that_answers_and_says_nothing(move: MakeMoved) -> None:
    """From its headers on that is the idle timeout's: before any byte, a refusal."""
    m = move(idle_timeout=0.2)
    assert m.rest() == []
    assert m.refusal is not None
    assert (m.refusal.code, m.refusal.status) == ("upstream_idle", 502)


def test_keep_alive_comments_are_life(move: MakeMoved) -> None:
    """Case 6: a provider that sends comments is not idle, and they are relayed."""
    m = move(idle_timeout=0.3)
    said = 0

    def queue() -> None:
        nonlocal said
        for _ in range(6):
            threading.Event().wait(0.1)
            m.say(b": keep-alive\n\n")
            said += 1
        m.say(DONE)

    provider = threading.Thread(target=queue)
    provider.start()
    assert b"".join(m.rest()) == b": keep-alive\n\n" * 6 + DONE
    provider.join(5)
    outcome = m.end()
    assert (outcome.kind, outcome.events) == (Kind.COMPLETED, 1)


def test_headers_that_do_not_come_are_a_504(move: MakeMoved) -> None:
    """No answer within the headers timeout, and nothing sent yet: a refusal with a true status."""
    m = move(answers=False, headers_timeout=0.1)
    assert m.refusal is None
    assert m.rest() == []
    assert m.refusal is not None
    assert (m.refusal.code, m.refusal.status) == ("upstream_timeout", 504)
    assert m.end().code == "upstream_timeout"


def test_headers_that_do_not_come_after_a_ping_are_an_event(move: MakeMoved) -> None:
    """Once a ping has begun the response, the same fault is an error event, in the same time."""
    m = move(answers=False, headers_timeout=0.2, ping_interval=0.05)
    begin = time.monotonic()
    *pings, last = m.rest()
    assert time.monotonic() - begin < 5
    assert len(pings) >= 1
    assert set(pings) == {sse.PING}
    assert error_of(last) == "upstream_timeout"
    assert m.refusal is None


def test_a_refusal_before_any_byte_keeps_its_status(move: MakeMoved) -> None:
    """What the provider refused before the first byte is the refusal, and no byte of the body."""
    m = move(answers=False)
    error = UpstreamError("No.", code="upstream_rate_limited", status=429, retry_after="7")
    threading.Timer(0.02, m.stream.fail, [error]).start()
    assert m.rest() == []
    assert m.refusal is error


def test_a_refusal_after_a_ping_is_an_event(move: MakeMoved) -> None:
    """A provider that refuses after the first ping is told of in the stream, once."""
    m = move(answers=False, ping_interval=0.05)
    assert m.next() == sse.PING
    m.stream.fail(UpstreamError("No.", code="upstream_auth"))
    assert [error_of(event) for event in m.rest()] == ["upstream_auth"]


TOLD = [(Cause.DEADLINE, "deadline", 504), (Cause.SHUTDOWN, "shutting_down", 503)]


@pytest.mark.parametrize(("cause", "code", "status"), TOLD)
def test_a_told_cause_before_the_headers_is_a_status(
    move: MakeMoved, cause: Cause, code: str, status: int
) -> None:
    """A deadline or a shutdown while the headers are awaited is a 504 or a 503."""
    m = move(answers=False)
    threading.Timer(0.02, m.stream.abort, [cause]).start()
    assert m.rest() == []
    assert m.refusal is not None
    assert (m.refusal.code, m.refusal.status) == (code, status)
    assert m.end().cause is cause


@pytest.mark.parametrize(("cause", "code", "status"), TOLD)
def test_a_told_cause_in_the_body_is_an_event(
    move: MakeMoved, cause: Cause, code: str, status: int
) -> None:
    """The same causes after the first byte: one error event, and the end."""
    m = move()
    m.say(EVENT)
    assert m.next() == EVENT
    threading.Timer(0.02, m.stream.abort, [cause]).start()
    assert [error_of(event) for event in m.rest()] == [code]
    assert m.end().cause is cause


SILENT = [Cause.CLIENT, Cause.CANCEL, Cause.SUPERSEDED, Cause.STALLED]


@pytest.mark.parametrize("cause", SILENT)
def test_a_stop_ends_the_body_properly(move: MakeMoved, cause: Cause) -> None:
    """A client that is still there gets the end: no error, no `[DONE]`, no event in flight."""
    m = move()
    m.say(EVENT)
    assert m.next() == EVENT

    threading.Timer(0.02, m.stream.abort, [cause]).start()
    assert m.rest() == []
    assert m.hears_the_end()
    assert m.refusal is None
    assert m.end().cause is cause


@pytest.mark.parametrize("cause", SILENT)
def test_a_stop_before_the_headers_is_an_empty_body(move: MakeMoved, cause: Cause) -> None:
    """A stop while the headers are awaited wakes the server's thread; no refusal, no byte."""
    m = move(answers=False)
    threading.Timer(0.02, m.stream.abort, [cause]).start()
    assert m.rest() == []
    assert m.refusal is None
    assert m.end().cause is cause


def test_a_stream_born_aborted_calls_nobody(move: MakeMoved) -> None:
    """A cancel that came first: the provider is never called."""
    m = move()
    m.stream.abort(Cause.CANCEL)
    assert m.rest() == []
    assert m.refusal is None
    assert m.connects == 0
    assert m.end().cause is Cause.CANCEL


def test_a_broken_body_is_an_event(move: MakeMoved) -> None:
    """A connection that breaks in the middle of an answer: one error event, outcome failed."""
    m = move()
    m.say(EVENT)
    assert m.next() == EVENT
    m.breaks()
    assert [error_of(event) for event in m.rest()] == ["upstream_truncated"]
    assert m.end().code == "upstream_truncated"


def test_an_unterminated_tail_is_dropped(move: MakeMoved) -> None:
    """An event that the provider did not end never reaches the client; the error does."""
    m = move()
    m.say(EVENT + b"data: half")
    m.provider.close()
    first, last = m.rest()
    assert first == EVENT
    assert error_of(last) == "upstream_truncated"


@pytest.mark.parametrize("before", [b"", EVENT], ids=["first", "later"])
def test_a_providers_error_event_is_all_the_client_gets(move: MakeMoved, before: bytes) -> None:
    """The provider's own error is relayed and nothing is added; it comes first as a body, too."""
    m = move()
    m.say(before, FAULT)
    assert b"".join(m.rest()) == before + FAULT
    assert m.refusal is None
    assert m.end().kind is Kind.FAILED


def test_an_endless_event_is_an_error_after_what_was_whole(move: MakeMoved) -> None:
    """Case 11: the events before it are relayed, then comes `event_too_large`, and the end."""
    m = move()
    writer = threading.Thread(target=m.say, args=(EVENT, b"data: " + b"x" * (sse.MAX_EVENT + 10)))
    writer.start()
    first, last = m.rest()
    writer.join(5)
    assert first == EVENT
    assert error_of(last) == "event_too_large"


# On the wire


@pytest.mark.parametrize("chunked", [False, True])
def test_the_bytes_on_the_wire(move: MakeMoved, chunked: bool) -> None:
    """One head, the events as they are framed, the response's end: nothing twice, nothing else."""
    m = move(chunked=chunked)
    m.say(EVENT)
    assert m.next() == EVENT
    m.say(b": hello\n\n" + DONE)
    assert m.rest() == [b": hello\n\n" + DONE]
    if chunked:
        pieces = [EVENT, b": hello\n\n" + DONE]
        body = b"".join(b"%X\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        body = EVENT + b": hello\n\n" + DONE
    assert m.take(10_000) == HEAD + body
    outcome = m.end()
    assert (outcome.events, outcome.bytes) == (2, len(EVENT + b": hello\n\n" + DONE))


def test_an_empty_answer_has_a_head(move: MakeMoved) -> None:
    """A stream that was stopped before any byte: an empty response, which is a response."""
    m = move(answers=False, chunked=True)
    m.start()
    m.stream.abort(Cause.CANCEL)
    assert m.take(len(HEAD) + 5) == HEAD + b"0\r\n\r\n"


def test_events_that_come_byte_by_byte(move: MakeMoved) -> None:
    """However the provider cuts them, a client gets whole events."""
    m = move()
    whole = (EVENT + b": x\r\n\r\n") * 3 + DONE

    def trickle() -> None:
        for byte in whole:
            m.say(bytes([byte]))

    provider = threading.Thread(target=trickle)
    provider.start()
    pieces = m.rest()
    provider.join(5)
    assert b"".join(pieces) == whole
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n")) for piece in pieces)


def test_much_at_once(move: MakeMoved) -> None:
    """More than any buffer holds, to a client that reads: all of it, in its order."""
    m = move()
    events = [b"data: %d %b\n\n" % (number, b"x" * 3000) for number in range(1000)]
    writer = threading.Thread(target=m.say, args=(b"".join(events), DONE))
    writer.start()
    assert m.take(len(HEAD)) == HEAD
    assert m.take(sum(map(len, events)) + len(DONE)) == b"".join(events) + DONE
    writer.join(5)
    assert m.end().events == 1001


# Ends, wherever it is


def before_start(m: Moved) -> None:
    """Nobody has asked for the first byte."""


def awaiting_headers(m: Moved) -> None:
    m.start()
    eventually(lambda: m.connects, "the call")


def silent(m: Moved) -> None:
    m.answer()
    m.say(EVENT)
    assert m.next() == EVENT


def silent_at_once(m: Moved) -> None:
    m.answer()
    m.start()
    eventually(lambda: m.stream.phase is Phase.BODY, "the body")


def half_an_event(m: Moved) -> None:
    silent(m)
    m.say(EVENT[:-1])


def blocked(m: Moved) -> None:
    """It does not read: more is sent to it than its connection takes."""
    m.answer()
    m.say(big(150_000))
    m.blocked()


PHASES = {
    "before start": (before_start, Phase.NEW),
    "headers": (awaiting_headers, Phase.NEW),  # the phases in between are the call's to note
    "silent": (silent, Phase.BODY),
    "silent at once": (silent_at_once, Phase.BODY),
    "half an event": (half_an_event, Phase.BODY),
    "blocked": (blocked, Phase.SENDING),
}
BUFFERS = 4096

in_every_phase = pytest.mark.parametrize("phase", PHASES)


def bring_to(phase: str, m: Moved) -> None:
    PHASES[phase][0](m)
    eventually(lambda: m.stream.phase is PHASES[phase][1], phase)


@in_every_phase
def test_of_many_stops_at_once_one_counts(move: MakeMoved, phase: str) -> None:
    """From any thread, in any phase: one outcome, the first cause's, and the phase it came in."""
    m = move(answers=False, buffers=BUFFERS)
    bring_to(phase, m)
    causes = [Cause.CANCEL, Cause.CLIENT, Cause.DEADLINE, Cause.SHUTDOWN] * 4
    barrier = threading.Barrier(len(causes))
    won: list[Cause] = []

    def stop(cause: Cause) -> None:
        barrier.wait(5)
        if m.stream.abort(cause):
            won.append(cause)

    threads = [threading.Thread(target=stop, args=(cause,)) for cause in causes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    if phase not in ("before start", "headers"):
        assert m.hears_the_end()
    m.start()
    while m.take(65536):
        pass
    outcome = m.end()
    assert [outcome.cause] == won
    assert outcome.phase is PHASES[phase][1]
    assert m.connects == (phase != "before start")


@in_every_phase
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves(move: MakeMoved, phase: str, how: str) -> None:
    """It is noticed in every phase, by its socket, and nobody waits for it."""
    m = move(answers=False, buffers=BUFFERS)
    bring_to(phase, m)
    m.leave(how)
    eventually(lambda: m.stream.ended, "its end")
    assert m.stream.cause is Cause.CLIENT
    m.start()
    if how == "half-close":
        with m.client:
            while m.client.recv(65536):
                pass
    assert m.end().cause is Cause.CLIENT


@in_every_phase
def test_a_stopped_stream_gives_the_client_its_patience(
    move: MakeMoved, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that takes nothing after a stop costs that time, and no more; one that has taken
    all gets its proper end."""
    monkeypatch.setattr("chatstream.stream.stream.CLIENT_PATIENCE", 0.2)
    m = move(answers=False, buffers=BUFFERS)
    bring_to(phase, m)
    m.start()
    begin = time.monotonic()
    m.stream.abort(Cause.CANCEL)
    assert m.end().cause is Cause.CANCEL
    assert time.monotonic() - begin < 5
    assert (m.exchange.over_with == [True]) == (phase != "blocked")


# A client that does not read


def test_a_client_that_does_not_read_holds_the_provider_up(move: MakeMoved) -> None:
    """What is held for it is bounded: the provider is not read from while it takes nothing."""
    m = move(buffers=BUFFERS)
    m.start()
    m.provider.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 10_000_000:
            sent += m.provider.send(big(1000))
    bound = 4 * 65536 + _room(m.provider) + _room(m.server) + _room(m.client)
    assert sent < bound
    assert not m.stream.ended


def _room(sock: socket.socket) -> int:
    """Of the kernel's two buffers."""
    options = (socket.SO_SNDBUF, socket.SO_RCVBUF)
    return sum(sock.getsockopt(socket.SOL_SOCKET, option) for option in options)


def test_a_client_that_reads_again_gets_the_rest(move: MakeMoved) -> None:
    """Nothing is lost of what was held, and events go on."""
    m = move(buffers=BUFFERS)
    first, second = big(300_000), big(200_000)
    writer = threading.Thread(target=m.say, args=(first, second))
    writer.start()
    m.blocked()
    assert m.take(len(HEAD + first + second)) == HEAD + first + second
    writer.join(5)
    eventually(lambda: m.stream.phase is Phase.BODY, "nothing left to send")
    m.say(EVENT, DONE)
    assert m.take(len(EVENT + DONE)) == EVENT + DONE
    assert m.end().events == 4


def test_a_slow_client_is_no_quiet_provider(move: MakeMoved) -> None:
    """While it takes its time neither clock runs: no ping, no fault. Then they begin anew."""
    m = move(buffers=BUFFERS, idle_timeout=0.3, ping_interval=0.2)
    event = big(200_000)
    m.say(event)
    m.blocked()
    threading.Event().wait(0.5)  # longer than both
    assert m.take(len(HEAD + event)) == HEAD + event
    m.say(DONE)
    assert m.take(len(DONE)) == DONE
    assert m.end().kind is Kind.COMPLETED


def test_a_provider_that_ends_while_the_client_does_not_read(move: MakeMoved) -> None:
    """The rest, and what it is told then, wait for it."""
    m = move(buffers=BUFFERS)
    event = big(200_000)
    m.say(event)
    m.blocked()
    m.provider.close()
    assert m.take(len(HEAD + event)) == HEAD + event
    assert error_of(m.take(100_000)) == "upstream_truncated"
    assert m.end().code == "upstream_truncated"


def test_a_shutdown_while_the_client_does_not_read(move: MakeMoved) -> None:
    """What it has not taken of an event comes first, so that the error is an event of its own."""
    m = move(buffers=BUFFERS)
    event = big(200_000)
    m.say(event)
    m.blocked()
    m.stream.abort(Cause.SHUTDOWN)
    assert m.take(len(HEAD + event)) == HEAD + event
    assert error_of(m.take(100_000)) == "shutting_down"
    assert m.end().cause is Cause.SHUTDOWN


# Clocks


def test_a_clock_that_is_shorter_than_the_others(move: MakeMoved) -> None:
    """The idle timeout strikes in its own time, whatever the ping's and the headers' are."""
    m = move(idle_timeout=0.2, answers=False)
    m.start()
    threading.Event().wait(0.3)  # it does not run yet
    m.answer()
    m.say(EVENT)
    begin = time.monotonic()
    assert m.next() == EVENT
    assert [error_of(event) for event in m.rest()] == ["upstream_idle"]
    assert 0.19 < time.monotonic() - begin < 2


def test_events_put_the_ping_off(move: MakeMoved) -> None:
    """Silence counts from the last byte to the client."""
    m = move(ping_interval=0.4)
    m.say(EVENT)
    for _ in range(4):
        assert m.next() == EVENT
        threading.Event().wait(0.2)
        m.say(EVENT)
    begin = time.monotonic()
    assert m.next() == EVENT
    assert m.next() == sse.PING
    assert time.monotonic() - begin >= 0.3
