"""detached: what is the loop's own. What both movers have in common is in test_movers."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from chatstream.dialects import sse
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop
from chatstream.stream.outcome import Cause, Kind, Phase
from chatstream.stream.stream import Stream
from chatstream.stream.transcript import Transcript
from chatstream.upstream.body import MockedBody
from chatstream.upstream.provider import Upstream
from tests.conftest import eventually, fill
from tests.service.test_unattended import heard, numbers, outliving, said
from tests.stream.moving import (
    DONE,
    EVENT,
    HEAD,
    Detached,
    Moved,
    SocketpairBody,
    assert_at_rest,
    big,
    connected,
    error_of,
)
from tests.upstream.peer import (
    CHUNKED,
    PAYLOAD,
    Peer,
    Provider,
    Script,
    always_says,
    chunk,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MakeMoved = Callable[..., Moved]
BUFFERS = 4096


@pytest.fixture
def loop(nothing_left: None) -> Iterator[Loop]:
    """One for all streams of a test, as in a worker. At rest at its end."""
    loop = Loop()
    yield loop
    assert_at_rest(loop)
    loop.stop()


@pytest.fixture
def move(loop: Loop) -> Iterator[MakeMoved]:
    """Makes a stream that the loop moves."""
    made: list[Moved] = []

    def make(**options: Any) -> Moved:
        made.append(Detached(loop=loop, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def provider(nothing_left: None) -> Iterator[Callable[[Script], Provider]]:
    """Makes a provider that does as its script says."""
    made: list[Provider] = []

    def make(script: Script) -> Provider:
        made.append(Provider(script))
        return made[-1]

    yield make
    for one in made:
        one.stop()


MakeProvider = Callable[[Script], Provider]


@pytest.fixture
def call_to(provider: object) -> Iterator[Callable[[str], Callable[[Stream], None]]]:
    """What calls the provider at an address, over a pool."""
    made: list[Upstream] = []
    loop = Loop()  # the pool's clock

    def to(url: str) -> Callable[[Stream], None]:
        upstream = Upstream(Settings(upstream_url=url), 4, loop.call_later)
        made.append(upstream)

        def call(stream: Stream) -> None:
            body = upstream.open(PAYLOAD, stream)
            if not stream.answered(body):
                body.close()

        return call

    yield to
    for one in made:
        one.close()
    loop.stop()


CallTo = Callable[[str], Callable[[Stream], None]]


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> trustme.CA:
    """Who our side trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    return authority


def server_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


# Where the loop is not to be held up


def test_a_slow_start_of_a_response_holds_up_nobody_else(move: MakeMoved) -> None:
    """What an app wraps around `start_response` may wait: that is a thread's time, not the loop's.

    Meanwhile nothing is read from the provider, and a stop reaches it all the same.
    """
    slow, other = move(), move()
    go_on = threading.Event()
    start_response = slow.start_response
    slow.start_response = lambda data: go_on.wait(10) and start_response(data)  # type: ignore[method-assign]
    slow.say(EVENT)
    starter = threading.Thread(target=slow.start)
    starter.start()
    other.say(EVENT, DONE)
    assert b"".join(other.rest()) == EVENT + DONE
    slow.stream.abort(Cause.DEADLINE)
    assert slow.hears_the_end()
    go_on.set()
    starter.join(10)
    first, last = slow.rest()
    assert (first, error_of(last)) == (EVENT, "deadline")
    assert slow.end().cause is Cause.DEADLINE


def test_a_client_that_does_not_read_holds_up_nobody_else(move: MakeMoved) -> None:
    """Of fifty streams one is stuck; the others go on, with two threads or so in all."""
    stuck = move(buffers=BUFFERS)
    stuck.say(big(150_000))
    stuck.blocked()
    others = [move() for _ in range(50)]
    for one in others:
        one.say(EVENT)
        assert one.next() == EVENT
    for one in others:
        one.say(DONE)
    for one in others:
        assert one.rest() == [DONE]
        assert one.end().kind is Kind.COMPLETED
    assert not stuck.stream.ended


def test_a_torrent_leaves_others_their_turn(move: MakeMoved) -> None:
    """A provider that is always ready is read from a piece at a time."""
    torrent, other = move(), move()
    stop = threading.Event()
    event = big(8192)

    def flood() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                torrent.say(event)

    def take() -> None:
        with contextlib.suppress(OSError):
            while torrent.take(65536):
                pass

    threads = [threading.Thread(target=target) for target in (flood, take)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    for _ in range(20):
        other.say(EVENT)
        assert other.next() == EVENT
    assert time.monotonic() - begin < 5
    assert not torrent.stream.ended
    torrent.stream.abort(Cause.CANCEL)
    stop.set()
    for thread in threads:
        thread.join(5)


# What was read before the loop had it


def test_what_came_with_the_headers_goes_first(
    move: MakeMoved, provider: MakeProvider, call_to: CallTo
) -> None:
    """http.client has it in its buffer, and the socket shows nothing more."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED + chunk(EVENT) + chunk(b": x\n\n"))
        assert go_on.wait(10)
        peer.send(chunk(DONE) + chunk(b""))
        peer.wait_closed()

    m = move(call=call_to(provider(script).url))
    assert m.next() == EVENT + b": x\n\n"
    go_on.set()
    assert m.rest() == [DONE]
    assert m.end().kind is Kind.COMPLETED


@pytest.mark.parametrize("size", [100, 4000, 16_000, 60_000])
def test_what_tls_has_read_already_is_not_waited_for(
    move: MakeMoved, provider: MakeProvider, call_to: CallTo, authority: trustme.CA, size: int
) -> None:
    """A record is decrypted as a whole: what was not asked for of it, the socket does not show."""
    context = server_side(authority)
    event = big(size)

    def script(peer: Peer) -> None:
        peer.sock = context.wrap_socket(peer.sock, server_side=True)
        peer.request()
        peer.send(CHUNKED + chunk(event))
        for _ in range(3):
            peer.send(chunk(event))
        peer.send(chunk(DONE) + chunk(b""))
        peer.wait_closed()

    m = move(call=call_to(provider(script).url.replace("http:", "https:")))
    assert m.take(len(HEAD) + 4 * size + len(DONE)) == HEAD + 4 * event + DONE
    assert m.end().kind is Kind.COMPLETED


def test_a_tls_provider_that_goes_quiet_after_a_record(
    move: MakeMoved, provider: MakeProvider, call_to: CallTo, authority: trustme.CA
) -> None:
    """All of one record is relayed, though half of it was read with the headers; a stop comes."""
    context = server_side(authority)
    events = [b"data: %d %b\n\n" % (number, b"x" * 1000) for number in range(15)]

    def script(peer: Peer) -> None:
        peer.sock = context.wrap_socket(peer.sock, server_side=True)
        peer.request()
        peer.send(CHUNKED + b"".join(map(chunk, events)))  # less than the 16 KB of a record
        with contextlib.suppress(OSError):
            peer.wait_closed()

    m = move(call=call_to(provider(script).url.replace("http:", "https:")))
    whole = b"".join(events)
    assert m.take(len(HEAD + whole)) == HEAD + whole
    m.stream.abort(Cause.CANCEL)
    assert m.end().events == len(events)


def test_a_body_without_a_socket(move: MakeMoved) -> None:
    """As a mock of requests has it: all of it is there, and it goes as the client takes it."""
    response = requests.Response()
    event = big(200_000)
    response.raw = io.BytesIO(event + EVENT + DONE)
    m = move(buffers=BUFFERS, body=lambda sock: MockedBody(response))
    m.blocked()
    assert m.take(len(HEAD + event + EVENT + DONE)) == HEAD + event + EVENT + DONE
    assert m.end().events == 3


class AllThere(SocketpairBody):
    """An answer of which all is there at once, as of TLS: the socket shows nothing.

    Of its pieces, None is framing, without a byte of the body.
    """

    def __init__(self, sock: socket.socket, *pieces: bytes | None) -> None:
        super().__init__(sock)
        self._pieces = list(pieces)
        self.more = True

    def receive_now(self) -> bytes | None:
        piece = self._pieces.pop(0) if self._pieces else None
        self.more = bool(self._pieces)
        return piece


def test_framing_alone_does_not_hold_up_what_is_behind_it(move: MakeMoved) -> None:
    """A piece without a byte of the body: what TLS has beyond it moves, and to the end."""
    m = move(body=lambda sock: AllThere(sock, None, EVENT, None, DONE, None, b""))
    assert m.take(len(HEAD + EVENT + DONE)) == HEAD + EVENT + DONE
    assert m.end().kind is Kind.COMPLETED
    assert m.exchange.over_with == [True]


# The end of the provider's connection


def test_the_rest_of_an_answer_may_begin_with_framing(
    move: MakeMoved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind `[DONE]` likewise: the connection is reused, whatever its last bytes come in."""
    monkeypatch.setattr("chatstream.stream.detached.DRAIN", 60.0)
    m = move(body=lambda sock: AllThere(sock, DONE, None, b""))
    assert m.rest() == [DONE]
    assert m.exchange.over_with == [True]


def test_a_whole_answers_connection_is_reused(
    move: MakeMoved,
    provider: MakeProvider,
    call_to: CallTo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its last chunk comes a moment later than `[DONE]`."""
    monkeypatch.setattr("chatstream.stream.detached.DRAIN", 10.0)

    def script(peer: Peer) -> None:
        while peer.request():
            peer.send(CHUNKED + chunk(DONE))
            threading.Event().wait(0.05)  # it takes its time
            peer.send(chunk(b""))
        peer.wait_closed()

    there = provider(script)
    call = call_to(there.url)
    for _ in range(3):
        m = move(call=call)
        begin = time.monotonic()
        assert m.rest() == [DONE]
        assert m.end().kind is Kind.COMPLETED
        assert time.monotonic() - begin < 5
        assert m.exchange.over_with == [True]
    assert len(there.peers) == 1


def test_an_answer_whose_end_was_there_is_not_waited_for(
    move: MakeMoved,
    provider: MakeProvider,
    call_to: CallTo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nearly always all comes at once: the response is over at once, too."""
    monkeypatch.setattr("chatstream.stream.detached.DRAIN", 60.0)
    there = provider(always_says(CHUNKED + chunk(EVENT) + chunk(DONE) + chunk(b"")))
    call = call_to(there.url)
    for _ in range(3):
        m = move(call=call)
        assert b"".join(m.rest()) == EVENT + DONE
        m.end()
    assert len(there.peers) == 1


@pytest.mark.parametrize("after", [b"", chunk(EVENT)], ids=["silence", "an event"])
def test_an_answer_that_is_held_open(
    move: MakeMoved, provider: MakeProvider, call_to: CallTo, after: bytes
) -> None:
    """Its connection is closed; the client has had its end before, and nothing more of it."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED + chunk(DONE) + after)
        peer.wait_closed()

    there = provider(script)
    call = call_to(there.url)
    m = move(call=call)
    assert m.rest() == [DONE]
    assert m.end().kind is Kind.COMPLETED
    assert there.closed.wait(5)
    assert m.exchange.over_with == [True]


def test_a_torrent_after_the_end_is_not_read_for_long(move: MakeMoved) -> None:
    """The rest of a completed answer has its moment, however much of it there is."""
    m = move()
    m.say(DONE)
    m.start()
    m.provider.settimeout(0.1)
    with contextlib.suppress(OSError):
        while not m.outcomes:
            m.say(big(8192))
    assert m.rest() == [DONE]


def test_a_fault_after_the_end_is_none(move: MakeMoved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that breaks once its answer is whole has broken nothing; nobody waits on."""
    monkeypatch.setattr("chatstream.stream.detached.DRAIN", 60.0)
    m = move()
    m.say(DONE)
    assert m.next() == DONE
    m.breaks()
    assert m.rest() == []
    assert m.end().kind is Kind.COMPLETED
    assert m.exchange.over_with == [True]


# The client's side of it


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_a_tls_client(move: MakeMoved, authority: trustme.CA, size: int) -> None:
    """It gets every byte, also of what its connection had no room for."""
    m = move(buffers=BUFFERS)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    shaken: list[ssl.SSLSocket] = []

    def shake_hands() -> None:
        shaken.append(trusting.wrap_socket(m.client, server_hostname="127.0.0.1"))

    hand = threading.Thread(target=shake_hands)
    hand.start()
    m.exchange.sock = m.server = server_side(authority).wrap_socket(m.server, server_side=True)
    hand.join(5)
    [m.client] = shaken
    m.client.settimeout(10)
    event = big(size)
    writer = threading.Thread(target=m.say, args=(event,))
    writer.start()
    if size > 100_000:
        m.blocked()
    assert m.take(len(HEAD + event)) == HEAD + event
    writer.join(5)
    m.say(EVENT, DONE)
    assert m.take(len(EVENT + DONE)) == EVENT + DONE
    assert m.end().events == 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_write_that_fails_is_a_client_that_left(move: MakeMoved, begun: bool) -> None:
    """EPIPE, where nothing else has said so: the provider is told, the connection is not kept."""
    m = move()
    if begun:
        m.say(EVENT)
        assert m.take(len(HEAD + EVENT)) == HEAD + EVENT
    m.server.shutdown(socket.SHUT_WR)
    m.say(EVENT)
    m.start()
    assert m.end().cause is Cause.CLIENT
    assert m.hears_the_end()
    assert m.exchange.over_with == [False]


def test_a_ping_that_finds_no_room(move: MakeMoved) -> None:
    """Before the headers, too: it is left, and goes out when there is room; then all goes on."""
    m = move(answers=False, ping_interval=0.02, buffers=BUFFERS)
    assert m.next() == sse.PING

    def full() -> bool:  # as if pings had gone on for days
        with contextlib.suppress(BlockingIOError):
            while True:
                m.server.send(b": x\n\n" * 1000)
        return bool(m.loop._ready)

    eventually(full, "no room for a ping")
    m.answer()
    m.say(DONE)
    data = b""
    while not data.endswith(DONE):
        data = data[-100:] + m.client.recv(65536)
    assert m.end().kind is Kind.COMPLETED
    m.exchange.made = m._received = b""  # the test has sent some itself


def test_a_ping_that_waits_for_the_client_is_not_the_phase(move: MakeMoved, loop: Loop) -> None:
    """While the provider is called, that is what a stream does, also if its client is slow."""
    m = move(answers=False, ping_interval=0.05)
    fill(m.server)
    m.start()
    m.stream.phase = Phase.HEADERS
    eventually(lambda: loop._ready, "a ping that waits")
    assert Phase.HEADERS is m.stream.phase
    received = b""
    while not received.endswith(sse.PING):
        received = received[-100:] + m.client.recv(65536)
    eventually(lambda: not loop._ready, "a ping that was sent")
    assert Phase.HEADERS is m.stream.phase
    m.leave()  # the test has sent some itself


# A client that has gone, and keeps its socket


def test_a_client_that_closes_its_side_while_it_does_not_read(move: MakeMoved) -> None:
    """Nothing is sent to it any more, so nothing waits for it; and that is what the stream says."""
    m = move(form=outliving, buffers=BUFFERS)
    m.start()
    m.say(said(0, 60_000), said(1, 60_000))
    m.blocked()
    m.leave("half-close")
    eventually(lambda: m.stream.unattended, "that the client has gone")
    eventually(lambda: m.stream.phase is Phase.BODY, "the provider is listened to")
    m.say(DONE)
    outcome = m.end()
    assert (outcome.kind, numbers(outcome.text or "")) == (Kind.COMPLETED, [0, 1])


def test_a_client_that_closes_its_side_is_sent_nothing_more(move: MakeMoved) -> None:
    """Though it could read: what it has is what its stream's `client_left` says."""
    m = move(form=outliving)
    m.say(EVENT)
    assert m.take(len(HEAD + EVENT)) == HEAD + EVENT
    m.leave("half-close")
    eventually(lambda: m.stream.unattended, "that the client has gone")
    m.say(EVENT, DONE)
    outcome = m.end()
    assert (outcome.text, outcome.client_left) == ("aa", True)
    assert m.client.recv(1) == b""


def test_nobody_is_pinged(move: MakeMoved, loop: Loop) -> None:
    """Before the headers a ping would begin a response, which is app code, for nobody."""
    m = move(form=outliving, answers=False, ping_interval=0.05)
    m.start()
    m.stream.client_gone()
    later = threading.Event()
    loop.call_later(0.2, later.set)
    assert later.wait(10)
    assert m.starts == 0
    m.leave()
    m.answer()
    m.say(EVENT, DONE)
    assert m.end().text == "a"


@pytest.mark.parametrize(("lacking", "text"), [(1, "a"), (2, "a"), (3, "")])
def test_an_event_was_seen_without_the_end_of_its_chunk(
    move: MakeMoved, lacking: int, text: str
) -> None:
    """What HTTP puts behind an event is none of it: that one was sent, and is in the text."""

    class Breaking:
        """The server's socket: the client takes nearly all of the first write, and is gone."""

        def __getattr__(self, name: str) -> Any:
            return getattr(m.server, name)

        def send(self, data: bytes) -> int:
            if m._left:
                raise BrokenPipeError
            m._left = True  # it was cut off
            return m.server.send(data[:-lacking])

    m = move(form=heard, chunked=True)
    m.exchange.sock = Breaking()
    m.say(EVENT)
    m.start()
    outcome = m.end()
    assert (outcome.cause, outcome.text) == (Cause.CLIENT, text)


# Faults of ours, and of the app's


def test_a_start_response_that_fails(move: MakeMoved) -> None:
    """The stream is over, its provider told; the loop lives, and other streams go on."""
    other = move()
    m = move()
    m.stream.transcript = Transcript()

    def broken(data: bytes) -> bytes:
        m.starts += 1
        raise ZeroDivisionError

    m.start_response = broken  # type: ignore[method-assign]
    other.say(EVENT)
    assert other.next() == EVENT
    m.say(EVENT)
    m.start()
    outcome = m.end()
    assert (outcome.cause, outcome.text) == (Cause.CLIENT, ""), "nobody has seen a byte of it"
    assert m.hears_the_end()
    assert m.rest() == []
    assert m.exchange.over_with == [False]
    assert [type(error) for error in m.exchange.errors] == [ZeroDivisionError], "it is logged"
    m.exchange.errors.clear()
    other.say(DONE)
    assert other.rest() == [DONE]


@pytest.mark.parametrize("method", ["frame", "end"])
def test_a_step_that_fails(move: MakeMoved, capfd: pytest.CaptureFixture[str], method: str) -> None:
    """It ends its own stream, and says why; it does not fail for ever, nor for others."""
    other, m = move(), move()
    m.say(EVENT)
    assert m.next() == EVENT

    def broken(*args: bytes) -> bytes:
        raise ZeroDivisionError(method)

    setattr(m.exchange, method, broken)
    m.say(EVENT if method == "frame" else DONE)
    outcome = m.end()
    assert outcome.kind is (Kind.FAILED if method == "frame" else Kind.COMPLETED)
    assert m.exchange.over_with == [False]
    assert capfd.readouterr().err.count(f"ZeroDivisionError: {method}") == 1
    other.say(EVENT, DONE)
    assert b"".join(other.rest()) == EVENT + DONE


def test_a_body_that_fails(move: MakeMoved, capfd: pytest.CaptureFixture[str]) -> None:
    """An error that is not the provider's is not called one: it is shown, and ends the stream."""
    m = move()
    m.say(EVENT)
    assert m.next() == EVENT

    def broken() -> bytes:
        raise ZeroDivisionError

    m.body.receive_now = broken  # type: ignore[method-assign]
    with contextlib.suppress(BrokenPipeError):  # it may have been called before
        m.say(EVENT)
    outcome = m.end()
    assert (outcome.kind, outcome.code) == (Kind.FAILED, "upstream_error")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_server_without_threads(move: MakeMoved, capfd: pytest.CaptureFixture[str]) -> None:
    """Its pool is shut down: nobody can begin the response, so the stream is over."""
    m = move()
    run = m.exchange.run

    def none_left(callback: Callable[[], object]) -> None:
        m.exchange.run = run  # type: ignore[method-assign]
        raise RuntimeError("cannot schedule new futures after shutdown")

    m.exchange.run = none_left  # type: ignore[method-assign]
    m.start()
    m.say(EVENT)
    assert m.end().kind is Kind.FAILED
    assert m.hears_the_end()
    assert m.exchange.over_with == [False]
    assert "cannot schedule" in capfd.readouterr().err
    m.starts = 1  # it never came to that


def test_what_comes_in_the_instant_of_a_fault_is_too_late(move: MakeMoved, loop: Loop) -> None:
    """Nothing of the provider's goes out after the verdict, though it is in the socket's buffer."""
    m = move(idle_timeout=0.3)
    m.say(EVENT)
    assert m.next() == EVENT
    eventually(lambda: loop._ready, "the wait for more")
    loop.call_later(0.1, lambda: m.say(EVENT, DONE))  # in the turn in which the time is over
    loop.call_soon(lambda: time.sleep(0.9))  # as a machine that stands still
    assert [error_of(event) for event in m.rest()] == ["upstream_idle"]
    assert m.end().events == 1


def test_the_first_bytes_go_while_a_stop_comes(move: MakeMoved) -> None:
    """A hundred streams that are stopped just as they begin: each has one end, whole for HTTP."""
    for number in range(100):
        m = move(chunked=True)
        m.say(EVENT)
        stop = threading.Timer(number / 50_000, m.stream.abort, [Cause.CANCEL])
        stop.start()
        m.start()
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += m.take(1)
        assert m.end().cause is Cause.CANCEL
        assert data.count(HEAD) == 1
        stop.join(5)


def test_a_client_of_another_family(move: MakeMoved) -> None:
    """A socket that is no TCP is moved to as well: nginx may come over a Unix socket."""
    m = move()
    m.stream.client.release()  # type: ignore[union-attr]
    for sock in (m.server, m.client):
        sock.close()
    m.server, m.client = socket.socketpair()
    m.exchange.sock = m.server
    m.client.settimeout(10)
    m.say(EVENT, DONE)
    assert b"".join(m.rest()) == EVENT + DONE


def test_the_test_sees_what_is_left(loop: Loop) -> None:
    """The check at the end of all these tests would pass on nothing: here is what it sees."""
    ours, theirs = connected(None)
    with ours, theirs:
        loop.on_readable(ours.fileno(), lambda: None)
        with pytest.raises(AssertionError):
            assert_at_rest(loop)
        loop.forget_ready(ours.fileno())
    timer = loop.call_later(60, lambda: None)
    with pytest.raises(AssertionError):
        assert_at_rest(loop)
    loop.cancel(timer)
