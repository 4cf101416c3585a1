"""HTTP/1 as bytes: a request's head taken in, an answer's head and errors made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

_HEAD_LIMIT = 65_536  # bytes of request line and headers

BODY_LIMIT = 16 << 20  # bytes of a request's body


class BadRequest(ValueError):
    """Something the caller must correct; answered as an error in OpenAI's shape."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status

    def to_json(self) -> dict[str, object]:
        """Returns the body of the error answer."""
        return error_body(str(self), kind="invalid_request_error", param=self.param)


def error_body(
    message: str, *, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class Request(NamedTuple):
    """One parsed HTTP request."""

    method: str
    target: str
    headers: dict[str, str]  # lower-case names
    http11: bool
    length: int
    body: bytes = b""

    @property
    def keep_alive(self) -> bool:
        """Whether the client will have the connection again."""
        wanted = "close" not in self.headers.get("connection", "").lower()
        return self.http11 and wanted and self.method != "HEAD"  # we would send HEAD a body


def make_head(status: int, fields: Mapping[str, object], keep_alive: bool) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Simulated"
    everything = {**fields, "Connection": "keep-alive" if keep_alive else "close"}
    lines = [f"{name}: {value}\r\n" for name, value in everything.items() if value is not None]
    return f"HTTP/1.1 {status} {phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


def take_head(buffer: bytearray) -> Request | None:
    """Takes a request's head off the front of `buffer`; returns None while it is not whole.

    Raises:
        BadRequest: What came is not HTTP/1, or too much for this server.
    """
    while buffer[:2] == b"\r\n":  # RFC 9112, 2.2: tolerated before a request line
        del buffer[:2]
    if buffer and not buffer[:1].isalpha() and buffer != b"\r":
        raise BadRequest("This is not HTTP.")
    end = buffer.find(b"\r\n\r\n")
    if (end if end >= 0 else len(buffer)) > _HEAD_LIMIT:
        raise BadRequest("The request's headers are too large.", status=431)
    if end < 0:
        return None
    lines = buffer[:end].decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    return _parse_head(lines)


def _parse_head(lines: list[str]) -> Request:
    parts = lines[0].split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequest("The request line is malformed.")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadRequest("A header line is malformed.")
        key = name.lower()
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    return Request(parts[0], parts[1], headers, parts[2] == "HTTP/1.1", _body_length(headers))


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise BadRequest("Send the body with a Content-Length.", status=411)
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise BadRequest("Content-Length must be a whole number.")
    if len(length) > 12 or int(length) > BODY_LIMIT:
        raise BadRequest(f"The body may have up to {BODY_LIMIT} bytes.", status=413)
    return int(length)
