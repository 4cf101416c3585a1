"""connection: hang-ups, slow readers, requests in pieces; the same with TLS."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest

from chatstream.simulator import Simulator
from tests.conftest import PATIENCE, eventually
from tests.simulator.client import CHAT, LONG, Client, Tls, post, raw_socket, read_all, read_until


@pytest.mark.parametrize(
    ("abort", "by"), [(Client.leave, "client"), (Client.reset, "reset")], ids=["FIN", "RST"]
)
def test_a_close_stops_the_clock(
    client: Client, desk: Client, name: str, abort: Callable[[Client], None], by: str
) -> None:
    """The stamp lies between the close and the figure's answer; nothing is made after it."""
    client.begin(id=name, tokens=LONG, rate=1000)
    desk.figure(name, "delivered", count=3)
    before = time.monotonic_ns()
    abort(client)
    figure = desk.figure(name, "closed")
    assert before <= figure["closed_ns"] <= time.monotonic_ns()
    assert (figure["closed_by"], figure["finished"], figure["open"]) == (by, False, False)
    elapsed_ns = figure["closed_ns"] - figure["started_ns"]
    assert figure["generated"] == int(elapsed_ns * 1000 / 1e9) + 1
    assert figure["delivered"] <= figure["generated"]
    assert figure == desk.figure(name)


@pytest.mark.parametrize(
    "scenario",
    [
        {"headers_after": 60},
        {"silent_after": 0},
        {"queue": 60, "queue_interval": 60},
        {"stream": False, "tokens": LONG},
        {"stream": False, "tokens": LONG, "queue": 60},
        {"raw": "x", "rate": 0.01},
        {"status": 500, "headers_after": 60},
        {"tokens": 0, "hold_open": 60},
    ],
    ids=str,
)
def test_a_close_is_seen_in_every_silence(
    client: Client, desk: Client, name: str, scenario: dict[str, Any]
) -> None:
    """No write is needed to notice it."""
    client.begin(id=name, **scenario)
    desk.figure(name, "started")
    client.leave()
    assert desk.figure(name, "closed")["closed_by"] == "client"


def test_a_request_that_comes_with_its_own_close_is_known(
    provider: Simulator, desk: Client, name: str
) -> None:
    """Its client left before anything was made, or all but."""
    with raw_socket(provider, post({"stream": True, "simulate": {"id": name}})) as sock:
        sock.shutdown(socket.SHUT_WR)
        figure = desk.figure(name, "closed")
    assert figure["closed_by"] == "client"
    assert figure["generated"] <= 1
    assert figure["started_ns"] <= figure["closed_ns"]


def test_half_a_request_is_none(provider: Simulator, desk: Client) -> None:
    """A client that goes while it sends leaves no trace but the stamp."""
    requests = desk.stats()["requests"]
    before = time.monotonic_ns()
    with raw_socket(provider, post({})[:-1]):
        pass
    eventually(lambda: (desk.stats()["last_connection_closed_ns"] or 0) >= before, "the close")
    assert desk.stats()["requests"] == requests


def test_many_closes_at_once_are_stamped_together(desk: Client, provider: Simulator) -> None:
    """The stamp is taken before the work that each close means."""
    names = [f"crowd-{number}" for number in range(50)]
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(Client(provider))) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.begin(id=name, tokens=LONG, headers_after=60)
        for name in names:
            desk.figure(name, "started")
        before = time.monotonic_ns()
        for client in clients:
            client.close()
        after = time.monotonic_ns()
    stamps = [desk.figure(name, "closed")["closed_ns"] for name in names]
    assert before <= min(stamps)
    assert max(stamps) - after < PATIENCE * 1e9 / 20


def test_a_request_in_pieces(provider: Simulator) -> None:
    """However small; an empty line before it is borne."""
    with raw_socket(provider) as sock:
        for byte in b"\r\n" + post({"simulate": {"tokens": 1, "rate": 0}}):
            sock.sendall(bytes([byte]))
        assert read_until(sock, b"}}").startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests(provider: Simulator) -> None:
    """Are answered one after the other."""
    requests = [post({"simulate": {"tokens": n, "rate": 1000}}) for n in (3, 1, 2)]
    with raw_socket(provider, b"".join(requests)) as sock:
        answers = b""
        while answers.count(b"usage") < 3:
            answers += sock.recv(65_536)
    order = [answers.index(b'"completion_tokens":%d' % n) for n in (3, 1, 2)]
    assert order == sorted(order)


def test_expect_continue(provider: Simulator) -> None:
    """curl asks before it sends a large body."""
    request = post({"simulate": {"tokens": 1, "rate": 0}}, CHAT, "HTTP/1.1", "Expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    with raw_socket(provider, head + b"\r\n\r\n") as sock:
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_until(sock, b"}}").startswith(b"HTTP/1.1 200 ")


def test_a_slow_reader_stops_nobody(provider: Simulator, desk: Client, name: str) -> None:
    """What it does not take is not made in advance; the clock runs on, others go on."""
    body = {
        "stream": True,
        "simulate": {"id": name, "tokens": 20_000, "rate": 200_000, "pad": 2000},
    }
    with socket.socket() as sock, closing(Client(provider)) as other:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", provider.port))
        sock.sendall(post(body))
        eventually(lambda: desk.figure(name)["generated"] == 20_000, "all generated")
        assert len(other.chat(tokens=50, rate=1000).text().split()) == 50
        figure = desk.figure(name)
        assert figure["delivered"] < 10_000
        assert (figure["open"], figure["finished"]) == (True, False)
        [slow] = [c for c in provider._connections.values() if c.number == figure["connection"]]
        assert len(slow._out) < 65_536 + 4096
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data = data[-7:] + sock.recv(1 << 20)
    figure = desk.figure(name, "closed")
    assert (figure["delivered"], figure["finished"]) == (20_000, True)


def test_tls(secure: Simulator, tls: Tls) -> None:
    """The same answers, over a connection that is used again."""
    assert secure.url == f"https://127.0.0.1:{secure.port}{CHAT}"
    with closing(Client(secure, tls.context)) as client:
        for number in range(2):
            assert len(client.chat(id=f"t{number}", tokens=20, rate=1000).text().split()) == 20
        assert client.figure("t0")["connection"] == client.figure("t1")["connection"]


def test_tls_large_requests_and_slow_readers(secure: Simulator, tls: Tls) -> None:
    """More than one record each way, and more than the kernel takes at once."""
    with (
        closing(Client(secure, tls.context)) as client,
        closing(Client(secure, tls.context)) as desk,
    ):
        body = {"stream": True, "pad": "x" * 300_000}
        simulate = {"id": "big", "tokens": 10_000, "rate": 200_000, "pad": 2000}
        client.request("POST", CHAT, json.dumps({**body, "simulate": simulate}))
        desk.figure("big", "started")
        eventually(lambda: desk.figure("big")["generated"] == 10_000, "all generated")
        assert desk.figure("big")["delivered"] < 10_000
        answer = client.getresponse().read()
        assert answer.count(b"data: ") == 10_002
        assert len(desk.figure("big", "closed")["body"]["pad"]) == 300_000


@pytest.mark.parametrize("abort", [Client.leave, Client.reset])
def test_tls_close_is_seen(secure: Simulator, tls: Tls, abort: Callable[[Client], None]) -> None:
    """At once, without a write."""
    with (
        closing(Client(secure, tls.context)) as desk,
        closing(Client(secure, tls.context)) as client,
    ):
        client.begin(id="a", headers_after=60)
        desk.figure("a", "started")
        before = time.monotonic_ns()
        abort(client)
        figure = desk.figure("a", "closed")
        assert before <= figure["closed_ns"] <= time.monotonic_ns()
        assert figure["closed_by"] == ("client" if abort is Client.leave else "reset")


def test_tls_body_that_ends_with_the_connection(secure: Simulator, tls: Tls) -> None:
    """Ends with TLS's own goodbye, so that it cannot be mistaken for a cut."""
    request = post({"stream": True, "simulate": {"tokens": 1, "rate": 0, "chunked": False}})
    with raw_socket(secure) as plain:
        wrapped = tls.context.wrap_socket(
            plain, server_hostname="localhost", suppress_ragged_eofs=False
        )
        with wrapped:
            wrapped.sendall(request)
            assert read_all(wrapped).endswith(b"data: [DONE]\n\n")


def test_a_handshake_that_the_client_leaves(secure: Simulator, tls: Tls) -> None:
    """Is counted, and does no harm."""
    with closing(Client(secure, tls.context)) as desk:
        for sent in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"):
            with raw_socket(secure, sent):
                pass
        eventually(lambda: desk.stats()["handshakes_aborted"] == 3, "three counted")
        assert (desk.stats()["connections_open"], desk.stats()["internal_errors"]) == (0, 0)


def test_handshake_delay(tls: Tls) -> None:
    """The connection stands, the handshake waits; a client that goes meanwhile is noticed."""
    with Simulator(certfile=tls.certfile, handshake_delay=0.2) as provider:
        begun = time.monotonic()
        with raw_socket(provider):
            assert time.monotonic() - begun < 0.2
        with closing(Client(provider, tls.context)) as client:
            begun = time.monotonic()
            stats = client.stats()
            assert time.monotonic() - begun >= 0.2
        assert stats["handshakes_aborted"] == 1
        assert begun * 1e9 - 0.2e9 < stats["last_connection_closed_ns"] < (begun + 0.2) * 1e9
