"""A host app with what goes wrong in apps: middleware that raises, routes that break off."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from flask import Response, jsonify, request

from tests.integration.app import app as flask_app

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

who = contextvars.ContextVar("who", default="nobody")
closed: list[tuple[str, str]] = []


@flask_app.after_request
def remember(response: Response) -> Response:
    """What tracing does: the request's name is the context's, until the response is closed."""
    if name := request.headers.get("X-Who"):
        who.set(name)
        response.call_on_close(lambda: closed.append((name, who.get())))
    return response


@flask_app.get("/closed")
def show_closed() -> Response:
    return jsonify(closed)


@flask_app.get("/breaks")
def breaks() -> Response:
    def body() -> Iterator[bytes]:
        yield b"one"
        raise ValueError("in the middle")

    return Response(body())


@flask_app.get("/stop")
def stop() -> str:
    flask_app.extensions["chatstream"].stop()
    return "stopped"


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The app behind a middleware that takes `start_response` over, and not the iterable."""
    fault = environ.get("HTTP_X_START")

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if fault == "raises":
            raise RuntimeError("a middleware's")
        if fault == "header":
            headers = [*headers, ("X-Bad", "a\x01b")]
        if fault == "length":
            headers = [*headers, ("Content-Length", "300")]
        return start_response(status, headers, exc_info)

    return flask_app(environ, start if fault else start_response)
