"""faults: what a provider does wrong, and faults on the way to it, as our errors."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from chatstream.dialects.openai_chat import sentence
from chatstream.errors import Busy, StreamError, UpstreamError
from chatstream.stream.stream import Stream
from chatstream.upstream import faults
from tests.conftest import descriptors, eventually
from tests.upstream.peer import (
    KEY,
    PAYLOAD,
    REJECTED,
    WHOLE,
    BlackHole,
    MakeProvider,
    MakeUpstream,
    Peer,
    Script,
    always_says,
    gives_up_soon,
    opened,
    refused,
    says,
    says_and_closes,
)


@pytest.mark.parametrize(
    ("value", "passed"),
    [
        ("7", "7"),
        ("Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:00 GMT"),
        ("soon", None),
        ("1.5", None),
        ("-1", None),
        (None, None),
    ],
)
def test_when_to_come_back(value: str | None, passed: str | None) -> None:
    """The provider's Retry-After where it is one, seconds or a date."""
    error = faults.refused(429, value, lambda: "")
    assert error is not None
    assert error.retry_after == passed


REJECTIONS = {
    "OpenAI's": (REJECTED, "max_tokens is too large"),
    "text": (b'{"error": "max_tokens is too large"}', "max_tokens is too large"),
    "with the key": (
        b'{"error":{"message":"key sk-very-secret may not, sk-very-secret"}}',
        "key [key] may not, [key]",
    ),
    "long": (b'{"error":{"message":"%s"}}' % (b"x" * 5000), "x" * 1000),
    "half a surrogate pair": (rb'{"error":{"message":"a\ud800b"}}', "a?b"),
    "not JSON": (b"<h1>Bad Request</h1>", None),
    "no error": (b'{"detail":"x"}', None),
    "a list": (b'["x"]', None),
    "a number": (b'{"error":{"message":7}}', None),
    "nothing": (b"", None),
    "deep": (b"[" * 60_000, None),
}


@pytest.mark.parametrize(("body", "message"), REJECTIONS.values(), ids=REJECTIONS)
def test_a_rejection(body: bytes, message: str | None) -> None:
    """The provider's sentence, without our key and of bounded length; else one of ours."""
    error = faults.refused(400, None, lambda: sentence(body, KEY))
    assert error is not None
    assert error.message == message or (message is None and "(400)" in error.message)


# No connection


def test_a_closed_port_is_a_connect_error(upstream: MakeUpstream, stream: Stream) -> None:
    """Nobody listens: `upstream_connect`, and the log is told what the kernel said."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        error = refused(upstream(f"http://127.0.0.1:{sock.getsockname()[1]}/"), stream)
    assert (error.code, error.status) == ("upstream_connect", 502)
    assert "refused" in error.detail.lower()
    assert error.__cause__ is not None


@pytest.mark.parametrize(
    "found",
    [socket.gaierror(socket.EAI_NONAME, "Name or service not known"), []],
    ids=["unknown", "without an address"],
)
def test_a_name_that_leads_nowhere_is_a_connect_error(
    upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch, found: list[Any] | Exception
) -> None:
    """A name that does not resolve, or to nothing: `upstream_connect`."""

    def answered(*arguments: Any) -> list[Any]:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(socket, "getaddrinfo", answered)
    assert refused(upstream("http://provider.test/")).code == "upstream_connect"


def test_a_silent_address_is_a_connect_error(upstream: MakeUpstream, black_hole: BlackHole) -> None:
    """No answer to the SYN within the connect timeout: `upstream_connect`."""
    error = refused(upstream(black_hole.url, upstream_connect_timeout=0.1))
    assert (error.code, error.status) == ("upstream_connect", 502)


@pytest.mark.parametrize("speaks", ["plain", "tls"])
def test_a_handshake_that_fails_is_a_connect_error(
    provider: MakeProvider,
    upstream: MakeUpstream,
    tls: Callable[[Script], Script],
    monkeypatch: pytest.MonkeyPatch,
    speaks: str,
) -> None:
    """The key is sent neither to who speaks no TLS nor to who cannot prove its name."""

    def script(peer: Peer) -> None:
        if speaks == "plain":
            peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with contextlib.suppress(ssl.SSLError):
            tls(always_says(WHOLE))(peer)

    there = provider(script)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert refused(upstream(there.url.replace("http:", "https:"))).code == "upstream_connect"
    assert there.requests == []


def test_a_name_that_cannot_be_asked_for_is_busy(
    upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor a resolver may say that there is no such name; that is no fault of its.

    The limit is the process's: what is tried meanwhile gets no descriptor.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def unknown(*arguments: Any) -> list[Any]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    call = upstream("http://provider.test/")
    try:
        error = refused(call)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (error.code, error.status) == ("busy", 503)


@pytest.mark.parametrize("left", [0, 1], ids=["none for the socket", "none for the handle"])
def test_no_descriptor_is_busy(upstream: MakeUpstream, stream: Stream, left: int) -> None:
    """EMFILE is the worker's trouble, a 503; not the provider's, a 502."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        us = upstream(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        probes = [os.dup(0) for _ in range(left + 1)]
        for probe in probes:
            os.close(probe)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probes[-1], limits[1]))
        try:
            with pytest.raises(StreamError) as caught:
                us.open(PAYLOAD, stream)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    stream.fail(caught.value)
    assert isinstance(caught.value, Busy)


# No answer


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTTP/1.1 2", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200],
    ids=["nothing", "half a status line", "another protocol", "endless headers"],
)
def test_a_connection_that_ends_without_an_answer(
    provider: MakeProvider, upstream: MakeUpstream, raw: bytes
) -> None:
    """What is no HTTP answer: `upstream_unreachable`; a fresh connection is not dialled again."""
    there = provider(says_and_closes(raw))
    error = refused(upstream(there.url))
    assert (error.code, error.status) == ("upstream_unreachable", 502)
    assert len(there.requests) == 1


def test_a_call_that_failed_keeps_nothing(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """The connection is given back with the error, not when the stream is told of it."""
    there = provider(says(b"SSH-2.0-OpenSSH_9\r\n"))
    us = upstream(there.url)
    before = descriptors()
    with pytest.raises(UpstreamError):
        opened(us, stream)
    assert there.closed.wait(5)
    eventually(lambda: descriptors() <= before, "descriptors as before")


def test_headers_that_do_not_come_are_a_timeout(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """No headers within the headers timeout: `upstream_timeout`, a 504, after one request."""
    there = provider(says())
    error = refused(upstream(there.url, upstream_headers_timeout=0.1))
    assert (error.code, error.status) == ("upstream_timeout", 504)
    assert len(there.requests) == 1


def test_a_provider_that_vanished_before_its_headers_is_unreachable(
    upstream: MakeUpstream, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's ETIMEDOUT is no timeout of ours: `upstream_unreachable`, and what it said."""
    gives_up_soon(monkeypatch)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # and nobody reads
        us = upstream(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat")
        with pytest.raises(UpstreamError) as caught:
            us.open(bytes(50_000), stream)
        stream.fail(caught.value)
    assert (caught.value.code, caught.value.status) == ("upstream_unreachable", 502)
    assert "Errno 110" in caught.value.detail
