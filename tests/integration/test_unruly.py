"""Streams that hold no thread, in a real worker, amid what goes wrong in apps."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.conftest import Certificate, Rig, serving
from tests.integration.processes import Provider, Server

UNRULY = "tests.integration.unruly:app"

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def unruly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        contextlib.closing(Provider()) as provider,
        serving(log, provider, app=UNRULY, CHATSTREAM_THREADS="8") as rig,
    ):
        yield rig


@pytest.fixture(params=["1", "0"], ids=["detached", "iterable"])
def detach(request: pytest.FixtureRequest) -> str:
    """Both movers: what is promised here is so of both."""
    return str(request.param)


def test_a_response_that_breaks_off_is_logged_once(log_file: Path, provider: Provider) -> None:
    """A host's route that raises in its body: one traceback, and no second answer in the log."""
    options = ("--threads", "1", "--access-logfile", "-")  # so the next request comes after it
    with serving(log_file, provider, *options, app=UNRULY) as rig:
        client = rig.client()
        client.sock.sendall(b"GET /breaks HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.to_the_end().endswith(b"\r\n3\r\none\r\n")
        client.close()
        assert rig.server.get("/debug")[0] == 200
        assert rig.server.log().count("Traceback") == 1
        assert rig.server.log().count("GET /breaks") == 1


@pytest.mark.parametrize("fault", ["raises", "header"])
def test_a_response_that_cannot_begin_is_a_500(unruly: Rig, fault: str) -> None:
    """`start_response` raises, after the provider has answered: the client is told, as ever."""
    client = unruly.client().post(fault, headers={"X-Start": fault}, simulate={"rate": 100})
    status, headers = client.head()
    assert (status, headers["connection"]) == (500, "close")
    assert b"Internal Server Error" in client.to_the_end()
    assert "aborted by client" in unruly.server.ending_of(fault)


def test_no_more_is_sent_than_the_app_has_announced(unruly: Rig) -> None:
    """A Content-Length that an app sets is kept: the next response is not behind the rest."""
    plan = {"tokens": 5, "rate": 100}
    client = unruly.client().post("length", headers={"X-Start": "length"}, simulate=plan)
    assert client.head()[1]["content-length"] == "300"
    client.exactly(300)
    assert "completed" in unruly.server.ending_of("length")
    assert client.ask("GET", "/debug")[0] == 200


def test_the_apps_context_is_there_to_the_end(unruly: Rig) -> None:
    """What runs when a response is closed finds its own request's context variables."""
    names = [f"who{number}" for number in range(6)]
    clients = [
        unruly.client().post(name, headers={"X-Who": name}, simulate={"tokens": 5, "rate": 50})
        for name in names
    ]
    for client in clients:
        client.head()
        client.body()

    def closed() -> list[list[str]]:
        entries: list[list[str]] = json.loads(unruly.server.get("/closed")[1])
        return sorted(entries)

    eventually(lambda: len(closed()) == len(names), "all closed")
    assert [[name, name] for name in names] == closed()


def test_stop_ends_what_is_live(log_file: Path, provider: Provider, detach: str) -> None:
    """`Service.stop` does not wait, and leaves no client without an end and no slot taken."""
    with serving(log_file, provider, app=UNRULY, CHATSTREAM_DETACH=detach) as rig:
        bodies = {name: rig.client().post(name, simulate={"rate": 50}) for name in "abcdefgh"}
        for body in bodies.values():
            body.until(b'"content"')
        early = rig.client().post("early", simulate={"headers_after": 60})
        eventually(lambda: rig.server.debug()["live"] == 9, "nine streams")
        assert rig.server.get("/stop") == (200, b"stopped")
        for body in bodies.values():
            body.head()
            assert b'"code": "shutting_down"' in body.body()
        assert early.head()[0] == 503
        for session in (*bodies, "early"):
            assert "aborted by shutdown" in rig.server.ending_of(session)
        eventually(lambda: rig.server.debug()["slots"] == 0, "no slot taken")
        again = rig.client().post("again", simulate={"tokens": 2, "rate": 100})
        again.head()
        assert again.body().endswith(DONE)


def test_the_idle_clock_goes_on_behind_a_ping(
    log_file: Path, provider: Provider, detach: str
) -> None:
    """A ping is no sign of life of the provider's, also where it is what begins the response."""
    with serving(
        log_file,
        provider,
        CHATSTREAM_DETACH=detach,
        CHATSTREAM_PING_INTERVAL="1.6",
        CHATSTREAM_UPSTREAM_IDLE_TIMEOUT="2",
    ) as rig:
        client = rig.client().post("idle", simulate={"silent_after": 0})
        client.head()
        assert b'"code": "upstream_idle"' in client.body()
        assert 1.9 < duration(rig, "idle") < 3.2


def test_an_idle_timeout_shorter_than_a_ping(
    log_file: Path, provider: Provider, detach: str
) -> None:
    """The provider is given up when its time is over, whenever the next ping is due."""
    with serving(
        log_file, provider, CHATSTREAM_DETACH=detach, CHATSTREAM_UPSTREAM_IDLE_TIMEOUT="1"
    ) as rig:
        client = rig.client().post("idle", simulate={"silent_after": 0, "headers_after": 0.5})
        assert client.head()[0] == 502
        assert duration(rig, "idle") < 4


def duration(rig: Rig, session: str) -> float:
    return float(rig.server.ending_of(session).rpartition("duration=")[2].split("s")[0])


def test_what_tls_has_read_already(log_file: Path, certificate: Certificate, detach: str) -> None:
    """What http.client and OpenSSL hold goes over, wherever one ends and the other begins."""
    with one_record(certificate) as port:
        server = Server(
            log_file,
            CHATSTREAM_DETACH=detach,
            CHATSTREAM_UPSTREAM_URL=f"https://localhost:{port}/v1",
            REQUESTS_CA_BUNDLE=certificate.authority,
        )
        rig = Rig(server, None)
        try:
            client = rig.client(timeout=8).post("tls")
            client.head()
            assert client.body() == 3 * EVENT + FINISH + DONE
        finally:
            rig.close_clients()
            server.stop()


@contextlib.contextmanager
def one_record(certificate: Certificate) -> Iterator[int]:
    """A provider whose whole answer is one TLS record.

    http.client's buffer (8192 bytes) has the headers and half of a chunk's size line.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    head += b"X-Pad: %b\r\n\r\n" % (b"a" * (8191 - len(head) - len(b"X-Pad: \r\n\r\n")))
    body = 3 * EVENT + FINISH + DONE
    left = threading.Event()

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            with context.wrap_socket(sock, server_side=True) as peer:
                peer.settimeout(10)
                while not peer.recv(65536).endswith(b"}"):
                    pass
                peer.sendall(head + b"%X\r\n%b\r\n0\r\n\r\n" % (len(body), body))
                left.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            left.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
