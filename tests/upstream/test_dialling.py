"""dialling: connecting, and a stop of it in every phase."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

import pytest

from chatstream.errors import StreamAborted
from chatstream.stream.outcome import Cause, Phase
from chatstream.stream.stream import Stream
from chatstream.upstream import dialling
from tests.conftest import eventually
from tests.upstream.peer import (
    DONE,
    EVENT,
    PAYLOAD,
    WAYS,
    WHOLE,
    BlackHole,
    Call,
    MakeProvider,
    MakeUpstream,
    ReachedBy,
    always_says,
    gives_up_soon,
    opened,
    refused,
    resolves_to,
    says,
    states_to,
    whole_call,
)


@pytest.mark.parametrize("way", WAYS)
def test_a_provider_that_vanishes_will_be_noticed(
    reached: ReachedBy, upstream: MakeUpstream, way: str
) -> None:
    """The kernel probes the connection, whether to the provider or to a proxy."""
    _, url = reached(way, always_says(WHOLE))
    body = opened(upstream(url))
    sock = body._sock  # type: ignore[attr-defined]
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert timeout == dialling.USER_TIMEOUT * 1000
    body.close()


def test_a_connect_has_its_own_timeout(
    upstream: MakeUpstream, black_hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a SYN may take is a setting; the kernel must not give up before."""
    gives_up_soon(monkeypatch)
    started = time.monotonic()
    error = refused(upstream(black_hole.url, upstream_connect_timeout=2.5))
    assert error.code == "upstream_connect"
    assert time.monotonic() - started > 2.4


@pytest.mark.parametrize("first", ["black hole", "closed port"])
def test_the_second_address_is_tried_when_the_first_fails(
    provider: MakeProvider,
    upstream: MakeUpstream,
    black_hole: BlackHole,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:
    """Without a stop the next address gets its turn, after a refusal and after a timeout."""
    there = provider(says(WHOLE))
    us = upstream("http://provider.test/v1/chat", upstream_connect_timeout=0.2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = black_hole.address if first == "black hole" else closed.getsockname()
        resolves_to(monkeypatch, address, there.address)
        assert whole_call(us) == EVENT + DONE
    assert len(there.requests) == 1


# Stopping


def test_a_stop_while_connecting(
    upstream: MakeUpstream, black_hole: BlackHole, stream: Stream
) -> None:
    """Case 1, SYN: the call ends at once, not after the connect timeout."""
    call = Call(upstream(black_hole.url, upstream_connect_timeout=60), stream)
    eventually(black_hole.dialled)
    assert stream.phase is Phase.CONNECTING
    stream.abort(Cause.CANCEL)
    assert isinstance(call.error(), StreamAborted)
    eventually(lambda: not black_hole.dialled())


def test_after_a_stop_no_further_address_is_tried(
    provider: MakeProvider,
    upstream: MakeUpstream,
    black_hole: BlackHole,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two addresses, the first a black hole: after a stop no second SYN is sent, and no POST."""
    there = provider(says(WHOLE))
    us = upstream("http://provider.test/v1/chat", upstream_connect_timeout=60)
    resolves_to(monkeypatch, black_hole.address, there.address)
    call = Call(us, stream)
    eventually(black_hole.dialled)
    stream.abort(Cause.CANCEL)
    assert isinstance(call.error(), StreamAborted)
    assert there.peers == []
    assert states_to(there.address[1]) == []


def test_a_stop_during_the_name_lookup(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS cannot be woken; when its answer comes nothing is connected to any more."""
    there = provider(says(WHOLE))
    asked, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> list[Any]:
        asked.set()
        assert go_on.wait(10)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", there.address)]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    call = Call(upstream("http://provider.test/v1/chat"), stream)
    assert asked.wait(5)
    stream.abort(Cause.CANCEL)
    go_on.set()
    assert isinstance(call.error(), StreamAborted)
    assert there.peers == []


def test_a_stop_just_before_connect_sends_no_request(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shutdown before `connect()` is lost and the connect succeeds: it is ended all the same."""
    there = provider(says(WHOLE))
    connect_ex = socket.socket.connect_ex

    def stopped_just_before(sock: socket.socket, address: Any) -> int:
        stream.abort(Cause.CANCEL)
        return connect_ex(sock, address)

    monkeypatch.setattr(socket.socket, "connect_ex", stopped_just_before)
    with pytest.raises(StreamAborted):
        opened(upstream(there.url), stream)
    eventually(lambda: states_to(there.address[1]).count("01") == 0)
    assert there.requests == []


def test_a_stream_that_has_ended_calls_nobody(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """No connection is made, and none is taken from the pool, for a stream that is over."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    stream.abort(Cause.CANCEL)
    with pytest.raises(StreamAborted):
        opened(us, stream)
    assert there.peers == []
    whole_call(us)
    with pytest.raises(StreamAborted):
        opened(us, stream)
    assert len(there.requests) == 1
    assert whole_call(us) == EVENT + DONE
    assert len(there.peers) == 1


ASKED = rb"Authorization: Bearer .*\r\n\r\n" + re.escape(PAYLOAD)
SILENCES = {
    "handshake": ("https", False, rb"\x16.+", Phase.CONNECTING),
    "headers": ("http", False, rb"POST /v1/chat .*" + ASKED, Phase.HEADERS),
    "proxy": ("http", True, rb"POST http://provider\.test/v1/chat .*" + ASKED, Phase.HEADERS),
    "tunnel": ("https", True, rb"CONNECT provider\.test:443 [^{]*\r\n\r\n", Phase.CONNECTING),
}


@pytest.mark.parametrize(("scheme", "proxied", "pattern", "phase"), SILENCES.values(), ids=SILENCES)
def test_a_stop_before_the_headers(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    proxied: bool,
    pattern: bytes,
    phase: Phase,
) -> None:
    """Case 1: who takes what it is sent and says nothing is left at once, and not asked again.

    A server that shakes no hands, a provider that thinks, a proxy that waits for it, a proxy that
    does not connect.
    """
    there = provider(lambda peer: peer.wait_closed())
    host = f"127.0.0.1:{there.address[1]}"
    if proxied:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://{host}")
        host = "provider.test"
    us = upstream(f"{scheme}://{host}/v1/chat", upstream_connect_timeout=60)
    call = Call(us, stream)
    eventually(lambda: there.peers and re.fullmatch(pattern, there.peers[0].got, re.DOTALL))
    assert stream.phase is phase
    stream.abort(Cause.CANCEL)
    assert there.closed.wait(5)
    assert isinstance(call.error(), StreamAborted)
    assert b"Authorization" not in there.peers[0].got or phase is Phase.HEADERS
    assert len(there.peers) == 1
