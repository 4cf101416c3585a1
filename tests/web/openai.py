"""An app in whose place OpenAI's API could be, and the shape of its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
from werkzeug.test import TestResponse

from chatstream import ChatStream, Service
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.stream import Stream
from tests.conftest import eventually
from tests.web.chat import KEY, MESSAGES, URL

MODELS_URL = "https://provider.test/v1/models"
ASKED = {"model": "m", "messages": MESSAGES}
ANSWER = b'{"object": "chat.completion", "choices": [{"message": {"content": "\xc5\xbe"}}]}'
SETTINGS = {"OPENAI_PREFIX": "/v1", "UPSTREAM_URL": URL, "API_KEY": KEY, "MAX_STREAMS": 8}
LIST = b'{"object": "list", "data": [{"id": "a"}]}'
CHAT, MODELS = "/v1/chat/completions", "/v1/models"


class Drop:
    """An app in whose place OpenAI's API could be."""

    def __init__(self, app: flask.Flask, identify: Callable[[], Any] | None) -> None:
        for key, value in SETTINGS.items():
            app.config.setdefault(f"CHATSTREAM_{key}", value)
        ChatStream(app, identify=identify)
        self.app = app
        self.service: Service = app.extensions["chatstream"]
        self._held: list[StreamIterable] = []

    def hold(self, **names: str) -> Stream:
        """A stream that is live and not walked."""
        self._held.append(self.service.open(b"", **names))  # type: ignore[arg-type]
        return self._held[-1].stream

    def close(self) -> None:
        for iterable in self._held:
            iterable.close()
        self.service.stop()
        eventually(lambda: len(self.service.registry) == 0, "slots given back")

    def post(self, body: Any = None, /, **headers: str) -> TestResponse:
        """Asks, and reads to the end. A header's name has underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = ASKED if body is None else body
        return self.app.test_client().post(CHAT, json=body, headers=named, buffered=True)

    def models(self, method: str = "GET") -> TestResponse:
        return self.app.test_client().open(MODELS, method=method)


MakeDrop = Callable[..., Drop]


def assert_refused(response: TestResponse, status: int, code: str) -> None:
    """The shape of every refusal here."""
    assert (response.status_code, response.json["error"]["code"]) == (status, code)  # type: ignore[index]
    assert set(response.json) == {"error"}  # type: ignore[arg-type]
    assert set(response.json["error"]) == {"message", "type", "param", "code"}  # type: ignore[index]
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert "X-Accel-Buffering" not in response.headers
