"""upstream: the call to the provider, against scripted servers on real sockets."""

from __future__ import annotations

import contextlib
import gc
import http.client
import io
import logging
import os
import resource
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import responses
import trustme

from chatstream.errors import Busy, StreamAborted, StreamError, UpstreamError
from chatstream.settings.table import Settings
from chatstream.sockets.handle import SocketHandle
from chatstream.sockets.loop import Loop
from chatstream.stream.forms import EventStream
from chatstream.stream.outcome import Cause, Phase
from chatstream.stream.sides import Body
from chatstream.stream.stream import Stream
from chatstream.upstream import dialling
from chatstream.upstream.provider import Upstream
from tests.conftest import eventually

KEY = "sk-very-secret"
PAYLOAD = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = HEAD + b"Connection: close\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEADS = (io.BufferedReader, http.client.HTTPMessage)
"""What http.client reads a head with, and into."""

WHOLE = CHUNKED + chunk(EVENT) + chunk(DONE) + chunk(b"")


# The other side


@dataclass
class Request:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, provider: Provider, sock: socket.socket, number: int) -> None:
        self.number = number
        self.sock = sock
        self._provider = provider
        self._buffer = b""
        sock.settimeout(10)

    def request(self) -> Request | None:
        """The next whole request; None when the other side has closed."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (f.partition(": ") for f in fields)}
        length = int(headers.get("content-length", 0))
        while len(self._buffer) < length:
            if not self._more():
                return None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        request = Request(line, headers, body)
        self._provider.requests.append(request)
        return request

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            return False
        self._buffer += data
        return bool(data)

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_closed(self) -> None:
        """Returns when the other side has closed; the provider's `closed` is set."""
        while self._more():
            pass
        self._provider.closed.set()


Script = Callable[[Peer], None]


class Provider:
    """A server that does as its script says, a thread for each connection."""

    def __init__(self, script: Script) -> None:
        self.requests: list[Request] = []
        self.peers: list[Peer] = []
        self.closed = threading.Event()
        self.errors: list[BaseException] = []
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}/v1/chat"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.peers.append(Peer(self, sock, len(self.peers) + 1))
            thread = threading.Thread(target=self._serve, args=(self.peers[-1],))
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        try:
            self._script(peer)
        except ConnectionError:
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            peer.sock.close()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        assert self.errors == []


def says(*pieces: bytes) -> Script:
    """Answers one request with `pieces`, then waits for the other side to close."""

    def script(peer: Peer) -> None:
        if peer.request():
            peer.send(*pieces)
            peer.wait_closed()

    return script


def says_and_closes(*pieces: bytes) -> Script:
    def script(peer: Peer) -> None:
        if peer.request():
            peer.send(*pieces)

    return script


def always_says(answer: bytes) -> Script:
    """Answers every request of a connection."""

    def script(peer: Peer) -> None:
        while peer.request():
            peer.send(answer)
        peer.wait_closed()

    return script


class BlackHole:
    """An address that never answers a SYN: a listener whose queue is full."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}/v1/chat"
        self._fillers = [socket.socket() for _ in range(4)]
        for filler in self._fillers:
            filler.setblocking(False)
            filler.connect_ex(self.address)
        eventually(lambda: states_to(self.address[1]).count("02") >= 2)
        self._own = states_to(self.address[1]).count("02")

    def dialled(self) -> bool:
        """Whether a SYN that is not one of our own is on its way here."""
        return states_to(self.address[1]).count("02") > self._own

    def close(self) -> None:
        for sock in (*self._fillers, self._listener):
            sock.close()


def states_to(port: int) -> list[str]:
    """The TCP states of the connections towards `port`, as the kernel numbers them.

    Without TIME_WAIT, where an earlier test's connections lie whose port this may have been.
    """
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    return [row[3] for row in rows if row[2].endswith(f":{port:04X}") and row[3] != "06"]


# Our side


class Call(threading.Thread):
    """`Upstream.open` in a thread of its own, as in a server."""

    def __init__(self, upstream: Upstream, stream: Stream) -> None:
        super().__init__()
        self._upstream, self._stream = upstream, stream
        self._body: Body | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._body = self._upstream.open(PAYLOAD, self._stream)
        except BaseException as error:
            self._error = error

    def error(self) -> BaseException | None:
        """What `open` raised, within a time that no timeout of ours is as short as."""
        self.join(5)
        assert not self.is_alive()
        return self._error


def opened(upstream: Upstream, stream: Stream | None = None) -> Body:
    return upstream.open(PAYLOAD, stream or EventStream("s", "t"))


def rest_of(body: Body) -> bytes:
    return b"".join(iter(lambda: body.receive(5), b""))


def whole_call(upstream: Upstream, stream: Stream | None = None) -> bytes:
    """One stream from the request to its completion."""
    stream = stream or EventStream("s", "t")
    body = opened(upstream, stream)
    try:
        data = rest_of(body)
        stream.complete()
    finally:
        body.close()
    return data


def refused(upstream: Upstream, stream: Stream | None = None) -> StreamError:
    """The error with which a call ends. Ends its stream, too, as the caller has to."""
    stream = stream or EventStream("s", "t")
    with pytest.raises(StreamError) as caught:
        upstream.open(PAYLOAD, stream)
    stream.fail(caught.value)
    return caught.value


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a descriptor behind."""
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= threads, "threads as before")
    eventually(lambda: descriptors() <= fds, "descriptors as before")
    gc.collect(0)  # what was not closed but dropped warns now, and a warning is an error


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own proxies and certificates stay out of the tests."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def provider(nothing_left: None) -> Iterator[Callable[[Script], Provider]]:
    providers: list[Provider] = []

    def make(script: Script) -> Provider:
        providers.append(Provider(script))
        return providers[-1]

    yield make
    for one in providers:
        one.stop()


@pytest.fixture
def black_hole(nothing_left: None) -> Iterator[BlackHole]:
    hole = BlackHole()
    yield hole
    hole.close()


@pytest.fixture
def upstream(provider: Any) -> Iterator[Callable[..., Upstream]]:
    """Makes an Upstream for an address; closed before the provider stops."""
    loop, made = Loop(), []

    def make(url: str, **settings: Any) -> Upstream:
        settings = {"api_key": KEY, "upstream_url": url, **settings}
        made.append(Upstream(Settings(**settings), 4, loop.call_later))
        return made[-1]

    yield make
    for one in made:
        one.close()
    loop.stop()


@pytest.fixture
def stream() -> Stream:
    return EventStream("s", "t")


MakeProvider = Callable[[Script], Provider]
MakeUpstream = Callable[..., Upstream]


# The request


def test_what_the_provider_is_sent(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """The payload byte for byte, the key, and nothing that would encode or hold back the answer."""
    there = provider(says(WHOLE))
    whole_call(upstream(there.url))
    [request] = there.requests
    assert request.line == "POST /v1/chat HTTP/1.1"
    assert request.body == PAYLOAD
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers


@pytest.mark.parametrize("key", [KEY, ""])
def test_a_stream_may_have_headers_of_its_own(
    provider: MakeProvider, upstream: MakeUpstream, key: str
) -> None:
    """They are this call's only, and none of them takes the place of one of ours."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url, api_key=key)
    stream = EventStream("s", "t")
    ours = {
        "AUTHORIZATION": "Bearer evil",
        "Content-Type": "text/evil",
        "content-length": "1",
        "Content-Encoding": "evil",
        "Accept": "evil/*",
        "accept-encoding": "evil",
        "Accept-Language": "evil",
        "Host": "evil.test",
        "User-Agent": "evil",
        "Transfer-Encoding": "evil",
        "Connection": "evil",
        "Cookie": "evil",
        "Proxy-Authorization": "evil",
    }
    stream.headers = {"traceparent": "00-1-2-01", "X-Tenant": "7", **ours}
    whole_call(us, stream)
    whole_call(us)
    first, second = there.requests
    assert (first.headers.pop("traceparent"), first.headers.pop("x-tenant")) == ("00-1-2-01", "7")
    assert first == second
    assert "evil" not in str(first)


def test_a_header_that_would_be_two_is_none(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """A line's end in a value: nothing is sent, and the stream fails as any that cannot be."""
    there = provider(always_says(WHOLE))
    stream = EventStream("s", "t")
    stream.headers = {"X-Tenant": "7\r\nAuthorization: evil"}
    with pytest.raises(UpstreamError):
        upstream(there.url).open(PAYLOAD, stream)
    assert there.requests == []


@pytest.mark.parametrize(("key", "sent"), [(KEY, f"Bearer {KEY}"), ("", None)])
def test_a_netrc_does_not_replace_the_key(
    provider: MakeProvider,
    upstream: MakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    key: str,
    sent: str | None,
) -> None:
    """A .netrc on the machine changes nothing, with a key and without one."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login eve password evil\n")
    monkeypatch.setenv("NETRC", str(netrc))
    there = provider(says(WHOLE))
    whole_call(upstream(there.url, api_key=key))
    assert there.requests[0].headers.get("authorization") == sent


def test_cookies_are_not_kept(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """A provider's cookie does not travel from one user's stream to the next one's."""
    there = provider(always_says(WHOLE.replace(b"\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n", 1)))
    us = upstream(there.url)
    whole_call(us)
    whole_call(us)
    assert ["cookie" in request.headers for request in there.requests] == [False, False]


# The answer's status


def answer(status: str, *fields: str, body: bytes = b"") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*head, "", ""]).encode() + body


SSE = "Content-Type: text/event-stream"
JSON = "Content-Type: application/json"
REJECTED = b'{"error":{"message":"max_tokens is too large","type":"invalid_request_error"}}'
STATUSES = {
    "500": (answer("500 Oops"), "upstream_error", 502),
    "503": (answer("503 Overloaded", "Retry-After: 9"), "upstream_error", 502),
    "401": (answer("401 No", JSON, body=b'{"error":{"message":"bad key"}}'), "upstream_auth", 502),
    "403": (answer("403 No"), "upstream_auth", 502),
    "429": (answer("429 Slow down"), "upstream_rate_limited", 429),
    "400": (answer("400 Bad", JSON, body=REJECTED), "upstream_rejected", 400),
    "402": (answer("402 Pay", JSON, body=REJECTED), "upstream_rejected", 400),
    "404": (answer("404 Where"), "upstream_rejected", 400),
    "422": (answer("422 Bad", JSON, body=REJECTED), "upstream_rejected", 400),
    "301": (answer("301 Moved", "Location: /other"), "upstream_not_stream", 502),
    "307": (answer("307 Over there", "Location: /other", SSE), "upstream_not_stream", 502),
    "204": (answer("204 Nothing"), "upstream_not_stream", 502),
    "201": (answer("201 Made", SSE), "upstream_not_stream", 502),
    "JSON": (answer("200 OK", JSON, body=b"{}"), "upstream_not_stream", 502),
    "HTML": (answer("200 OK", "Content-Type: text/html"), "upstream_not_stream", 502),
    "no type": (answer("200 OK"), "upstream_not_stream", 502),
    "almost": (answer("200 OK", "Content-Type: text/event-streams"), "upstream_not_stream", 502),
    "gzip": (answer("200 OK", SSE, "Content-Encoding: gzip"), "upstream_not_stream", 502),
}


@pytest.mark.parametrize(("raw", "code", "status"), STATUSES.values(), ids=STATUSES)
def test_what_is_no_stream_is_an_error(
    provider: MakeProvider, upstream: MakeUpstream, raw: bytes, code: str, status: int
) -> None:
    """Each way of not streaming has its code and its status; one request is made, none follows."""
    there = provider(says(raw))
    error = refused(upstream(there.url))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.status) == (code, status)
    assert len(there.requests) == 1


@pytest.mark.parametrize(
    "kind",
    ["text/event-stream", "Text/Event-Stream", "text/event-stream;charset=utf-8"],
)
@pytest.mark.parametrize("encoding", [[], ["Content-Encoding: identity"]])
def test_what_is_a_stream(
    provider: MakeProvider, upstream: MakeUpstream, kind: str, encoding: list[str]
) -> None:
    """The content type counts, not its case nor its parameters; identity is no encoding."""
    there = provider(says(answer("200 OK", f"Content-Type: {kind}", *encoding, body=DONE)))
    assert whole_call(upstream(there.url)) == DONE


INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


@pytest.mark.parametrize(
    "before",
    [INTERIM, INTERIM * 3, b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"],
    ids=["one", "three", "100", "102"],
)
def test_interim_answers_are_skipped(
    provider: MakeProvider, upstream: MakeUpstream, before: bytes
) -> None:
    """What comes before the answer is no answer, and does not disturb the connection's next one."""
    there = provider(always_says(before + WHOLE))
    us = upstream(there.url)
    assert [whole_call(us), whole_call(us)] == [EVENT + DONE] * 2
    assert len(there.peers) == 1


def test_another_protocol_is_no_stream(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """A 101 that nobody asked for ends the connection."""
    there = provider(says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"))
    assert refused(upstream(there.url)).code == "upstream_not_stream"
    assert there.closed.wait(5)


def test_a_redirect_does_not_carry_the_key_away(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """The address that a redirect names is not connected to."""
    elsewhere = provider(says(WHOLE))
    there = provider(says(answer("307 Over there", f"Location: {elsewhere.url}")))
    refused(upstream(there.url))
    assert elsewhere.peers == []


def test_a_redirects_body_is_not_waited_for(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """requests would read a redirect's body to its end, however long that takes."""
    there = provider(says(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 99\r\n\r\nhalf"))
    assert refused(upstream(there.url)).code == "upstream_not_stream"
    assert there.closed.wait(5)


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
def test_a_rate_limit_says_when_to_come_back(
    provider: MakeProvider, upstream: MakeUpstream, value: str | None, passed: str | None
) -> None:
    """The provider's Retry-After is handed on where it is one, seconds or a date."""
    fields = [] if value is None else [f"Retry-After: {value}"]
    there = provider(says(answer("429 Slow down", *fields)))
    assert refused(upstream(there.url)).retry_after == passed


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
def test_a_rejection_says_what_the_provider_said(
    provider: MakeProvider, upstream: MakeUpstream, body: bytes, message: str | None
) -> None:
    """The provider's sentence, without our key and of bounded length; else one of ours."""
    there = provider(says(answer("400 Bad", JSON, body=body)))
    error = refused(upstream(there.url))
    assert error.message == message or (message is None and "(400)" in error.message)


def test_a_slow_rejection_is_not_waited_for(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 400 whose body does not come is a 400 all the same, after a bounded time."""
    monkeypatch.setattr("chatstream.upstream.provider._ERROR_PATIENCE", 0.1)
    there = provider(says(answer("400 Bad", JSON, body=REJECTED)[:-1]))
    assert refused(upstream(there.url)).code == "upstream_rejected"


@pytest.mark.parametrize("status", ["401 No", "403 No", "500 Oops"])
def test_what_a_provider_says_of_the_key_is_not_shown(
    provider: MakeProvider, upstream: MakeUpstream, caplog: pytest.LogCaptureFixture, status: str
) -> None:
    """An auth error's body often repeats the key: neither is in the message, detail or log."""
    caplog.set_level(logging.DEBUG)
    body = b'{"error":{"message":"Incorrect API key provided: sk-very-secret"}}'
    there = provider(says(answer(status, JSON, body=body)))
    error = refused(upstream(there.url))
    shown = f"{error.message} {error.detail} {error} {caplog.text}"
    assert "secret" not in shown
    assert "Incorrect" not in shown


# No answer


def test_a_closed_port_is_a_connect_error(upstream: MakeUpstream, stream: Stream) -> None:
    """Nobody listens: `upstream_connect`, and the log is told what the kernel said."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        error = refused(upstream(f"http://127.0.0.1:{sock.getsockname()[1]}/"), stream)
    assert (error.code, error.status) == ("upstream_connect", 502)
    assert "refused" in error.detail.lower()
    assert error.__cause__ is not None


def test_an_unknown_name_is_a_connect_error(
    upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that does not resolve: `upstream_connect`."""

    def unknown(*arguments: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert refused(upstream("http://provider.test/")).code == "upstream_connect"


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


def test_a_name_without_an_address_is_a_connect_error(
    upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty list of addresses is no crash."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: [])
    assert refused(upstream("http://provider.test/")).code == "upstream_connect"


def test_a_silent_address_is_a_connect_error(upstream: MakeUpstream, black_hole: BlackHole) -> None:
    """No answer to the SYN within the connect timeout: `upstream_connect`."""
    error = refused(upstream(black_hole.url, upstream_connect_timeout=0.1))
    assert (error.code, error.status) == ("upstream_connect", 502)


def test_plain_where_tls_was_meant_is_a_connect_error(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """A failed TLS handshake: `upstream_connect`."""
    there = provider(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    error = refused(upstream(there.url.replace("http:", "https:")))
    assert error.code == "upstream_connect"


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


@pytest.mark.parametrize("way", ["plain", "tls", "proxy", "tunnel"])
def test_a_provider_that_vanishes_will_be_noticed(
    provider: MakeProvider,
    upstream: MakeUpstream,
    tls: Callable[[Script], Script],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The kernel probes the connection, whether to the provider or to a proxy."""

    def tunnel(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        tls(always_says(WHOLE))(peer)

    scripts = {"tls": tls(always_says(WHOLE)), "tunnel": tunnel}
    there = provider(scripts.get(way, always_says(WHOLE)))
    url = there.url.replace("http:", "https:") if way == "tls" else there.url
    if way in ("proxy", "tunnel"):
        monkeypatch.setenv("http_proxy", there.url)
        monkeypatch.setenv("https_proxy", there.url)
        url = "https://provider.test/v1/chat" if way == "tunnel" else "http://provider.test/v1/chat"
    body = opened(upstream(url))
    sock = body._sock  # type: ignore[attr-defined]
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert timeout == dialling.USER_TIMEOUT * 1000
    body.close()


def gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the kernel say ETIMEDOUT as soon as a peer does not take what it is sent."""
    monkeypatch.setattr(dialling, "USER_TIMEOUT", 0.001)


def test_a_connect_has_its_own_timeout(
    upstream: MakeUpstream, black_hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a SYN may take is a setting; the kernel must not give up before."""
    gives_up_soon(monkeypatch)
    started = time.monotonic()
    error = refused(upstream(black_hole.url, upstream_connect_timeout=2.5))
    assert error.code == "upstream_connect"
    assert time.monotonic() - started > 2.4


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


# The body


@pytest.mark.parametrize("together", [True, False])
def test_an_unchunked_body_arrives_event_by_event(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, together: bool
) -> None:
    """Case 9: no event of a close-delimited body is held back, whether or not it came with the
    headers, in one segment."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(*([UNTIL_CLOSE + EVENT] if together else [UNTIL_CLOSE, EVENT]))
        assert go_on.wait(10)
        peer.send(DONE)

    there = provider(script)
    body = opened(upstream(there.url), stream)
    assert body.receive(5) == EVENT
    go_on.set()
    assert rest_of(body) == DONE
    body.close()


def test_a_chunked_body_arrives_as_it_comes(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Each chunk is there when it was sent, without its framing, also in pieces."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED, chunk(EVENT))
        assert go_on.wait(10)
        for byte in chunk(DONE) + chunk(b""):
            peer.send(bytes([byte]))
        peer.wait_closed()

    there = provider(script)
    body = opened(upstream(there.url), stream)
    assert body.receive(5) == EVENT
    go_on.set()
    assert rest_of(body) == DONE
    body.close()


def test_a_receive_gives_up_and_can_be_tried_again(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Silence is a TimeoutError after the given time; what comes later is not lost."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED, b"5\r\n")
        assert go_on.wait(10)
        peer.send(b"hello\r\n0\r\n\r\n")
        peer.wait_closed()

    there = provider(script)
    body = opened(upstream(there.url), stream)
    for timeout in (0.0, 0.05):
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            body.receive(timeout)
        assert timeout <= time.monotonic() - begin < 2
    go_on.set()
    assert rest_of(body) == b"hello"
    body.close()


def test_a_body_larger_than_any_buffer(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """Megabytes come through whole."""
    large = os.urandom(3_000_000)
    there = provider(says(answer("200 OK", SSE, body=large)))
    assert whole_call(upstream(there.url)) == large


def reset_after(data: bytes) -> Script:
    def script(peer: Peer) -> None:
        peer.request()
        peer.send(data)
        peer.sock.recv(1)  # until the test has read and says so
        peer.reset()

    return script


BROKEN = {
    "chunks cut off": says_and_closes(CHUNKED + chunk(EVENT) + b"ff\r\nda"),
    "no last chunk": says_and_closes(CHUNKED + chunk(EVENT)),
    "length cut off": says_and_closes(HEAD + b"Content-Length: 999\r\n\r\n" + EVENT),
    "bad chunk": says_and_closes(CHUNKED + chunk(EVENT), b"zz\r\n"),
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_body_that_breaks_off_is_truncated(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, script: Script
) -> None:
    """What its headers announced and did not come is `upstream_truncated`, never a clean end."""
    body = opened(upstream(provider(script).url), stream)
    with pytest.raises(UpstreamError) as caught:
        rest_of(body)
    assert caught.value.code == "upstream_truncated"
    body.close()


def test_a_body_that_is_reset_is_truncated(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Case 16: a reset is a fault of the provider with a code, no OSError for the caller."""
    reset = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(UNTIL_CLOSE + EVENT)
        assert reset.wait(10)
        peer.reset()

    body = opened(upstream(provider(script).url), stream)
    assert body.receive(5) == EVENT
    reset.set()
    with pytest.raises(UpstreamError) as caught:
        rest_of(body)
    assert caught.value.code == "upstream_truncated"
    assert isinstance(caught.value.__cause__, OSError)
    body.close()


def test_a_bad_chunk_beside_the_headers_is_a_fault_of_the_provider(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Bad framing that comes in one segment with the headers has the same code as later."""
    there = provider(says(CHUNKED + b"zz\r\n"))
    with pytest.raises(UpstreamError) as caught:
        whole_call(upstream(there.url), stream)
    stream.fail(caught.value)
    assert caught.value.code == "upstream_truncated"
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


def floods(head: bytes, piece: bytes) -> Script:
    """Sends as fast as it can, for at most three seconds."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(head)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            peer.send(piece)

    return script


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


# The body as the loop reads it


def said_on_a_sign(head: bytes, *pieces: bytes) -> tuple[Script, threading.Event]:
    """Answers with `head`; with the pieces when told to; then waits for the close."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(head)
        assert go_on.wait(10)
        peer.send(*pieces)
        peer.wait_closed()

    return script, go_on


def test_a_detached_body_never_waits(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """What came with the headers first; then None for nothing there, b"" for the end, ever after.

    The descriptor it gives is the socket's own: that shows when there is more.
    """
    script, go_on = said_on_a_sign(CHUNKED + chunk(EVENT), chunk(DONE), chunk(b""))
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


@pytest.mark.parametrize(
    ("pieces", "how"), [([chunk(EVENT)], "reset"), ([chunk(EVENT)], "close"), ([b"zz\r\n"], "stay")]
)
def test_a_detached_body_that_breaks_is_truncated(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, pieces: list[bytes], how: str
) -> None:
    """The same faults as of one that waits, raised where it is read."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED, *pieces)
        if how == "reset":
            eventually(lambda: read_all.is_set())
            peer.reset()
        elif how == "stay":
            peer.wait_closed()

    read_all = threading.Event()
    body = opened(upstream(provider(script).url), stream)
    body.detach()

    def fault() -> UpstreamError | None:
        try:
            if body.receive_now() == EVENT:
                read_all.set()
        except UpstreamError as error:
            return error
        return None

    assert eventually(fault, "the fault").code == "upstream_truncated"  # type: ignore[union-attr]
    body.close()


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
    script, go_on = said_on_a_sign(CHUNKED + chunk(event))
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


# Connections are reused


def test_a_whole_answers_connection_is_reused(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """Five streams one after the other take one connection."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url)
    assert [whole_call(us) for _ in range(5)] == [EVENT + DONE] * 5
    assert len(there.requests) == 5
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


NOT_REUSABLE = {
    "until close": HEAD + b"\r\n" + DONE,
    "Connection: close": UNTIL_CLOSE.replace(b"\r\n\r\n", b"\r\nContent-Length: 14\r\n\r\n") + DONE,
    "bytes after the last chunk": WHOLE + b"HTTP/1.1 200 OK",
    "bytes after the length": answer("200 OK", SSE, body=DONE) + b"\r\n",
    "HTTP/1.0": answer("200 OK", SSE, body=DONE).replace(b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize("raw", NOT_REUSABLE.values(), ids=NOT_REUSABLE)
def test_what_cannot_be_reused_is_closed(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, raw: bytes
) -> None:
    """A connection that must not or cannot carry another request is closed with its answer."""
    there = provider(says(raw))
    body = opened(upstream(there.url), stream)
    body.receive(5)
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


def ends_second_request(end: Callable[[Peer], None]) -> Script:
    """A provider whose first connection dies with its second request; the others serve."""

    def script(peer: Peer) -> None:
        while peer.request():
            if peer.number == 1 and len(peer._provider.requests) == 2:
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


def test_a_connection_that_dies_after_a_first_byte_is_not_called_again(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """An answer that began may have cost tokens: no second request."""
    there = provider(ends_second_request(lambda peer: peer.send(b"H")))
    us = upstream(there.url)
    whole_call(us)
    assert refused(us).code == "upstream_unreachable"
    assert len(there.requests) == 2


def test_a_reused_connection_that_times_out_is_not_called_again(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """A provider that takes too long has the request: it is not dead, and gets no second one."""

    def wait(peer: Peer) -> None:
        peer.wait_closed()

    there = provider(ends_second_request(wait))
    us = upstream(there.url, upstream_headers_timeout=0.3)
    whole_call(us)
    assert refused(us).code == "upstream_timeout"
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


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """Makes every name have these addresses, in this order."""
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: infos)


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


def test_a_stop_in_the_tls_handshake(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Case 1, TLS: a server that never says hello is left at once."""
    there = provider(lambda peer: peer.wait_closed())
    us = upstream(there.url.replace("http:", "https:"), upstream_connect_timeout=60)
    call = Call(us, stream)
    eventually(lambda: there.peers and there.peers[0]._buffer)  # the client's hello is there
    stream.abort(Cause.CANCEL)
    assert isinstance(call.error(), StreamAborted)
    assert there.closed.wait(5)


def test_a_stop_while_the_headers_are_awaited(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream
) -> None:
    """Case 1, headers: the provider that has the request and thinks sees the close at once."""
    there = provider(says())
    call = Call(upstream(there.url), stream)
    eventually(lambda: there.requests)
    eventually(lambda: stream.phase is Phase.HEADERS)
    stream.abort(Cause.CANCEL)
    assert there.closed.wait(5)
    assert isinstance(call.error(), StreamAborted)
    assert len(there.requests) == 1


@pytest.mark.parametrize("head", [CHUNKED, UNTIL_CLOSE], ids=["chunked", "until close"])
def test_a_stop_in_a_silent_body(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, head: bytes
) -> None:
    """Case 1, body: the reader wakes, the provider sees the close, the connection is not reused."""
    data = chunk(EVENT) if head == CHUNKED else EVENT
    there = provider(says(head + data))
    us = upstream(there.url)
    body = opened(us, stream)
    assert body.receive(5) == EVENT
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
    other = EventStream("s", "t-2")
    opened(us, other).close()
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


def test_many_stops_leave_nothing(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """Case 5: a hundred stops in mixed phases, and descriptors are where they were."""
    there = provider(says(CHUNKED + chunk(EVENT)))
    us = upstream(there.url)
    before = descriptors()
    for number in range(100):
        stream = EventStream("s", f"t-{number}")
        if number % 3 == 0:
            body = opened(us, stream)
            stream.abort(Cause.CANCEL)
            body.close()
        else:
            call = Call(us, stream)
            if number % 3 == 1:
                eventually(lambda stream=stream: stream.phase is not Phase.NEW)  # type: ignore[misc]
            stream.abort(Cause.CANCEL)
            call.error()
            if call._body is not None:
                call._body.close()
    eventually(lambda: descriptors() <= before, "descriptors as before")


# TLS, proxies


@pytest.fixture
def tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Script], Script]:
    """Makes a script speak TLS, with a certificate that our side trusts."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "provider.test").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))

    def wrapped(script: Script) -> Script:
        def tls_script(peer: Peer) -> None:
            peer.sock = context.wrap_socket(peer.sock, server_side=True)
            try:
                script(peer)
            finally:
                peer.sock.close()

        return tls_script

    return wrapped


def test_over_tls_events_pass_and_the_connection_is_reused(
    provider: MakeProvider, upstream: MakeUpstream, tls: Callable[[Script], Script]
) -> None:
    """TLS changes neither the bytes nor the pool."""
    there = provider(tls(always_says(WHOLE)))
    us = upstream(there.url.replace("http:", "https:"))
    assert [whole_call(us), whole_call(us)] == [EVENT + DONE] * 2
    assert len(there.peers) == 1


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


def test_over_tls_a_silent_body_can_be_stopped(
    provider: MakeProvider,
    upstream: MakeUpstream,
    stream: Stream,
    tls: Callable[[Script], Script],
) -> None:
    """A reader inside the TLS layer wakes; what it sees is an end or a fault of the provider."""
    closed = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(CHUNKED + chunk(EVENT))
        with contextlib.suppress(OSError):
            peer.wait_closed()
        closed.set()

    there = provider(tls(script))
    body = opened(upstream(there.url.replace("http:", "https:")), stream)
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
    assert woken.wait(5)
    assert closed.wait(5)
    reader.join(5)
    body.close()


def test_a_certificate_nobody_trusts_is_a_connect_error(
    provider: MakeProvider,
    upstream: MakeUpstream,
    tls: Callable[[Script], Script],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key is not sent to a server that cannot prove its name."""

    def script(peer: Peer) -> None:
        with contextlib.suppress(ssl.SSLError):
            tls(always_says(WHOLE))(peer)

    there = provider(script)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert refused(upstream(there.url.replace("http:", "https:"))).code == "upstream_connect"
    assert there.requests == []


def test_a_proxy_of_the_environment_is_used(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY gets the request, with the whole address; its connection is reused."""
    proxy = provider(always_says(WHOLE))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    us = upstream("http://provider.test/v1/chat")
    assert [whole_call(us), whole_call(us)] == [EVENT + DONE] * 2
    assert [request.line for request in proxy.requests] == [
        "POST http://provider.test/v1/chat HTTP/1.1"
    ] * 2
    assert len(proxy.peers) == 1


def test_the_environment_is_looked_at_once(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set after the first call is for the next process: a look costs more than a call."""
    there, proxy = provider(always_says(WHOLE)), provider(says())
    us = upstream(there.url)
    whole_call(us)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    assert whole_call(us) == EVENT + DONE
    assert (len(there.requests), proxy.peers) == (2, [])


def test_requests_share_nothing_that_a_mock_may_change(
    upstream: MakeUpstream, stream: Stream
) -> None:
    """Each call's request is its own: what is done to one's headers is not in the next."""
    us = upstream("http://provider.test/v1/chat")
    with responses.RequestsMock() as mock:
        mock.post("http://provider.test/v1/chat", body=DONE, content_type="text/event-stream")
        for payload in (b"{}", PAYLOAD):
            us.open(payload, stream).close()
        first, second = (call.request for call in mock.calls)
    first.headers["X-Mark"] = "1"
    assert (first.body, second.body) == (b"{}", PAYLOAD)
    assert (first.headers["content-length"], second.headers["content-length"]) == (
        "2",
        str(len(PAYLOAD)),
    )
    assert "X-Mark" not in second.headers
    assert second.headers["authorization"] == f"Bearer {KEY}"


def test_a_stop_through_a_proxy(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy sees the close while it waits for the provider's headers."""
    proxy = provider(says())
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    call = Call(upstream("http://provider.test/v1/chat"), stream)
    eventually(lambda: proxy.requests)
    stream.abort(Cause.CANCEL)
    assert proxy.closed.wait(5)
    assert isinstance(call.error(), StreamAborted)


def test_a_stop_while_a_proxy_connects(
    provider: MakeProvider, upstream: MakeUpstream, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CONNECT that the proxy does not answer is left at once, and not repeated."""
    proxy = provider(says())
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    call = Call(upstream("https://provider.test/v1/chat"), stream)
    eventually(lambda: proxy.requests)
    assert proxy.requests[0].line.startswith("CONNECT provider.test:443 ")
    assert "authorization" not in proxy.requests[0].headers
    stream.abort(Cause.CANCEL)
    assert proxy.closed.wait(5)
    assert isinstance(call.error(), StreamAborted)
    assert len(proxy.peers) == 1


def test_a_tunnel_through_a_proxy(
    provider: MakeProvider,
    upstream: MakeUpstream,
    tls: Callable[[Script], Script],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through CONNECT and TLS the answer is the provider's, and its connection is reused."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        tls(always_says(WHOLE))(peer)

    proxy = provider(script)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    us = upstream("https://provider.test/v1/chat")
    assert [whole_call(us), whole_call(us)] == [EVENT + DONE] * 2
    assert len(proxy.peers) == 1


def test_a_proxy_that_refuses_is_a_connect_error(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 407 to the CONNECT: `upstream_connect`."""
    proxy = provider(says(answer("407 Who are you")))
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    assert refused(upstream("https://provider.test/v1/chat")).code == "upstream_connect"
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    assert refused(upstream("http://provider.test/v1/chat")).code == "upstream_connect"


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS4"])
def test_a_socks_proxy_is_refused(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A stop could not reach a connection through SOCKS: neither proxy nor provider is called."""
    there = provider(says(WHOLE))
    proxy = provider(says())
    monkeypatch.setenv("all_proxy", f"{scheme}://127.0.0.1:{proxy.address[1]}")
    error = refused(upstream(there.url))
    assert error.code == "upstream_connect"
    assert "SOCKS proxies are not supported" in str(error.__cause__)
    assert (there.peers, proxy.peers) == ([], [])


def test_no_proxy_is_obeyed(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address in NO_PROXY is called directly."""
    there = provider(says(WHOLE))
    proxy = provider(says())
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert whole_call(upstream(there.url)) == EVENT + DONE
    assert proxy.peers == []


# Descriptors


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
