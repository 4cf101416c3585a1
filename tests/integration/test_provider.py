"""Providers that the simulator is too well-behaved to be: scripted bytes on a real socket."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.client import Client
from tests.integration.processes import Server

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Scripted:
    """Answers the n-th request it gets with the n-th of its answers, keeping connections open."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = iter(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.connections = 0
        self.answered = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1/chat/completions"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, StopIteration), connection.makefile("rb") as lines:
            while lines.readline():
                length = 0
                while (line := lines.readline().lower()) != b"\r\n":
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                lines.read(length)
                connection.sendall(next(self._answers))
                self.answered.set()
        connection.close()

    def close(self) -> None:
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.fixture(params=["detached", "iterable"])
def detach(request: pytest.FixtureRequest) -> str:
    """CHATSTREAM_DETACH: either mover."""
    return {"detached": "1", "iterable": "0"}[request.param]


@contextlib.contextmanager
def serving(log: Path, detach: str, *answers: bytes) -> Iterator[tuple[Server, Scripted]]:
    with contextlib.closing(Scripted(*answers)) as provider:
        server = Server(log, CHATSTREAM_UPSTREAM_URL=provider.url, CHATSTREAM_DETACH=detach)
        try:
            yield server, provider
        finally:
            server.stop()


def ask(server: Server, session: str) -> tuple[int, bytes]:
    return answer_to(Client(server.port).post(session))


def answer_to(client: Client) -> tuple[int, bytes]:
    with contextlib.closing(client):
        status, headers = client.head()
        if "content-length" in headers:
            return status, client.exactly(int(headers["content-length"]))
        return status, client.body()


@pytest.mark.parametrize("interim", [b"100 Continue", b"102 Processing", b"103 Early Hints"])
def test_an_interim_answer_is_passed_over(log_file: Path, detach: str, interim: bytes) -> None:
    """A 1xx is not the answer: that one follows, and goes to the stream that asked for it."""
    first = b"HTTP/1.1 " + interim + b"\r\nLink: </a>\r\n\r\n"
    answers = [HEAD + chunked(b"data: %d\n\ndata: [DONE]\n\n" % n) for n in range(3)]
    with serving(log_file, detach, *[first * 2 + answer for answer in answers]) as (
        server,
        provider,
    ):
        for number in range(3):
            expected = b"data: %d\n\ndata: [DONE]\n\n" % number
            assert ask(server, f"s-{number}") == (200, expected)
            server.ending_of(f"s-{number}")  # the connection is back
        assert provider.connections == 1


def test_bytes_after_the_end_do_not_reach_the_next_stream(log_file: Path, detach: str) -> None:
    """A connection that holds more than its answer is not used again."""
    answer = HEAD + chunked(b"data: one\n\ndata: [DONE]\n\n")
    stray = HEAD + chunked(b"data: stray\n\ndata: [DONE]\n\n")
    with serving(log_file, detach, answer + stray, answer) as (server, provider):
        for session in ("s-1", "s-2"):
            assert ask(server, session) == (200, b"data: one\n\ndata: [DONE]\n\n")
            server.ending_of(session)  # the connection would be back
        assert provider.connections == 2


@pytest.mark.parametrize("body", [b"zz\r\n", b"-1\r\n", b"5\r\ndata:xxx\r\n", b"3\r\nda"], ids=repr)
def test_a_body_that_breaks_its_framing(log_file: Path, detach: str, body: bytes) -> None:
    """Also where the bad bytes come along with the headers: a fault of the provider's, no more."""
    with serving(log_file, detach, HEAD + body) as (server, provider):
        client = Client(server.port).post("s-1")
        assert provider.answered.wait(10)
        provider.close()
        status, answer = answer_to(client)
        assert status == 502
        assert b'"upstream_truncated"' in answer
        assert "failed: upstream_truncated" in server.ending_of("s-1")
        assert "Traceback" not in server.log()
