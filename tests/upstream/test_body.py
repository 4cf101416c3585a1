"""body: an answer read from its socket, by a thread that waits and by the loop."""

from __future__ import annotations

import contextlib
import gc
import http.client
import io
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from chatstream.errors import UpstreamError
from chatstream.stream.forms import EventStream
from chatstream.stream.outcome import Cause
from chatstream.stream.stream import Stream
from tests.conftest import eventually
from tests.upstream.peer import (
    CHUNKED,
    DONE,
    EVENT,
    HEAD,
    SSE,
    UNTIL_CLOSE,
    WHOLE,
    MakeProvider,
    MakeUpstream,
    Peer,
    ReachedBy,
    Script,
    always_says,
    answer,
    chunk,
    floods,
    gives_up_soon,
    on_a_sign,
    opened,
    rest_of,
    says,
    whole_call,
)

ARRIVALS = {
    "with the headers": ([UNTIL_CLOSE + EVENT], [DONE]),
    "after the headers": ([UNTIL_CLOSE, EVENT], [DONE]),
    "in a chunk": ([CHUNKED, chunk(EVENT)], [chunk(DONE) + chunk(b"")]),
    "in bytes": ([CHUNKED, chunk(EVENT)], [b"%c" % byte for byte in chunk(DONE) + chunk(b"")]),
}


@pytest.mark.parametrize(("first", "rest"), ARRIVALS.values(), ids=ARRIVALS)
def test_a_body_arrives_as_it_comes(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    first: list[bytes],
    rest: list[bytes],
) -> None:
    """Case 9: no event is held back, chunked or not, and the framing is gone from it."""
    script, go_on = on_a_sign(first, *rest, stays=UNTIL_CLOSE not in first[0])
    body = opened(upstream(provider(script).url), stream)
    assert body.receive(5) == EVENT
    go_on.set()
    assert rest_of(body) == DONE
    body.close()


def test_a_receive_gives_up_and_can_be_tried_again(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Silence is a TimeoutError after the given time; what comes later is not lost."""
    script, go_on = on_a_sign([CHUNKED, b"5\r\n"], b"hello\r\n0\r\n\r\n")
    body = opened(upstream(provider(script).url), stream)
    for timeout in (0.0, 0.05):
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            body.receive(timeout)
        assert timeout <= time.monotonic() - begin < 2
    go_on.set()
    assert rest_of(body) == b"hello"
    body.close()


@pytest.mark.parametrize("timeouts", [(0.0, 0.2, 0.0, 0.05), (0.1, 0.1, 0.8, 0.001)])
def test_each_receive_has_its_own_timeout(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, timeouts: tuple[float, ...]
) -> None:
    """Timeouts of any order and length are kept, on a connection that had others before."""
    silent = CHUNKED + chunk(EVENT)

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(WHOLE)
        says(silent)(peer)

    us = upstream(provider(script).url)
    whole_call(us)
    body = opened(us, stream)
    assert body.receive(5) == EVENT
    for timeout in timeouts:
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            body.receive(timeout)
        assert timeout * 0.99 <= time.monotonic() - begin < timeout + 0.6
    body.close()


def test_a_body_larger_than_any_buffer(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """Megabytes come through whole."""
    large = os.urandom(3_000_000)
    there = provider(says(answer("200 OK", SSE, body=large)))
    assert whole_call(upstream(there.url)) == large


HEADS = (io.BufferedReader, http.client.HTTPMessage)
"""What http.client reads a head with, and into."""


@pytest.mark.parametrize("scheme", ["http:", "https:"])
def test_an_open_body_keeps_nothing_of_its_head(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    tls: Callable[[Script], Script],
    scheme: str,
) -> None:
    """Neither the buffer it was read with nor what was parsed; the connection is reused even so."""
    go = threading.Event()

    def script(peer: Peer) -> None:
        while peer.request():
            peer.send(CHUNKED + chunk(EVENT))
            assert go.wait(10)
            peer.send(chunk(DONE) + chunk(b""))

    there = provider(tls(script) if scheme == "https:" else script)
    us = upstream(there.url.replace("http:", scheme))
    before = sum(isinstance(found, HEADS) for found in gc.get_objects())
    body = opened(us, stream)
    assert body.receive(5) == EVENT
    assert sum(isinstance(found, HEADS) for found in gc.get_objects()) == before
    go.set()
    assert body.receive(5) == DONE
    assert body.receive(5) == b""
    body.close()
    assert whole_call(us) == EVENT + DONE
    assert len(there.peers) == 1


# One that breaks


BREAKS = {
    "chunk cut off": (CHUNKED + chunk(EVENT), b"ff\r\nda", "close"),
    "no last chunk": (CHUNKED + chunk(EVENT), b"", "close"),
    "length cut off": (HEAD + b"Content-Length: 999\r\n\r\n" + EVENT, b"", "close"),
    "bad chunk": (CHUNKED + chunk(EVENT), b"zz\r\n", "stay"),
    "reset": (UNTIL_CLOSE + EVENT, b"", "reset"),
}


@pytest.mark.parametrize("detached", [False, True], ids=["waiting", "detached"])
@pytest.mark.parametrize(("first", "last", "how"), BREAKS.values(), ids=BREAKS)
def test_a_body_that_breaks_off_is_truncated(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    first: bytes,
    last: bytes,
    how: str,
    detached: bool,
) -> None:
    """What was announced and did not come is `upstream_truncated`, never a clean end.

    Case 16: a reset too is a fault with a code, no OSError for the caller.
    """
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(first)
        assert go_on.wait(10)
        peer.send(last)
        if how == "reset":
            peer.reset()
        elif how == "stay":
            peer.wait_closed()

    body = opened(upstream(provider(script).url), stream)
    if detached:
        body.detach()
    read = body.receive_now if detached else lambda: body.receive(5)
    assert eventually(read, "the event") == EVENT
    go_on.set()
    with pytest.raises(UpstreamError) as caught:
        eventually(lambda: read() == b"", "an end or a fault")
    assert caught.value.code == "upstream_truncated"
    assert isinstance(caught.value.__cause__, OSError) is (how == "reset")
    body.close()


@pytest.mark.parametrize("detached", [False, True], ids=["waiting", "detached"])
def test_a_bad_chunk_beside_the_headers_is_a_fault_of_the_provider(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, detached: bool
) -> None:
    """Bad framing that comes in one segment with the headers has the same code as later."""
    there = provider(says(CHUNKED + b"zz\r\n"))
    body = opened(upstream(there.url), stream)
    if detached:
        body.detach()
    with pytest.raises(UpstreamError) as caught:
        eventually(lambda: body.receive_now() if detached else body.receive(5), "the fault")
    assert caught.value.code == "upstream_truncated"
    body.close()
    assert there.closed.wait(5)


@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "tls"])
def test_a_body_whose_provider_vanished_is_truncated(
    provider: MakeProvider,
    upstream: MakeUpstream,
    tls: Callable[[Script], Script],
    monkeypatch: pytest.MonkeyPatch,
    over_tls: bool,
) -> None:
    """The kernel's ETIMEDOUT is a fault, not a receive that may be tried again."""
    gives_up_soon(monkeypatch)
    over = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED + chunk(EVENT))
        assert over.wait(10)  # reads no more

    there = provider(tls(script) if over_tls else script)
    body = opened(upstream(there.url.replace("http:", "https:") if over_tls else there.url))
    assert body.receive(5) == EVENT
    raw = socket.socket(fileno=os.dup(body._sock.fileno()))  # type: ignore[attr-defined]
    with raw, contextlib.suppress(BlockingIOError):
        while True:
            raw.send(bytes(65536), socket.MSG_DONTWAIT)  # until its window is shut
    try:
        with pytest.raises(UpstreamError) as caught:
            body.receive(5)
    finally:
        over.set()
        body.close()
    assert caught.value.code == "upstream_truncated"
    if not over_tls:  # there Python takes it for an end of the connection
        assert "Errno 110" in caught.value.detail


# One that floods


def test_a_drain_is_bounded_in_time(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """A provider that floods after `[DONE]` is not read for longer than the drain may take."""
    there = provider(floods(CHUNKED + chunk(DONE), chunk(b"x") * 100_000))
    body = opened(upstream(there.url), stream)
    body.receive(5)
    stream.complete()
    begin = time.monotonic()
    body.drain(0.05)
    assert time.monotonic() - begin < 1
    body.close()


def test_a_receive_is_bounded_in_time(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Bytes that are no body (trailers without end) do not keep `receive` beyond its timeout."""
    there = provider(floods(CHUNKED + chunk(EVENT) + b"0\r\n", b"a: b\r\n" * 50_000))
    body = opened(upstream(there.url), stream)
    assert body.receive(5) == EVENT
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        body.receive(0.05)
    assert time.monotonic() - begin < 1
    body.close()


# A stop


SILENT = {
    "chunked": ("plain", CHUNKED + chunk(EVENT)),
    "until close": ("plain", UNTIL_CLOSE + EVENT),
    "tls": ("tls", CHUNKED + chunk(EVENT)),
}


@pytest.mark.parametrize(("way", "said"), SILENT.values(), ids=SILENT)
def test_a_stop_in_a_silent_body(
    reached: ReachedBy, upstream: MakeUpstream, stream: Stream, way: str, said: bytes
) -> None:
    """Case 1, body: the reader wakes, also inside the TLS layer, to an end or a provider's fault.

    The provider sees the close, and the connection is not reused.
    """

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(said)
        with contextlib.suppress(OSError):  # TLS without its goodbye
            peer.wait_closed()
        peer.provider.closed.set()

    there, url = reached(way, script)
    us = upstream(url)
    body = opened(us, stream)
    assert body.receive(5) == EVENT
    with pytest.raises(TimeoutError):
        body.receive(0.02)
    woken = threading.Event()

    def read() -> None:
        with contextlib.suppress(UpstreamError):
            assert body.receive(60) == b""
        woken.set()

    reader = threading.Thread(target=read)
    reader.start()
    stream.abort(Cause.CANCEL)
    assert there.closed.wait(5)
    assert woken.wait(5)
    reader.join(5)
    body.close()
    opened(us, EventStream("s", "t-2")).close()
    assert len(there.peers) == 2


def test_a_stop_that_nobody_reads_through(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Case 1, busy reader: a stop needs no thread that reads the body."""
    there = provider(floods(UNTIL_CLOSE, EVENT * 100))
    body = opened(upstream(there.url), stream)
    eventually(lambda: body.receive(5))
    stream.abort(Cause.CLIENT)
    eventually(lambda: not [t for t in there._threads[1:] if t.is_alive()], patience=2)
    body.close()


# As the loop reads it


def test_a_detached_body_never_waits(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """What came with the headers first; then None for nothing there, b"" for the end, ever after.

    The descriptor it gives is the socket's own: that shows when there is more.
    """
    script, go_on = on_a_sign([CHUNKED + chunk(EVENT)], chunk(DONE), chunk(b""))
    body = opened(upstream(provider(script).url), stream)
    fd = body.detach()
    assert body.receive_now() == EVENT
    assert [body.receive_now(), body.receive_now()] == [None, None]
    assert not body.more
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    go_on.set()
    got = b""
    while not got.endswith(DONE):
        assert poll.poll(5000)
        got += body.receive_now() or b""
    assert got == DONE
    eventually(lambda: body.receive_now() == b"", "the end")
    assert body.receive_now() == b""
    assert body.more, "the end is known, whatever the socket shows"
    stream.complete()
    body.close()


def test_a_detached_bodys_connection_serves_the_next_stream(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """Its timeouts are the next call's own: also for one that waits."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    for _ in range(2):
        stream = EventStream("s", "t")
        body = opened(us, stream)
        body.detach()
        eventually(lambda body=body: body.receive_now() == b"", "the end")  # type: ignore[misc]
        stream.complete()
        body.close()
        assert whole_call(us) == EVENT + DONE
    assert len(there.peers) == 1


@pytest.mark.parametrize("size", [1000, 12_000, 16_000])
def test_a_detached_tls_body_says_what_is_left(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    tls: Callable[[Script], Script],
    size: int,
) -> None:
    """Of one record http.client takes a part with the headers. The socket shows none of the rest,
    so as long as there is some `more` says so.
    """
    event = b"data: " + b"x" * (size - 8) + b"\n\n"
    script, go_on = on_a_sign([CHUNKED + chunk(event)])
    there = provider(tls(script))
    body = opened(upstream(there.url.replace("http:", "https:")), stream)
    fd = body.detach()
    got = body.receive_now() or b""
    while body.more:
        got += body.receive_now() or b""
    assert got == event
    assert body.receive_now() is None
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == []
    stream.abort(Cause.CANCEL)
    go_on.set()
    body.close()


def test_a_detached_body_is_drained_once(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop has waited for the provider's end; no thread does so again."""
    body: Any = opened(upstream(provider(says(CHUNKED + chunk(DONE))).url), stream)
    asked: list[float] = []
    monkeypatch.setattr(body, "receive", lambda timeout: asked.append(timeout) or b"")
    body.drain(1.0)
    assert len(asked) == 1
    body.detach()
    body.drain(1.0)
    assert len(asked) == 1
    body.close()
