"""wire: what is HTTP, and what is not."""

from __future__ import annotations

import pytest

from chatstream.simulator import Simulator
from tests.simulator.client import Client, raw_socket, read_all


def test_head_is_answered_without_spoiling_the_connection(client: Client) -> None:
    """The connection ends, as the JSON would be read as the next answer."""
    answer = client.ask("HEAD", "/")
    assert (answer.status, answer.headers["Connection"]) == (404, "close")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n : x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
        (b"GET //[ HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_http(provider: Simulator, request_bytes: bytes, status: int) -> None:
    """An answer, then the end of the connection."""
    with raw_socket(provider, request_bytes) as sock:
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b'"error"' in answer
