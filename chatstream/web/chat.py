"""The chat's routes: POST stream, POST cancel, GET openapi.json."""

from __future__ import annotations

from typing import Any

from flask import Response, request

from chatstream.errors import StreamError
from chatstream.stream.stream import ID
from chatstream.web.caller import owner, service
from chatstream.web.openapi import document
from chatstream.web.payload import NAMES, chat_payload, prepared
from chatstream.web.replies import as_json, other_method, refuse
from chatstream.web.request import argument, json_body, session_and_stream
from chatstream.web.stream_response import streamed


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
            chat_payload(body, service()),
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
