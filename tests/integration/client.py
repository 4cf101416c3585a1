"""A browser, as far as a stream sees one: a socket that asks, reads, and leaves in every way."""

from __future__ import annotations

import json
import socket
import ssl
import struct
from typing import Any

from chatstream.sockets.framing import Chunked

SHUT_DOWN = b"""event: error
data: {"error": {"message": "The service is restarting. Please ask again.", \
"type": "service_error", "code": "shutting_down"}}

"""
"""What a client is sent of a stream that ends with its worker."""


class Client:
    """One connection that posts one chat. Reads only when told to."""

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        receive_buffer: int | None = None,
        timeout: float = 20,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(timeout)
        self.sock.connect((host, port))
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="localhost")
        self.port: int = self.sock.getsockname()[1]
        self._buffer = b""

    def post(
        self,
        session: str | None = None,
        stream: str | None = None,
        *,
        path: str = "/api/chat/stream",
        headers: dict[str, str] | None = None,
        http: str = "1.1",
        simulate: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Client:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], **fields}
        names = {"sessionId": session, "streamId": stream, "simulate": simulate}
        body |= {key: value for key, value in names.items() if value is not None}
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/{http}", "Host: localhost", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(data)}"]
        lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        return self

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """A request without a body, and its whole answer. The connection stays."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Length: 0"]
        lines += [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        status, got = self.head()
        return status, got, self.exactly(int(got["content-length"]))

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers (names in lower case)."""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in rest)
        return int(first.split()[1]), {key.lower(): value for key, value in headers.items()}

    def until(self, text: bytes) -> None:
        """Waits for `text`; takes nothing away."""
        while text not in self._buffer:
            self._more()

    def body(self) -> bytes:
        """The rest of a chunked body. Fails if it does not end as it should."""
        chunked = Chunked()
        body, self._buffer = chunked.feed(self._buffer), b""
        while not chunked.finished:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(f"the body broke off after {body[-200:]!r}")
            body += chunked.feed(data)
        return body

    def exactly(self, length: int) -> bytes:
        """The next `length` bytes."""
        while len(self._buffer) < length:
            self._more()
        data, self._buffer = self._buffer[:length], self._buffer[length:]
        return data

    def to_the_end(self) -> bytes:
        """Everything until the server closes."""
        data, self._buffer = self._buffer, b""
        while piece := self.sock.recv(65536):
            data += piece
        return data

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def pipeline_and_close(self) -> None:
        self.sock.sendall(b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(f"the server closed; so far: {self._buffer[-500:]!r}")
        self._buffer += data
