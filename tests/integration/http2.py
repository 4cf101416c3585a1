"""A browser over HTTP/2: many streams on one connection, each of which can be reset."""

from __future__ import annotations

import json
import socket
import ssl
from typing import Any

import h2.connection
import h2.events
from h2.errors import ErrorCodes


class Browser:
    """One TLS connection. Reads only when told to."""

    def __init__(self, port: int, authority: str) -> None:
        context = ssl.create_default_context(cafile=authority)
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.sock = context.wrap_socket(plain, server_hostname="localhost")
        assert self.sock.selected_alpn_protocol() == "h2"
        self._h2 = h2.connection.H2Connection()
        self._h2.initiate_connection()
        self._bodies: dict[int, bytes] = {}
        self._heads: dict[int, dict[str, str]] = {}
        self._ended: set[int] = set()
        self._flush()

    def ask(self, method: str, path: str, fields: dict[str, Any] | None = None) -> int:
        """Sends a request. Returns its stream, as HTTP/2 has the word."""
        number = self._h2.get_next_available_stream_id()
        head = [
            (":method", method),
            (":path", path),
            (":scheme", "https"),
            (":authority", "localhost"),
        ]
        body = b"" if fields is None else json.dumps(fields).encode()
        head += [("content-type", "application/json"), ("content-length", str(len(body)))]
        self._h2.send_headers(number, head, end_stream=not body)
        if body:
            self._h2.send_data(number, body, end_stream=True)
        self._bodies[number] = b""
        self._flush()
        return number

    def chat(self, session: str, simulate: dict[str, Any]) -> int:
        messages = [{"role": "user", "content": "hello"}]
        simulate = {"id": session, **simulate}
        fields = {"messages": messages, "sessionId": session, "simulate": simulate}
        return self.ask("POST", "/api/chat/stream", fields)

    def until(self, number: int, text: bytes) -> None:
        """Waits for `text` in that stream."""
        while text not in self._bodies[number]:
            self._more()

    def head(self, number: int) -> dict[str, str]:
        while number not in self._heads:
            self._more()
        return self._heads[number]

    def body(self, number: int) -> bytes:
        """The whole of it. Fails if it is reset."""
        while number not in self._ended:
            self._more()
        return self._bodies[number]

    def reset(self, number: int) -> None:
        """What a browser does when a page aborts its fetch."""
        self._h2.reset_stream(number, ErrorCodes.CANCEL)
        self._flush()

    def close(self) -> None:
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError("the server closed")
        for event in self._h2.receive_data(data):
            self._note(event)
        self._flush()

    def _note(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            pairs = [(bytes(name).decode(), bytes(value).decode()) for name, value in event.headers]
            self._heads[event.stream_id] = dict(pairs)
        elif isinstance(event, h2.events.DataReceived):
            self._bodies[event.stream_id] += event.data
            size = event.flow_controlled_length
            self._h2.acknowledge_received_data(size, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self._ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
            raise EOFError(f"the server broke off: {event}")

    def _flush(self) -> None:
        self.sock.sendall(self._h2.data_to_send())
