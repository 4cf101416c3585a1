"""HTTP in, HTTP out: the chat's routes, their status codes and headers.

Refusals are returned, never raised: see `chatstream.answering`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, request
from flask.blueprints import BlueprintSetupState

from chatstream import openai, page, watching
from chatstream.answering import add_routes, as_json, drop, other_method, refuse, streamed
from chatstream.asking import NAMES, capped, prepared
from chatstream.errors import RequestTimeout, StreamError
from chatstream.openapi import document
from chatstream.reading import ID, argument, json_body, owner, service, session_and_stream

if TYPE_CHECKING:
    from chatstream.config import Settings
    from chatstream.service import Service


def blueprint(settings: Settings) -> Blueprint:
    """The routes, where the settings have them."""
    routes = Blueprint("chatstream", __name__, url_prefix=settings.url_prefix)
    routes.record(_add_routes)
    routes.record(watching.routes(settings.url_prefix, settings.health))
    routes.record(page.routes(settings))
    if settings.openai_prefix is not None:
        routes.record(openai.routes(settings.openai_prefix))
    routes.teardown_request(drop)
    return routes


def _add_routes(state: BlueprintSetupState) -> None:
    prefix = state.url_prefix
    add_routes(
        state,
        (
            (f"{prefix}/stream", "stream", stream),
            (f"{prefix}/cancel/<chatstream_anything:session_id>", "cancel", cancel),
            (f"{prefix}/cancel", "cancel", cancel),
            (f"{prefix}/openapi.json", "openapi", openapi),
        ),
    )


def stream() -> Any:
    """POST /stream: opens a stream."""
    if request.method != "POST":
        return other_method()
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    try:
        body = json_body(service().settings.max_body)
        # Taken out of it: they are ours, not the provider's.
        names = session_and_stream([body.pop(key, None) for key in NAMES], NAMES)
        body = prepared(body, names, name)
        if not isinstance(body, dict):
            return body
        source = service().open(
            _payload(body, service()),
            session_id=names[0],
            stream_id=names[1],
            owner=name,
            environ=request.environ,
        )
    except StreamError as error:
        return refuse(error)
    return streamed(source)


def cancel(session_id: str = "") -> Any:
    """POST /cancel/<sessionId>: stops a stream. The request's body is not looked at."""
    if request.method != "POST":
        return other_method()
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    stream_id = argument("streamId")
    well_formed = ID.fullmatch(session_id) and (stream_id is None or ID.fullmatch(stream_id))
    try:
        if well_formed and service().abort(session_id, stream_id, owner=name):
            return as_json({"ok": True, "cancelled": True}, 200)
    except StreamError as error:
        return as_json({"ok": False, "reason": error.code}, error.status)
    return as_json({"ok": False, "reason": "not_found"}, 404)


def openapi() -> Response:
    """GET /openapi.json: what the routes are. It tells nothing of anybody, and asks for no name."""
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    settings = service().settings
    root = request.root_path.rstrip("/")
    return as_json(
        document(
            settings.url_prefix,
            max_body=settings.max_body,
            root=root,
            openai_prefix=settings.openai_prefix,
            health=settings.health,
            challenge=service().challenge,
        ),
        200,
    )


def timed_out(error: RequestTimeout) -> Response:
    """For a host's own routes, where one of our workers gave up on a body."""
    return Response(status=408)


def _payload(body: dict[str, Any], service: Service) -> bytes:
    """The provider's request: the caller's, with what is forced and what is missing."""
    body["stream"] = True
    if service.settings.include_usage:
        options = body.get("stream_options")
        given = options if isinstance(options, dict) else {}
        body["stream_options"] = {**given, "include_usage": True}
    return capped(body, service.settings)
