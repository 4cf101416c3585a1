"""What a client has not sent, or does not close: it is bound in time, and costs nobody a thread."""

from __future__ import annotations

import contextlib
import itertools
import re
import resource
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Certificate, Rig, serving
from tests.integration.processes import Provider

FIRST, REQUEST, KEPT = 1.8, 1.2, 0.8
"""Seconds: the limits of the tests that do not say otherwise."""

MAX_BODY = 20_000

SHORT = {
    "CHATSTREAM_HEADERS_TIMEOUT": str(FIRST),
    "CHATSTREAM_REQUEST_TIMEOUT": str(REQUEST),
    "CHATSTREAM_KEEPALIVE_TIMEOUT": str(KEPT),
    "CHATSTREAM_MAX_BODY": str(MAX_BODY),
}

SLACK = 2.0
"""Seconds by which a busy machine may be late."""

numbers = itertools.count(1)

HELLO = b"GET /hello HTTP/1.1\r\nHost: ab\r\n\r\n"
OURS = b"POST /api/chat/stream HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
UPLOAD = b"POST /upload HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture
def quick(rigs: Callable[..., Rig], worker_class: str) -> Iterator[Rig]:
    """A server of eight threads with short limits, left as it was found, without a traceback."""
    rig = rigs("plain", worker_class, CHATSTREAM_THREADS="8", **SHORT)
    yield rig
    rig.check_leaks()
    assert_quiet(rig)


def assert_quiet(rig: Rig) -> None:
    log = rig.server.log()
    assert "Traceback" not in log
    assert "[ERROR]" not in log


@dataclass
class Case:
    """What a client does, and what becomes of it."""

    sends: bytes
    status: bytes | None
    """Of the last answer; None where the connection ends without another."""
    after: float
    """Seconds from `sends` to the end."""
    drips: bytes = b""
    """What it goes on with, a byte every 0.3 s, until it is cut."""
    first: bytes = b""
    """A request before, and its answer's end awaited."""


BEGUN = OURS + b"Content-Length: 100\r\n\r\n"
CASES = {
    "silent": Case(b"", None, FIRST),
    "half a line": Case(b"POST /api", b"408", REQUEST),
    "a head that drips": Case(b"P", b"408", REQUEST, drips=OURS),
    "half a body": Case(BEGUN + b"{", b"408", REQUEST),
    "no body": Case(BEGUN, b"408", REQUEST),
    "a body that drips": Case(BEGUN, b"408", REQUEST, drips=b" " * 90),
    "chunks that drip": Case(
        OURS + b"Transfer-Encoding: chunked\r\n\r\n", b"408", REQUEST, drips=b"1\r\n \r\n" * 20
    ),
    "half a cancel": Case(
        b"POST /api/chat/cancel/s HTTP/1.1\r\nContent-Length: 9\r\n\r\n1", b"408", REQUEST
    ),
    "our route, written otherwise": Case(
        BEGUN.replace(b"/api/chat/stream", b"http://a/api/chat/s%74ream"),
        b"408",
        REQUEST,
        drips=b" " * 90,
    ),
    "half a short upload": Case(UPLOAD + b"Content-Length: 9\r\n\r\n1", b"408", REQUEST),
    "a short upload that drips, and stops": Case(
        UPLOAD + b"Content-Length: 9\r\n\r\n1", b"408", 6 * 0.3 + REQUEST, drips=b" " * 6
    ),
    "a short upload that drips, to its end": Case(
        UPLOAD + b"Connection: close\r\nContent-Length: 9\r\n\r\n1",
        b"200",
        8 * 0.3,
        drips=b" " * 8,
    ),
    "half a long upload": Case(UPLOAD + b"Content-Length: 99999\r\n\r\n1", b"408", REQUEST),
    "a long upload that drips, and stops": Case(
        UPLOAD + b"Content-Length: 99999\r\n\r\n1",
        b"408",
        6 * 0.3 + REQUEST,
        drips=b" " * 6,
    ),
    "long chunks that stop": Case(
        UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n9999\r\n" + b"a" * 30_000, b"408", REQUEST
    ),
    "kept, and silent": Case(b"", None, KEPT, first=HELLO),
    "kept, and half a request": Case(b"GET", b"408", REQUEST, first=HELLO),
    "pipelined, the second half": Case(HELLO + b"GET /hel", b"408", REQUEST),
}


def outcome(connect: Callable[[], Client], case: Case) -> tuple[bytes | None, float]:
    """The last answer's status, and after how many seconds the connection was ended."""
    begun = time.monotonic()
    client = connect()
    if case.first:
        client.sock.sendall(case.first)
        begun = time.monotonic()
        _, headers = client.head()
        client.exactly(int(headers["content-length"]))
    client.sock.sendall(case.sends)
    got, drips = b"", case.drips
    while time.monotonic() < begun + 20:
        client.sock.settimeout(0.3 if drips else 20)
        try:
            data = client.sock.recv(65536)
        except TimeoutError:
            with contextlib.suppress(OSError):
                client.sock.sendall(drips[:1])
            drips = drips[1:]
            continue
        except ConnectionResetError:  # it went on after it was cut
            data = b""
        got += data
        if not data:
            break
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", got)
    return (statuses[-1] if statuses else None), time.monotonic() - begun


def assert_outcomes(
    cases: dict[str, Case], connect: Callable[[], Client], patience: float = SLACK
) -> None:
    """Every case has the end it should have, when it should; all at once."""
    with ThreadPoolExecutor(len(cases)) as pool:
        ends = {name: pool.submit(outcome, connect, case) for name, case in cases.items()}
        got = {name: end.result() for name, end in ends.items()}
    expected = {
        name: (case.status, pytest.approx(case.after + patience / 2 - 0.05, abs=patience / 2 + 0.1))
        for name, case in cases.items()
    }
    assert got == expected


def test_deadlines(quick: Rig) -> None:
    """Who has begun is told 408 when its time is over, who has not is not; uploads may go on."""
    assert_outcomes(CASES, quick.client)


def test_a_late_head_has_the_rest_of_the_first_time(quick: Rig) -> None:
    """A connection's headers are there within 12 s, also if their first byte came after 11."""
    client = quick.client()
    begun = time.monotonic()
    client.sock.settimeout(FIRST - REQUEST + 0.6)
    with pytest.raises(TimeoutError):
        client.sock.recv(1)
    client.sock.settimeout(20)
    client.sock.sendall(b"GET /")
    assert client.to_the_end().startswith(b"HTTP/1.1 408")
    assert FIRST - 0.1 < time.monotonic() - begun < FIRST + SLACK


def settle(times: list[float]) -> float:
    """The median: other work on the machine hits some."""
    return statistics.median(times)


def timed_cancel(rig: Rig, session: str) -> float:
    """Seconds from a cancel's first byte, over a new connection, to its whole answer."""
    begun = time.monotonic()
    client = rig.client()
    status, _, _ = client.ask("POST", f"/api/chat/cancel/{session}")
    took = time.monotonic() - begun
    assert status == 200
    return took


def timed_stream(rig: Rig, session: str) -> float:
    """Seconds from a question's first byte to the first event of its answer."""
    begun = time.monotonic()
    client = rig.client().post(session, simulate={"id": session, "rate": 100, "silent_after": 2})
    assert client.head()[0] == 200
    client.until(b"data: ")
    return time.monotonic() - begun


CROWD = {
    "drips": 200,
    "silent": 16,
    "half a body": 16,
    "does not close": 16,
}


class Crowd:
    """Clients that do their worst, and when each of them was cut."""

    def __init__(self, rig: Rig) -> None:
        self.begun = time.monotonic()
        self.cut: dict[str, list[tuple[float, bytes]]] = {kind: [] for kind in CROWD}
        self._clients = [(kind, rig.client()) for kind, many in CROWD.items() for _ in range(many)]
        for kind, client in self._clients:
            self._begin(kind, client)
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    @staticmethod
    def _begin(kind: str, client: Client) -> None:
        if kind == "half a body":
            client.sock.sendall(BEGUN + b"{")
        elif kind == "does not close":
            client.sock.sendall(HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            assert client.head()[0] == 200
        client.sock.setblocking(False)

    def _go_on(self) -> None:
        """Drips, four bytes a second each, until all but those that do not close are cut."""
        drips = itertools.chain(OURS, itertools.repeat(ord("a")))
        left = list(self._clients)
        while left and time.monotonic() < self.begun + 30:
            byte = bytes([next(drips)])
            for kind, client in list(left):
                if kind == "drips":
                    with contextlib.suppress(OSError):
                        client.sock.send(byte)
                with contextlib.suppress(BlockingIOError):
                    if self._gone(kind, client):
                        left.remove((kind, client))
            time.sleep(0.25)

    def _gone(self, kind: str, client: Client) -> bool:
        try:
            data = client.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if kind == "does not close" and data:
            return False
        self.cut[kind].append((time.monotonic() - self.begun, data))
        return True

    def wait(self) -> None:
        self._thread.join(40)
        assert not self._thread.is_alive()


def test_a_crowd_that_does_its_worst(rigs: Callable[..., Rig]) -> None:
    """248 clients that drip, keep silent, stop half-way or do not close hold nobody up.

    With 16 threads, and limits as they are by default: each is cut when it should be. That takes
    twelve seconds, so both worker classes have their crowds at a time.
    """
    both = [rigs("plain", kind, CHATSTREAM_THREADS="16") for kind in ("gthread", "gevent")]
    crowds = [Crowd(rig) for rig in both]
    for rig, crowd in zip(both, crowds, strict=True):
        assert_served_beside(crowd, rig)
    for rig, crowd in zip(both, crowds, strict=True):
        crowd.wait()
        assert_cut_in_time(crowd)
        rig.check_leaks()
        assert_quiet(rig)


def assert_served_beside(crowd: Crowd, rig: Rig) -> None:
    """Who is no part of the crowd waits for nothing."""
    streams, cancels = [], []
    for _ in range(12):
        session = f"crowd-{next(numbers)}"
        streams.append(timed_stream(rig, session))
        cancels.append(timed_cancel(rig, session))
    assert time.monotonic() - crowd.begun < 9, "while they were there"
    print(f"cancels {settle(cancels) * 1e3:.1f} ms, worst {max(cancels) * 1e3:.1f} ms;", end=" ")
    print(f"streams {settle(streams) * 1e3:.1f} ms, worst {max(streams) * 1e3:.1f} ms")
    assert settle(cancels) <= 0.05
    assert max(cancels) < 1
    assert settle(streams) < 0.2
    assert max(streams) < 2


def assert_cut_in_time(crowd: Crowd) -> None:
    """408 after 10 s; the silent after 12."""
    for kind, after, answer in (
        ("drips", 10, b"HTTP/1.1 408"),
        ("half a body", 10, b"HTTP/1.1 408"),
        ("silent", 12, b""),
    ):
        assert len(crowd.cut[kind]) == CROWD[kind]
        for when, data in crowd.cut[kind]:
            assert after - 0.1 < when < after + 3, kind
            assert data[:12] == answer, kind


def test_threads_are_for_requests(quick: Rig) -> None:
    """With more half requests of each kind than threads, none is taken; nor what the app holds.

    As its connection to a database, of which it has one.
    """
    for _ in range(10):
        client = quick.client()
        client.sock.sendall(HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        client.head()
    read_by_a_hook = OURS.replace(b"api/chat/stream", b"hello") + b"X-Read-Body: 1\r\n"
    hosts = read_by_a_hook + b"Content-Length: 9\r\n\r\n1"
    for begin in (b"", b"POST", BEGUN + b"{", hosts):
        for _ in range(10):
            quick.client().sock.sendall(begin)
    begun = time.monotonic()
    assert quick.server.get("/hello") == (200, b"hello")
    assert time.monotonic() - begun < 0.5


def paced_upload(rig: Rig, size: int, seconds: float) -> tuple[int, bytes, float]:
    """Uploads zeros evenly over a time. Returns status, body, and the seconds that it took."""
    begun = time.monotonic()
    client = rig.client(timeout=90)
    client.sock.sendall(UPLOAD + b"Content-Length: %d\r\n\r\n" % size)
    piece = b"\0" * 1_000_000
    for sent in range(0, size, len(piece)):
        due = begun + seconds * sent / size
        time.sleep(max(0.0, due - time.monotonic()))  # the pace
        client.sock.sendall(piece[: size - sent])
    status, headers = client.head()
    body = client.exactly(int(headers["content-length"]))
    return status, body, time.monotonic() - begun


def test_a_long_upload_to_a_hosts_route(rigs: Callable[..., Rig]) -> None:
    """100 MB, four times as long as a request to our routes may take: it goes on, so it may."""
    both = [
        rigs("plain", kind, CHATSTREAM_THREADS="8", CHATSTREAM_REQUEST_TIMEOUT="1.5")
        for kind in ("gthread", "gevent")
    ]
    size = 100_000_000
    with ThreadPoolExecutor(2) as pool:
        uploads = [pool.submit(paced_upload, rig, size, 6) for rig in both]
        for upload in uploads:
            status, body, took = upload.result()
            assert (status, body) == (200, str(size).encode())
            assert took >= 5.75
    for rig in both:
        rig.check_leaks()
        assert_quiet(rig)


# Requests that are whole


def answers(client: Client, number: int) -> list[tuple[int, bytes]]:
    got = []
    for _ in range(number):
        status, headers = client.head()
        got.append((status, client.exactly(int(headers["content-length"]))))
    return got


def upload(body: bytes, *, chunk: int = 0) -> bytes:
    """An upload, in chunks of that size, or with a length."""
    if not chunk:
        return UPLOAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def test_pipelined_requests(quick: Rig) -> None:
    """Each gets its answer, in order: short and long, with and without a body, whole or cut."""
    requests = [
        HELLO,
        upload(b"12345"),
        upload(b"a" * 30_000),
        HELLO,
        upload(b"GET /hello HTTP/1.1\r\n\r\n" * 20, chunk=7),
        b"\r\n" + upload(b"a" * 50_000, chunk=1000),
        HELLO,
    ]
    expected = [b"hello", b"5", b"30000", b"hello", b"460", b"50000", b"hello"]
    raw = b"".join(requests)
    for size in (len(raw), 16_000, 1000):
        client = quick.client()
        for start in range(0, len(raw), size):
            client.sock.sendall(raw[start : start + size])
        assert answers(client, 7) == [(200, body) for body in expected]
        client.close()


def test_many_pipelined_requests(quick: Rig) -> None:
    """More than what is read at once."""
    client = quick.client()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(client.sock.sendall, HELLO * 2500)
        assert answers(client, 2500) == [(200, b"hello")] * 2500


NOT_READ = b"POST /debug HTTP/1.1\r\nHost: a\r\n"  # 405, and the body is not looked at


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 33\r\n\r\n" + HELLO.replace(b"GET", b"PUT"),
        b"Transfer-Encoding: chunked\r\n\r\n21\r\n" + HELLO + b"\r\n0\r\n\r\n",
    ],
    ids=["length", "chunks"],
)
def test_a_body_that_the_app_did_not_read(quick: Rig, body: bytes) -> None:
    """It is not taken for the next request, and the connection is good for another."""
    assert len(HELLO) == 33
    client = quick.client()
    client.sock.sendall(NOT_READ + body)
    assert answers(client, 1)[0][0] == 405
    client.sock.sendall(HELLO)
    assert answers(client, 1) == [(200, b"hello")]


def test_a_long_body_that_the_app_did_not_read(quick: Rig) -> None:
    """Nobody waits for its rest; nor is that taken for a request."""
    client = quick.client()
    client.sock.sendall(NOT_READ + b"Content-Length: 99999\r\n\r\n" + HELLO)
    assert answers(client, 1)[0][0] == 405
    with contextlib.suppress(OSError):
        client.sock.sendall(HELLO * 10)
    begun = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert b"hello" not in client.to_the_end()
    assert time.monotonic() - begun < 1


def test_a_long_body_for_our_routes_is_refused(quick: Rig) -> None:
    """Without waiting for it, and the client gets to read that: 413."""
    for body in (
        b"Content-Length: 99999\r\n\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n9999\r\n" + b" " * (MAX_BODY + 1025),
    ):
        client = quick.client()
        begun = time.monotonic()
        client.sock.sendall(OURS + body)
        assert client.head()[0] == 413
        assert time.monotonic() - begun < 1
        client.close()


def test_who_sends_on_gets_to_read_a_refusal(quick: Rig) -> None:
    """What a client sends after it was refused does not make its kernel forget the answer."""
    half = b"9999\r\n" + b"a" * 30_000
    for head, status in (
        (OURS + b"Content-Length: 3000000\r\n\r\n", 413),
        (NOT_READ + b"Content-Length: 3000000\r\n\r\n", 405),
        (HELLO[:-2] + b"X: ", 431),
        (UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n" + half, 408),
    ):
        client = quick.client()
        client.sock.sendall(head)
        if status == 408:
            time.sleep(REQUEST + 0.5)  # the time that is over
        client.sock.sendall(b"a" * 3_000_000)
        client.half_close()
        assert client.head()[0] == status
        client.close()


def test_malformed_requests_are_the_parsers(quick: Rig) -> None:
    """They get gunicorn's own answer, at once."""
    for raw, status in (
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\n\r\n", 400),
        (OURS + b"Content-Length: -1\r\n\r\n", 400),
        (OURS + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (OURS + b"Expect: something\r\nContent-Length: 0\r\n\r\n", 417),
        (OURS + b"Transfer-Encoding: chunked\r\n\r\nhello\r\n", 400),
    ):
        client = quick.client()
        begun = time.monotonic()
        client.sock.sendall(raw)
        assert client.head()[0] == status, raw
        assert time.monotonic() - begun < 1, raw
        client.close()


def test_what_only_our_poller_takes_for_whole(rigs: Callable[..., Rig]) -> None:
    """Line ends that gunicorn's parser does not take: it gets no more, and no thread waits."""
    rig = rigs("plain", "gthread", CHATSTREAM_THREADS="8", **SHORT)
    client = rig.client()
    begun = time.monotonic()
    client.sock.sendall(OURS + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n")
    assert client.head()[0] == 400
    assert time.monotonic() - begun < 1
    rig.check_leaks()
    assert_quiet(rig)


def test_an_overlong_head(quick: Rig) -> None:
    """431, whoever says so: our poller, or gunicorn's parser for a field."""
    for field in (b"X: " + b"a" * 10_000, b"\r\n".join(b"X: %b" % (b"a" * 8000) for _ in range(9))):
        client = quick.client()
        client.sock.sendall(HELLO[:-2] + field + b"\r\n\r\n")
        assert client.head()[0] in (431, 200)
        client.close()


@pytest.mark.parametrize("length", [5, MAX_BODY + 1])
def test_100_continue(quick: Rig, length: int) -> None:
    """A client that waits for it gets it, once, whether the body is collected or not."""
    client = quick.client()
    client.sock.sendall(UPLOAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % length)
    assert client.head()[0] == 100
    client.sock.sendall(b"a" * length)
    assert answers(client, 1) == [(200, str(length).encode())]
    client.sock.sendall(HELLO)
    assert answers(client, 1) == [(200, b"hello")]


def test_http_1_0(quick: Rig) -> None:
    """No 100, no chunks, and the connection ends with the answer."""
    client = quick.client()
    client.sock.sendall(
        b"POST /upload HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    )
    client.sock.sendall(b"hello")
    assert answers(client, 1) == [(200, b"5")]
    assert client.to_the_end() == b""


@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
def test_clients_that_leave_half_way(quick: Rig, leave: str) -> None:
    """In the head, or in the body of a request to us: no traceback, nothing left."""
    for begin in (b"", b"POST", BEGUN, BEGUN + b"{", OURS + b"Transfer-Encoding: chunked\r\n\r\n5"):
        for _ in range(3):
            client = quick.client()
            client.sock.sendall(begin)
            getattr(client, leave)()
    assert quick.server.get("/hello") == (200, b"hello")


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_clients_that_leave_an_upload(quick: Rig, leave: str) -> None:
    """What a host's own route makes of that is the host's; nothing is left, all goes on."""
    before = len(quick.server.log())
    for _ in range(10):
        client = quick.client()
        client.sock.sendall(UPLOAD + b"Content-Length: 99999\r\n\r\n" + b"a" * 30_000)
        getattr(client, leave)()
    eventually(lambda: quick.server.get("/hello") == (200, b"hello"), "an answer")
    quick.check_leaks()
    with quick.server._log.open("r+") as log:  # its tracebacks are not ours
        log.truncate(before)


def test_where_descriptors_run_out(quick: Rig) -> None:
    """No traceback, no turning in circles; and it goes on when there are some again."""
    worker = quick.server.worker
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    few = quick.server.descriptors() + 5
    try:
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (few, limits[1]))
        for _ in range(20):
            quick.client()
        eventually(lambda: "No connection is accepted" in quick.server.log(), "a word of it")
        time.sleep(1.2)  # that it is not said a hundred times takes time to see
        assert quick.server.log().count("No connection is accepted") <= 6
    finally:
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
    assert quick.server.get("/hello") == (200, b"hello")
    quick.close_clients()


# TLS


@pytest.fixture
def trust(certificate: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate.authority)


@pytest.fixture
def tls_rig(
    log_file: Path,
    provider: Provider,
    certificate: Certificate,
    trust: ssl.SSLContext,
    worker_class: str,
) -> Iterator[Rig]:
    """A server behind gunicorn's own TLS, with short limits, found without a traceback."""
    options = ["--certfile", certificate.cert, "--keyfile", certificate.cert, "--threads=8"]
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, *options, tls=trust, **limits) as rig:
        yield rig
        assert_quiet(rig)


class Records(Client):
    """A client that hands its TLS to the wire in pieces."""

    def __init__(self, port: int, trust: ssl.SSLContext) -> None:
        super().__init__(port)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trust.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def hello(self) -> bytes:
        """The first message of a handshake."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def shake_hands(self) -> None:
        while True:
            try:
                return self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                self.incoming.write(self.sock.recv(65536))
            finally:
                self.sock.sendall(self.outgoing.read())

    def record(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()


def test_deadlines_behind_tls(tls_rig: Rig, trust: ssl.SSLContext) -> None:
    """They hold for what TLS waits for too: a handshake, or a record, of which each byte comes."""

    hello = Records(tls_rig.server.port, trust)
    whole_hello = hello.hello()
    hello.close()
    raw = {
        "silent": Case(b"", None, FIRST),
        "half a handshake": Case(whole_hello[:100], None, FIRST),
        "a handshake that drips": Case(whole_hello[:1], None, FIRST, drips=whole_hello[1:]),
    }
    inside = {
        name: CASES[name]
        for name in (
            "silent",
            "half a body",
            "a body that drips",
            "half a long upload",
            "a short upload that drips, to its end",
            "kept, and silent",
            "kept, and half a request",
        )
    }
    drip = Case(b"", None, FIRST)

    def within_a_record() -> Client:
        client = Records(tls_rig.server.port, trust)
        tls_rig.clients.append(client)
        client.shake_hands()
        record = client.record(BEGUN)
        drip.sends, drip.drips = record[:1], record[1:]
        return client

    with ThreadPoolExecutor(3) as pool:
        ends = [
            pool.submit(assert_outcomes, raw, tls_rig.client),
            pool.submit(assert_outcomes, inside, lambda: tls_rig.client(tls=trust)),
            pool.submit(assert_outcomes, {"a record that drips": drip}, within_a_record),
        ]
        for end in ends:
            end.result()


def test_half_handshakes_cost_no_thread(tls_rig: Rig, trust: ssl.SSLContext) -> None:
    """Twice as many as threads, and a cancel goes through."""
    hello = Records(tls_rig.server.port, trust)
    half = hello.hello()[:100]
    hello.close()
    for _ in range(16):
        tls_rig.client().sock.sendall(half)
    client = tls_rig.client(tls=trust).post("tls", simulate={"id": "tls", "silent_after": 2})
    client.until(b"data: ")
    begun = time.monotonic()
    assert tls_rig.server.cancel("tls")[0] == 200
    assert time.monotonic() - begun < 0.5


def test_requests_in_tls_records(tls_rig: Rig, trust: ssl.SSLContext) -> None:
    """Wherever a request ends in its records: what TLS has read already is not waited for."""
    padded = HELLO[:-2] + b"X: " + b"a" * 6000 + b"\r\n\r\n"
    client = tls_rig.client(tls=trust)
    client.sock.sendall(HELLO * 3)
    assert answers(client, 3) == [(200, b"hello")] * 3
    for length in (5, 10_000, 19_000, 22_000, 24_000, 40_000):
        client.sock.sendall(upload(b"a" * length) + padded + HELLO)
        expected = [b"%d" % length, b"hello", b"hello"]
        assert answers(client, 3) == [(200, body) for body in expected], length
    client.close()


def test_plain_words_to_a_tls_port(tls_rig: Rig, trust: ssl.SSLContext) -> None:
    """What is no handshake ends its connection, and is no traceback."""
    for raw in (HELLO, b"\x16\x03\x01\xff\xff" + b"a" * 100, b"\0" * 1000):
        client = tls_rig.client()
        client.sock.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            assert b" 200 " not in client.to_the_end()
    assert tls_rig.server.get("/hello") == (200, b"hello")
