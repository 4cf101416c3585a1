"""The chat's own routes: stream, cancel, and the document itself."""

from __future__ import annotations

from typing import Any

from chatstream.web.openapi.refusals import BEFORE
from chatstream.web.openapi.responses import (
    EVENTS,
    JSON,
    answer,
    header,
    of_method,
    options,
    other_method,
    parameter,
    refusal,
)
from chatstream.web.openapi.schemas import an_id, exactly, flag, only, ref, word

_STREAM = """\
Relays the provider's answer as Server-Sent Events, byte for byte, whole events only, up to
`data: [DONE]`. Comments are passed on; in silence `: ping` comments go out. After the first byte a
fault is one `event: error` (its data: the schema `ErrorEvent`), and the end. A stop adds nothing:
the body ends. To stop, close the connection or use the cancel route.

The app in which this is mounted may answer for itself, before it or instead: a login page, a check
of CSRF."""

_CANCEL = """\
Stops a stream, whichever worker of whichever host has it. Its body is not looked at. A cancel that
names a streamId which has not started is answered with 404 and remembered for 30 s: if that stream
then starts, it is born aborted."""


def chat_paths(prefix: str, max_body: int) -> dict[str, Any]:
    """The routes, and what they do. Arguments as `document`'s."""
    return {
        f"{prefix}/stream": {
            "post": stream(max_body),
            "options": options("stream", "OPTIONS, POST"),
        },
        f"{prefix}/cancel/{{sessionId}}": {
            "post": _cancel(),
            "options": {
                **options("cancel", "OPTIONS, POST"),
                "parameters": [parameter("sessionId", "path", {"type": "string"})],
            },
        },
        f"{prefix}/openapi.json": {
            "get": _itself("get"),
            "head": _itself("head"),
            "options": options("openapi", "GET, HEAD, OPTIONS"),
        },
    }


def stream(max_body: int) -> dict[str, Any]:
    """The operation that streams an answer, of which OpenAI's route has most."""
    return {
        "operationId": "stream",
        "summary": "Streams one answer.",
        "description": _STREAM,
        "requestBody": {
            "description": f"JSON in UTF-8, of at most {max_body} bytes.",
            "required": True,
            "content": {JSON: {"schema": ref("ChatRequest")}},
        },
        "responses": {
            "200": {
                "description": "The answer; without a byte where a stop came before the headers.",
                "headers": {
                    "X-Session-Id": header(an_id(), "The chat."),
                    "X-Stream-Id": header(an_id(), "This one answer."),
                    "Cache-Control": header(word("no-cache, no-transform")),
                    "X-Accel-Buffering": header(word("no"), "For nginx."),
                },
                # No type: to some tools a schema is of the whole text, to others of each event.
                "content": {EVENTS: {"schema": {"description": "Events, pings, [DONE]."}}},
            },
            **{str(status): refusal(status) for status in BEFORE},
            "405": other_method("OPTIONS, POST"),
        },
    }


def _cancel() -> dict[str, Any]:
    return {
        "operationId": "cancel",
        "summary": "Stops a stream.",
        "description": _CANCEL,
        "parameters": [
            parameter("sessionId", "path", an_id()),
            parameter("streamId", "query", an_id()),
        ],
        "responses": {
            "200": answer(
                "The provider's connection was shut down.",
                exactly(ok=flag(True), cancelled=flag(True)),
            ),
            "401": refusal(401),
            "404": answer("Nothing by that name is live, in any worker.", only("not_found")),
            "405": other_method("OPTIONS, POST"),
            "503": answer(
                "It is not this worker's, and whose it is cannot be found out.",
                only("bus_unavailable"),
            ),
            "504": answer(
                "The worker that has the stream does not answer; it stops the stream when it does.",
                only("unconfirmed"),
            ),
        },
    }


def _itself(method: str) -> dict[str, Any]:
    found = answer("This document.", {"type": "object", "required": ["openapi", "paths"]})
    return {
        "operationId": f"openapi_{method}",
        "summary": "This document.",
        "security": [],
        "responses": {
            **of_method(method, {"200": found}),
            "405": other_method("GET, HEAD, OPTIONS"),
        },
    }
