"""An app with the chat's routes, a server that walks one response, and the shape of refusals."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import flask
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, TestResponse

from chatstream import ChatStream, Service
from tests.conftest import eventually

URL = "https://provider.test/v1/chat/completions"
KEY = "sk-very-secret"
EVENT = 'data: {"choices":[{"delta":{"content":"žluť 🙂"},"finish_reason":null}]}\n\n'.encode()
DONE = b"data: [DONE]\n\n"
MESSAGES = [{"role": "user", "content": "hi"}]
STREAM = "/api/chat/stream"
CANCEL = "/api/chat/cancel"


class Chat:
    """An app with the routes in it."""

    def __init__(self, app: flask.Flask, identify: Callable[[], Any] | None) -> None:
        self.app = app
        app.config.from_mapping(CHATSTREAM_UPSTREAM_URL=URL, CHATSTREAM_API_KEY=KEY)
        app.config.setdefault("CHATSTREAM_MAX_STREAMS", 8)
        ChatStream(app, identify=identify)
        self.client: FlaskClient = app.test_client()
        self.service: Service = app.extensions["chatstream"]
        self._walks: list[Walk] = []

    def post(self, body: Any = None, **options: Any) -> TestResponse:
        """POST /stream, read to its end."""
        body = {"messages": MESSAGES} if body is None else body
        return self.client.post(STREAM, json=body, buffered=True, **options)

    def send(self, data: bytes, content_type: str | None = "application/json") -> TestResponse:
        """POST /stream with a raw body."""
        return self.client.post(STREAM, data=data, content_type=content_type, buffered=True)

    def cancel(self, path: str, **options: Any) -> TestResponse:
        return self.client.post(f"{CANCEL}{path}", **options)

    def open(self, **body: Any) -> Walk:
        """A stream that is live and not walked yet."""
        self._walks.append(Walk(self.app, {"messages": MESSAGES, **body}))
        return self._walks[-1]

    def close(self) -> None:
        for walk in self._walks:
            walk.close()
        self.service.stop()
        eventually(lambda: len(self.service.registry) == 0, "slots given back")


class Walk:
    """A server that walks one response, step by step."""

    def __init__(self, app: flask.Flask, body: Any, **headers: str) -> None:
        self.started: list[tuple[str, dict[str, str]]] = []
        self.contexts: list[bool] = []
        builder = EnvironBuilder(path=STREAM, method="POST", json=body, headers=headers)
        self.iterable: Any = app.wsgi_app(builder.get_environ(), self._start)

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.started.append((status, dict(headers)))
        self.contexts.append(flask.has_app_context() or flask.has_request_context())

    def next(self) -> bytes:
        return next(self.iterable, b"")

    def close(self) -> None:
        self.iterable.close()


MakeChat = Callable[..., Chat]


def assert_refused(response: TestResponse, status: int, reason: str) -> None:
    """The shape of every refusal before the first byte."""
    assert (response.status_code, response.json["reason"]) == (status, reason)  # type: ignore[index]
    assert response.json["ok"] is False  # type: ignore[index]
    assert set(response.json) == {"ok", "reason", "message"}  # type: ignore[arg-type]
    assert response.json["message"].endswith((".", "-", ")"))  # type: ignore[index]
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert "X-Accel-Buffering" not in response.headers


def with_messages(more: str) -> bytes:
    return b'{"messages":[{"role":"user"}],%s}' % more.encode()


def body_of(length: int) -> bytes:
    """A good request of exactly `length` bytes."""
    return with_messages('"user":"' + "x" * (length - 40) + '"')


class Unreadable(io.RawIOBase):
    """A body that must not be read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise AssertionError("read")


def assert_not_found(response: TestResponse) -> None:
    assert response.status_code == 404
    assert response.json == {"ok": False, "reason": "not_found"}
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
