"""Hostile bytes to real gunicorn: it answers or closes, never with a 500, and serves the next one.

What the server itself refuses (a request line that is none) is its own 4xx, 501 or 505; all that
reaches the routes is answered as their document says. Each sender closes its half, so nothing here
waits for a server's patience. Not sent: the headers SCRIPT_NAME and PATH_INFO, which gunicorn
believes of whoever may be its proxy, and that is this machine.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatstream.web import openapi
from tests.conftest import PATIENCE, eventually
from tests.integration.client import Client
from tests.integration.conftest import Rig

PREFIX = "/api/chat"
BODY = b'{"messages": [{"role": "user"}]}'
HEAD = b"POST /api/chat/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CANCEL = b"POST /api/chat/cancel/s HTTP/1.1\r\nHost: localhost\r\n"
NEXT = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
MIB = 1024 * 1024

GROWTH = 32 * MIB
"""What a worker's memory may grow by over 300 hostile requests. Of ninety a body of a MiB is read,
and malloc keeps some for each thread that has had one."""

REFUSED = ([400], [408], [])
"""A request that is not whole: ours or the server's 400, its 408, or no answer to who has left."""

fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def rig(rigs: Callable[..., Rig], worker_class: str) -> Iterator[Rig]:
    """A server whose provider answers shortly, left as it was found and without a traceback."""
    rig = rigs("short answers", worker_class)
    yield rig
    assert "Traceback" not in rig.server.log()
    rig.check_leaks()


def statuses(answer: bytes) -> list[int]:
    """Those of all answers that came over one connection."""
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", answer, re.M)]


def sent(rig: Rig, data: bytes, leave: Callable[[Client], None] = Client.half_close) -> bytes:
    """All that is answered until the server closes. Fails if that takes too long, or is a 500."""
    client = rig.client(timeout=PATIENCE)
    answer = b""
    try:
        try:
            client.sock.sendall(data)
            leave(client)
        except TimeoutError:
            raise
        except OSError:  # it has read enough, and closed
            pass
        with contextlib.suppress(ConnectionError):  # bytes that it did not read
            while piece := client.sock.recv(65536):
                answer += piece
    finally:
        rig.clients.remove(client)
        client.close()
    for status in statuses(answer):
        assert status < 500 or status in (501, 505), answer
    return answer


def assert_serves(rig: Rig) -> None:
    """A good request is answered as if nothing had been."""
    client = rig.client().post("after-it")
    assert client.head()[0] == 200
    assert client.body().endswith(b"data: [DONE]\n\n")
    rig.clients.remove(client)
    client.close()


# By the document

document = schemathesis.openapi.from_dict(openapi.document(PREFIX, max_body=MIB))


def test_the_document_is_served(rig: Rig) -> None:
    """What is held against the routes below is what the server itself gives to anybody."""
    status, body = rig.server.get(f"{PREFIX}/openapi.json")
    assert (status, json.loads(body)) == (200, openapi.document(PREFIX, max_body=MIB))


@document.parametrize()
@settings(fuzzed, max_examples=25, suppress_health_check=list(HealthCheck))
def test_the_routes_keep_to_their_document(case: schemathesis.Case, rig: Rig) -> None:
    """Through a real server too: served or refused as it says, and with a well provider no 5xx."""
    case.call_and_validate(base_url=f"http://127.0.0.1:{rig.server.port}", timeout=PATIENCE)


# Bodies that are not what they announce

BODIES = {
    "a size that is none": CHUNKED + b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a negative size": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "a size too large": CHUNKED + b"f" * 20 + b"\r\nhello\r\n0\r\n\r\n",
    "an endless size": CHUNKED + b"1" * 20_000,
    "a longer chunk": CHUNKED + b"5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an extension": CHUNKED + b"5;\0=\r\nhello\r\n0\r\n\r\n",
    "a trailer that is none": CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nbad\r\n\r\n",
}


@pytest.mark.parametrize("data", BODIES.values(), ids=BODIES)
def test_chunks_that_are_none(rig: Rig, data: bytes) -> None:
    """Refused, by us or by the server, and what follows is not taken for another request."""
    answer = sent(rig, data + NEXT)
    assert statuses(answer) in REFUSED
    assert_serves(rig)


CUT = {
    "inside a chunk": CHUNKED + b"%x\r\n" % len(BODY) + BODY[:10],
    "after a chunk": CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n",
    "before the length": HEAD + b"Content-Length: 500\r\n\r\n" + BODY,
    "no byte of it": HEAD + b"Content-Length: 500\r\n\r\n",
}


@pytest.mark.parametrize("data", CUT.values(), ids=CUT)
def test_a_body_that_breaks_off(rig: Rig, data: bytes) -> None:
    """It is not asked of the provider, even if what came of it is whole JSON."""
    before = len(rig.provider.names())
    assert statuses(sent(rig, data)) in REFUSED
    assert len(rig.provider.names()) == before


LEAVES: dict[str, Callable[[Client], None]] = {
    "half": Client.half_close,
    "close": Client.close,
    "reset": Client.reset,
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_a_good_request_cut_anywhere(rig: Rig, leave: Callable[[Client], None]) -> None:
    """Whoever leaves in the middle of a request, in whichever way, leaves nothing behind."""
    whole = HEAD + LENGTH + BODY
    chunked = CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
    for data in (whole, chunked):
        for cut in range(0, len(data), 7):
            with contextlib.suppress(OSError):  # our own socket, if we have closed it
                sent(rig, data[:cut], leave)
    assert_serves(rig)


# Any bytes

tokens = st.sampled_from([b"GET", b"POST", b"OPTIONS", b"CONNECT", b"", b"post", b"P\0ST", b"\xff"])
targets = st.sampled_from(
    [
        b"/api/chat/stream",
        b"/api/chat/cancel/s",
        b"/api/chat/openapi.json",
        b"*",
        b"//",
        b"http://[",
    ]
)
versions = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2", b"HTTP/1.1 x", b""])
junk = st.binary(max_size=30)
request_lines = st.builds(
    lambda method, target, more, version: method + b" " + target + more + b" " + version,
    tokens,
    targets,
    st.just(b"") | junk.map(lambda data: b"?streamId=" + data) | junk,
    versions | junk,
)
header_names = st.sampled_from(
    [
        b"Host",
        b"Content-Length",
        b"Content-Type",
        b"Transfer-Encoding",
        b"Connection",
        b"Expect",
        b"Cookie",
        b"X-User",
        b"X-Forwarded-Proto",
        b"Upgrade",
        b"X_User",
        b" X",
        b"",
    ]
)
header_values = junk | st.sampled_from(
    [b"chunked", b"gzip, chunked", b"5", b"-1", b"99999999999999999999", b"100-continue", b"close"]
)
headers = st.lists(st.tuples(header_names | junk, header_values), max_size=6).map(
    lambda pairs: b"".join(name + b": " + value + b"\r\n" for name, value in pairs)
)


@fuzzed
@given(line=request_lines, headers=headers, body=junk | st.just(BODY))
def test_any_request_line_and_headers(rig: Rig, line: bytes, headers: bytes, body: bytes) -> None:
    """Answered or closed at once; never a 500, whatever the line and the headers are."""
    sent(rig, line + b"\r\n" + headers + b"\r\n" + body)


@fuzzed
@given(path=junk, query=junk)
def test_any_bytes_in_a_cancels_target(rig: Rig, path: bytes, query: bytes) -> None:
    """A cancel of whatever: found nowhere, or refused by the server, or no request at all."""
    first = b"POST /api/chat/cancel/" + path + b"?" + query + b" HTTP/1.1\r\n"
    answer = sent(rig, first + b"Host: localhost\r\n\r\n")
    assert 200 not in statuses(answer)


@fuzzed
@given(values=st.lists(st.tuples(header_names, junk | st.text().map(str.encode)), max_size=4))
def test_any_header_bytes_of_a_good_request(rig: Rig, values: list[tuple[bytes, bytes]]) -> None:
    """Bytes in the headers of a stream's request: it is served or refused, and no more."""
    more = b"".join(name + b": " + value + b"\r\n" for name, value in values)
    sent(rig, HEAD + more + LENGTH + BODY)


@fuzzed
@given(body=st.binary(max_size=300), chunked=st.booleans(), length=st.integers(0, 400))
def test_any_body_bytes(rig: Rig, body: bytes, chunked: bool, length: int) -> None:
    """No chat is made of bytes at random, nor of raw bytes in the place of chunks."""
    if chunked:
        answer = sent(rig, CHUNKED + body)
    else:
        answer = sent(rig, HEAD + b"Content-Length: %d\r\n\r\n" % length + body)
    assert 200 not in statuses(answer)[:1]


@fuzzed
@given(data=st.binary(max_size=300))
def test_any_bytes(rig: Rig, data: bytes) -> None:
    """What is not HTTP at all is refused or closed."""
    sent(rig, data)


def test_it_serves_after_all_that(rig: Rig) -> None:
    """The workers are those that began, and a good request is answered."""
    assert_serves(rig)


# Towards the provider

INJECTED = [
    b"X-User: me\xff\xfe",
    b"X-Session-Id: s\r\n folded: 1",
    b"Authorization: Bearer of-the-client",
    b"Cookie: a=b; c=d",
    b"Proxy: http://127.0.0.1:1",
    b"Accept-Encoding: gzip",
    b"User-Agent: \xf0\x9f\x99\x82",
    b"Connection: close, X-User",
    b"Range: bytes=0-0",
    b"Forwarded: for=1;host=elsewhere",
    b"X-Forwarded-Host: elsewhere",
]


@pytest.mark.parametrize("header", INJECTED, ids=lambda header: header.partition(b":")[0].decode())
def test_no_header_reaches_the_provider(rig: Rig, worker_class: str, header: bytes) -> None:
    """Its request is ours alone: address, headers and key, whatever the client sent along."""
    name = f"header-{INJECTED.index(header)}.{worker_class}"
    text = "\r\nX-Injected: 1\r\n\r\nPOST / HTTP/1.1\r\n\r\n\0"
    chat = {"messages": [{"role": text}], "model": text, text: text, "simulate": {"id": name}}
    body = json.dumps(chat).encode()
    data = HEAD + header + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    client = rig.client()
    client.sock.sendall(data)
    status = client.head()[0]
    if status == 400:  # gunicorn refuses folded headers
        assert name not in rig.provider.names()
        return
    assert status == 200
    client.body()
    figure = rig.provider.request(name)
    assert figure["path"] == "/v1/chat/completions"
    assert figure["headers"] == {
        "host": f"localhost:{rig.provider.port}",
        "user-agent": "chatstream",
        "accept-encoding": "identity",
        "accept": "text/event-stream",
        "connection": "keep-alive",
        "content-type": "application/json",
        "content-length": figure["headers"]["content-length"],
        "authorization": "present",  # the simulator keeps no keys
    }
    assert figure["body"] == {
        "messages": [{"role": text}],
        "model": text,
        text: text,
        "stream": True,
    }


# Memory


def memory(pid: int) -> int:
    """The bytes that a process has in memory (proc_pid_status(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
    return int(found[1]) * 1024 if found else 0


LARGE = {
    "a header without an end": CANCEL + b"X: " + b"a" * (MIB // 4),
    "headers without an end": CANCEL + b"X: a\r\n" * (MIB // 24),
    "a request line without an end": b"POST /" + b"a" * MIB,
    "a chunk size without an end": CHUNKED + b"1" * MIB,
    "chunks without an end": CHUNKED + b"10000\r\n" + b" " * 65536 + b"\r\n1\r\n " * 15_000,
    "one chunk too long": CHUNKED + b"%x\r\n" % (4 * MIB) + b" " * 4 * MIB,
    "a body of a MiB, no JSON": HEAD + b"Content-Length: %d\r\n\r\n" % MIB + b"[" * MIB,
    "a body cut off": HEAD + b"Content-Length: %d\r\n\r\n" % MIB + b" " * (MIB - 1),
    "a body that nobody reads": CANCEL + b"Content-Length: %d\r\n\r\n" % (2 * MIB) + b"x" * 2 * MIB,
    "a query of 4 KB": CANCEL.replace(b"/s ", b"/s?" + b"&" * 4000 + b" ") + b"\r\n",
}


def test_memory_is_bounded(rig: Rig) -> None:
    """300 requests that are too large or do not end leave a worker about as large as it was."""
    worker = rig.server.worker
    for data in LARGE.values():
        sent(rig, data)
    before = memory(worker)
    for number in range(300):
        sent(rig, list(LARGE.values())[number % len(LARGE)])
    assert rig.server.worker == worker
    eventually(lambda: memory(worker) - before < GROWTH, f"less than {GROWTH} bytes more")
    assert_serves(rig)
