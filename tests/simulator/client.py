"""A client that knows the simulator's routes, and raw sockets for what no client sends."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from chatstream.simulator import Simulator
from tests.conftest import PATIENCE

CHAT = "/v1/chat/completions"


LONG = 100_000  # tokens: more than any test waits for


class Client(http.client.HTTPConnection):
    """A client that knows the simulator's routes."""

    def __init__(self, provider: Simulator, tls: ssl.SSLContext | None = None) -> None:
        super().__init__("127.0.0.1", provider.port, timeout=PATIENCE)
        self._tls = tls

    def connect(self) -> None:
        super().connect()
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname="localhost")

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One whole exchange."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        self.request(method, path, data, headers)
        with closing(self.getresponse()) as response:
            return Answer(response.status, dict(response.getheaders()), response.read())

    def post(self, body: object) -> Answer:
        return self.ask("POST", CHAT, body)

    def chat(self, stream: bool = True, **simulate: Any) -> Answer:
        return self.post({"model": "m", "stream": stream, "simulate": simulate})

    def begin(self, stream: bool = True, **simulate: Any) -> None:
        """Sends a request, reads nothing."""
        self.request("POST", CHAT, json.dumps({"stream": stream, "simulate": simulate}))

    def figure(self, name: str, wait: str = "", **query: object) -> dict[str, Any]:
        if wait:
            query = {"timeout": PATIENCE, **query, "wait": wait}
        fields = "&".join(f"{key}={value}" for key, value in query.items())
        figure: dict[str, Any] = self.ask("GET", f"/requests/{name}?{fields}").json()
        return figure

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.ask("GET", "/stats").json()
        return stats

    def leave(self) -> None:
        """Sends a FIN. (close() would send a RST where there are bytes unread.)"""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of every event; comments left out."""
        blocks = [block for block in self.body.decode().split("\n\n") if block.startswith("data: ")]
        return [json.loads(data) if data != "[DONE]" else data for data in (b[6:] for b in blocks)]

    def text(self, field: str = "content") -> str:
        choices = [event["choices"] for event in self.events() if "choices" in event]
        return "".join(choice[0]["delta"].get(field, "") for choice in choices if choice)


@contextmanager
def raw_socket(provider: Simulator, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", provider.port), timeout=PATIENCE) as sock:
        sock.sendall(sent)
        yield sock


def post(body: object, path: str = CHAT, version: str = "HTTP/1.1", *lines: str) -> bytes:
    """A request's bytes."""
    data = json.dumps(body).encode()
    head = [f"POST {path} {version}", "Host: x", f"Content-Length: {len(data)}", *lines, "", ""]
    return "\r\n".join(head).encode() + data


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = sock.recv(65_536)
        assert more, f"closed after {data!r}"
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65_536), b""))


class Tls(NamedTuple):
    certfile: str
    context: ssl.SSLContext
