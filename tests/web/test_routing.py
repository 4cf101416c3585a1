"""routing: every method, any rest of a path, on every route."""

from __future__ import annotations

import flask
import pytest
from werkzeug.exceptions import HTTPException
from werkzeug.test import EnvironBuilder

from tests.web.chat import CANCEL, STREAM, MakeChat
from tests.web.chat import assert_refused as assert_refused_as_ours
from tests.web.openai import CHAT, MODELS
from tests.web.openai import assert_refused as assert_refused_as_openais

ALL = {"OPENAI_PREFIX": "/v1", "HEALTH": "/", "PAGE": "/", "METER": "1"}
POST, GET = "OPTIONS, POST", "GET, HEAD, OPTIONS"
ROUTES = {
    STREAM: POST,
    **dict.fromkeys((f"{CANCEL}/s-1", f"{CANCEL}/", CANCEL, f"{CANCEL}/a/b"), POST),
    CHAT: POST,
    MODELS: GET,
    "/api/chat/sessions": GET,
    "/api/chat/cancel-all": POST,
    "/healthz": GET,
    "/readyz": GET,
    "/": GET,
    **dict.fromkeys(
        (f"/api/chat/{name}" for name in ("chatstream.js", "page.css", "openapi.json")), GET
    ),
    "/api/chat/meter/s-1": GET,
}
"""What is allowed, by path, where everything is on."""

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PURGE"]


@pytest.mark.parametrize(("path", "allowed"), ROUTES.items(), ids=ROUTES)
def test_other_methods(chat: MakeChat, path: str, allowed: str) -> None:
    """Any other method, unknown ones too, is our JSON 405 with Allow, not the app's page."""
    app = flask.Flask("host")
    app.register_error_handler(HTTPException, lambda error: ("<h1>app's</h1>", 418))
    client = chat(app, **ALL).client
    assert_refused = assert_refused_as_openais if path in (CHAT, MODELS) else assert_refused_as_ours
    for method in set(METHODS) - set(allowed.split(", ")):
        environ = EnvironBuilder(path=path).get_environ()
        response = client.open({**environ, "REQUEST_METHOD": method})
        assert (response.status_code, response.headers["Allow"]) == (405, allowed)
        if method == "HEAD":
            assert response.data == b""
        else:
            assert_refused(response, 405, "method_not_allowed")


@pytest.mark.parametrize(("path", "allowed"), ROUTES.items(), ids=ROUTES)
def test_options(chat: MakeChat, path: str, allowed: str) -> None:
    """OPTIONS is answered, whoever asks: 204, and what is allowed."""
    response = chat(identify=lambda: None, **ALL).client.options(path)
    assert (response.status_code, response.data) == (204, b"")
    assert response.headers["Allow"] == allowed
