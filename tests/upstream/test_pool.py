"""pool: which connections are kept for the next stream, and for how long."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable

import pytest

from chatstream.errors import StreamAborted, UpstreamError
from chatstream.sockets.handle import SocketHandle
from chatstream.stream.forms import EventStream
from chatstream.stream.outcome import Cause
from chatstream.stream.stream import Stream
from tests.conftest import descriptors, eventually
from tests.upstream.peer import (
    CHUNKED,
    DONE,
    EVENT,
    HEAD,
    JSON,
    PAYLOAD,
    REJECTED,
    SSE,
    UNTIL_CLOSE,
    WAYS,
    WHOLE,
    Call,
    MakeProvider,
    MakeUpstream,
    Peer,
    ReachedBy,
    Script,
    always_says,
    answer,
    chunk,
    opened,
    refused,
    rest_of,
    says,
    says_and_closes,
    states_to,
    whole_call,
)


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_answers_connection_is_reused(
    reached: ReachedBy, upstream: MakeUpstream, way: str
) -> None:
    """Streams one after the other take one connection; TLS and proxies change nothing of it."""
    there, url = reached(way, always_says(WHOLE))
    us = upstream(url)
    assert [whole_call(us) for _ in range(5)] == [EVENT + DONE] * 5
    assert [request.body for request in there.requests if request.body] == [PAYLOAD] * 5
    assert len(there.peers) == 1


def test_a_drained_answers_connection_is_reused(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """`[DONE]` is seen before the body's end has come; draining the rest saves the connection."""
    late = threading.Event()

    def script(peer: Peer) -> None:
        while peer.request():
            peer.send(CHUNKED + chunk(DONE))
            late.wait(10)
            peer.send(chunk(b""))
        peer.wait_closed()

    there = provider(script)
    us = upstream(there.url)
    body = opened(us, stream)
    assert body.receive(5) == DONE
    stream.complete()
    threading.Timer(0.02, late.set).start()
    body.drain(5)
    body.close()
    assert whole_call(us) == DONE
    assert len(there.peers) == 1


def test_an_answer_that_goes_on_is_not_waited_for(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """A provider that keeps its body open after `[DONE]` loses the connection."""
    there = provider(says(CHUNKED + chunk(DONE)))
    body = opened(upstream(there.url), stream)
    assert body.receive(5) == DONE
    stream.complete()
    body.drain(0.05)
    body.close()
    body.close()
    assert there.closed.wait(5)


NOT_REUSABLE = {
    "until close": HEAD + b"\r\n" + DONE,
    "Connection: close": UNTIL_CLOSE.replace(b"\r\n\r\n", b"\r\nContent-Length: 14\r\n\r\n") + DONE,
    "bytes after the last chunk": WHOLE + b"HTTP/1.1 200 OK",
    "bytes after the length": answer("200 OK", SSE, body=DONE) + b"\r\n",
    "HTTP/1.0": answer("200 OK", SSE, body=DONE).replace(b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize("detached", [False, True], ids=["waiting", "detached"])
@pytest.mark.parametrize("raw", NOT_REUSABLE.values(), ids=NOT_REUSABLE)
def test_what_cannot_be_reused_is_closed(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, raw: bytes, detached: bool
) -> None:
    """A connection that must not or cannot carry another request is closed with its answer."""
    there = provider(says(raw))
    body = opened(upstream(there.url), stream)
    if detached:
        body.detach()
    eventually(lambda: body.receive_now() if detached else body.receive(5), "the answer")
    stream.complete()
    body.drain(0.02)
    body.close()
    assert there.closed.wait(5)


def test_no_more_idle_connections_than_slots(
    provider: MakeProvider, upstream: MakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Six streams at once leave at most four idle connections, silently."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    streams = [EventStream("s", f"t-{n}") for n in range(6)]
    bodies = [opened(us, stream) for stream in streams]
    for stream, body in zip(streams, bodies, strict=True):
        rest_of(body)
        stream.complete()
        body.close()
    eventually(lambda: states_to(there.address[1]).count("01") == 4)
    assert caplog.records == []
    bodies = [opened(us, EventStream("s", f"u-{n}")) for n in range(4)]
    assert len(there.peers) == 6
    for body in bodies:
        rest_of(body)
        body.close()


# Late stops


def test_a_late_stop_does_not_reach_the_next_stream(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Case 4: the body's end puts the connection back; a stop after that kills nobody's request.

    Here the stream's verdict is still open when its connection is already another's.
    """
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(WHOLE)
        peer.request()
        peer.send(CHUNKED, chunk(EVENT))
        assert go_on.wait(10)
        peer.send(chunk(DONE) + chunk(b""))
        peer.wait_closed()

    there = provider(script)
    us = upstream(there.url)
    body = opened(us, stream)
    rest_of(body)
    body.close()
    following = EventStream("s", "t-2")
    next_body = opened(us, following)
    assert next_body.receive(5) == EVENT
    assert stream.abort(Cause.CANCEL) is True
    go_on.set()
    assert rest_of(next_body) == DONE
    following.complete()
    next_body.close()
    assert len(there.peers) == 1


def test_a_late_stop_after_a_refusal_does_not_reach_the_next_stream(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Case 4 for a refusal, whose body was read to its end before the error is even raised."""
    answers = iter([answer("400 Bad", JSON, body=REJECTED), WHOLE])

    def script(peer: Peer) -> None:
        while peer.request():
            peer.send(next(answers))
        peer.wait_closed()

    there = provider(script)
    us = upstream(there.url)
    with pytest.raises(UpstreamError):
        opened(us, stream)
    assert stream.abort(Cause.CANCEL) is True
    assert whole_call(us) == EVENT + DONE
    assert len(there.peers) == 1


def test_a_stop_after_the_last_byte_keeps_the_connection_out_of_the_pool(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """The whole body is here, the stream is aborted before it was closed: nothing is put back."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    body = opened(us, stream)
    rest_of(body)
    stream.abort(Cause.CANCEL)
    body.close()
    assert there.closed.wait(5)
    assert whole_call(us) == EVENT + DONE
    assert len(there.peers) == 2


# Connections that die


def ends_second_request(end: Callable[[Peer], None]) -> Script:
    """A provider whose first connection dies with its second request; the others serve."""

    def script(peer: Peer) -> None:
        while peer.request():
            if peer.number == 1 and len(peer.provider.requests) == 2:
                end(peer)
                return
            peer.send(WHOLE)
        peer.wait_closed()

    return script


@pytest.mark.parametrize(
    "end", [lambda peer: None, lambda peer: peer.reset()], ids=["closed", "reset"]
)
def test_a_stale_connection_is_dialled_once_more(
    provider: MakeProvider,
    upstream: MakeUpstream,
    caplog: pytest.LogCaptureFixture,
    end: Callable[[Peer], None],
) -> None:
    """A reused connection that dies before a response byte: once more, and the log says so."""
    caplog.set_level(logging.INFO, "chatstream")
    there = provider(ends_second_request(end))
    us = upstream(there.url)
    assert [whole_call(us), whole_call(us)] == [EVENT + DONE] * 2
    assert len(there.requests) == 3
    assert len(there.peers) == 2
    assert {request.body for request in there.requests} == {PAYLOAD}
    assert "calling once more" in caplog.text


def test_a_stale_connection_is_dialled_only_once_more(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """Case 3: when the fresh connection dies too, that is the end, whatever the pool has."""
    both_in = threading.Barrier(2, timeout=10)

    def script(peer: Peer) -> None:
        peer.request()
        if peer.number <= 2:
            both_in.wait()
            peer.send(WHOLE)
            peer.request()

    there = provider(script)
    us = upstream(there.url)
    calls = [threading.Thread(target=whole_call, args=(us,)) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(10)
    assert refused(us).code == "upstream_unreachable"
    assert len(there.requests) == 4
    assert len(there.peers) == 3


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda peer: peer.send(b"H"), "upstream_unreachable"),
        (lambda peer: peer.wait_closed(), "upstream_timeout"),
    ],
    ids=["a first byte", "a time"],
)
def test_who_may_be_at_work_is_not_called_again(
    provider: MakeProvider, upstream: MakeUpstream, end: Callable[[Peer], None], code: str
) -> None:
    """An answer that began, and one that takes too long, may cost tokens: no second request."""
    there = provider(ends_second_request(end))
    us = upstream(there.url, upstream_headers_timeout=0.3)
    whole_call(us)
    assert refused(us).code == code
    assert len(there.requests) == 2


def test_a_stop_is_not_followed_by_another_call(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """A stop makes the reused connection die, too: nothing is dialled after it."""
    there = provider(ends_second_request(lambda peer: peer.wait_closed()))
    us = upstream(there.url)
    whole_call(us)
    call = Call(us, stream)
    eventually(lambda: len(there.requests) == 2)
    stream.abort(Cause.CANCEL)
    assert isinstance(call.error(), StreamAborted)
    assert there.closed.wait(5)
    assert (len(there.requests), len(there.peers)) == (2, 1)


def test_a_connection_closed_while_idle_is_replaced_silently(
    provider: MakeProvider, upstream: MakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """An idle connection whose FIN is here is not even tried."""
    caplog.set_level(logging.INFO, "chatstream")
    there = provider(says_and_closes(WHOLE))
    us = upstream(there.url)
    whole_call(us)
    eventually(lambda: states_to(there.address[1]) == ["08"])  # CLOSE_WAIT
    whole_call(us)
    assert len(there.requests) == 2
    assert caplog.records == []


# Idle ones


def test_an_idle_connection_is_ended_after_its_time(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unused connection gets its FIN without any further call; a later call dials anew."""
    monkeypatch.setattr("chatstream.upstream.pool.IDLE", 0.1)
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    for number in (1, 2):
        whole_call(us)
        assert len(there.peers) == number
        assert there.closed.wait(5)
        there.closed.clear()


def test_a_connection_can_be_closed_while_it_is_swept(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` finds each idle connection, also the one that the loop is ending in that moment."""
    monkeypatch.setattr("chatstream.upstream.pool.IDLE", 0.05)
    swept, go_on = threading.Event(), threading.Event()
    shutdown = SocketHandle.shutdown

    def interrupted(handle: SocketHandle) -> None:
        shutdown(handle)
        swept.set()
        assert go_on.wait(10)

    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    whole_call(us)
    monkeypatch.setattr(SocketHandle, "shutdown", interrupted)
    assert swept.wait(5)
    us.close()
    go_on.set()
    assert there.closed.wait(5)


def test_a_connection_in_use_is_not_ended_by_the_sweep(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch, stream: Stream
) -> None:
    """A connection that was idle once and is busy again is left alone, however long it takes."""
    monkeypatch.setattr("chatstream.upstream.pool.IDLE", 0.15)
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(WHOLE)
        peer.request()
        peer.send(CHUNKED + chunk(EVENT))
        go_on.wait(0.5)
        peer.send(chunk(DONE) + chunk(b""))
        peer.wait_closed()

    there = provider(script)
    us = upstream(there.url)
    whole_call(us)
    body = opened(us, stream)
    assert rest_of(body) == EVENT + DONE
    stream.complete()
    body.close()
    assert len(there.peers) == 1
    assert there.closed.wait(5)


def test_close_ends_the_idle_connections(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """`close` gives the idle connections back at once, without a warning of Python's."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    whole_call(us)
    before = descriptors()
    us.close()
    gc.collect()
    assert there.closed.wait(5)
    assert descriptors() < before


def test_what_comes_back_after_close_is_closed(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """An answer that is whole only then leaves no connection, and has no sweep begin."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    body = opened(us, stream)
    us.close()
    assert rest_of(body) == EVENT + DONE
    stream.complete()
    body.close()
    assert there.closed.wait(5)
