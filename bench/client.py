"""As much of an HTTP/1.1 client as the benchmark needs, on a socket it can close at an instant."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

Address = tuple[str, int]
TOKEN = b"@0"
"""What a token of a provider that stamps has, however its event looks."""


def request(method: str, path: str, body: object = None) -> bytes:
    """The bytes of a request, with `body` as JSON."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def chat(path: str, simulate: dict[str, object], **ids: str) -> bytes:
    """The request for an answer that behaves as `simulate` says."""
    messages = [{"role": "user", "content": "Why is a good brake boring?"}]
    body = {"model": "simulated", "stream": True, "messages": messages, "simulate": simulate}
    return request("POST", path, {**body, **ids})


class Connection:
    """One connection, kept alive. `receive_buffer` is SO_RCVBUF; 0 leaves it to the kernel."""

    def __init__(self, address: Address, *, receive_buffer: int = 0, timeout: float = 30) -> None:
        self._sock = socket.socket()
        if receive_buffer:  # before connect(): it bounds the window that is offered
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._sock.settimeout(timeout)
        self._sock.connect(address)
        self.send = self._sock.sendall
        self.close = self._sock.close
        self._buffer = bytearray()

    def ask(self, data: bytes) -> tuple[int, Any]:
        """Sends a request, reads a JSON answer that has a length; returns its status and value."""
        self.send(data)
        head = self.read_until(b"\r\n\r\n").lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        while len(self._buffer) < length:
            self._receive()
        return int(head.split(b" ", 2)[1]), json.loads(self._take(length))

    def read_until(self, end: bytes, times: int = 1) -> bytes:
        """Takes bytes up to and with the `times`-th `end`."""
        position = 0
        for _ in range(times):
            while (found := self._buffer.find(end, position)) < 0:
                self._receive()
            position = found + len(end)
        return self._take(position)

    def discard(self) -> None:
        """Empties the kernel's buffer, so that a close sends a FIN and no RST. The last read."""
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._sock.recv(65536):
                pass

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _receive(self) -> None:
        data = self._sock.recv(65536)
        if not data:
            raise EOFError(f"the server closed after {bytes(self._buffer[-300:])!r}")
        self._buffer += data


class Figures:
    """The simulator's figures."""

    def __init__(self, simulator: Address) -> None:
        self._connection = Connection(simulator)

    def get(self, path: str) -> dict[str, Any]:
        """What `GET path` tells."""
        figures: dict[str, Any] = self._connection.ask(request("GET", path))[1]
        return figures
