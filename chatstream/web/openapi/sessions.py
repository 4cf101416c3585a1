"""The routes for who watches over a service: sessions, cancel-all, healthz, readyz."""

from __future__ import annotations

from typing import Any

from chatstream.web.openapi.refusals import AWAY, FORBIDDEN
from chatstream.web.openapi.responses import (
    answer,
    of_method,
    options,
    other_method,
    parameter,
    refusal,
    refused,
    with_retry,
)
from chatstream.web.openapi.schemas import an_id, exactly, flag, only, word


def watching_paths(prefix: str) -> dict[str, Any]:
    """The routes for what lives, and what they do. Argument as `document`'s."""
    whose = [
        parameter("all", "query", {"type": "string"}),
        parameter("owner", "query", {"type": "string"}),
    ]
    sessions = {method: {**_sessions(method), "parameters": whose} for method in ("get", "head")}
    return {
        f"{prefix}/sessions": {**sessions, "options": options("sessions", "GET, HEAD, OPTIONS")},
        f"{prefix}/cancel-all": {
            "post": {**_cancel_all(), "parameters": whose},
            "options": options("cancel_all", "OPTIONS, POST"),
        },
    }


def _sessions(method: str) -> dict[str, Any]:
    one = exactly(
        sessionId=an_id(),
        streamId=an_id(),
        phase=word("new", "connecting", "headers", "body", "sending"),
        seconds={"type": "number", "minimum": 0},
        events={"type": "integer", "minimum": 0},
    )
    one["properties"] |= {  # for an admin who asks for those of others
        "owner": {"type": "string"},
        "host": {"type": "string"},
        "pid": {"type": "integer"},
    }
    found = answer(
        "What lives in all workers. Not complete: a worker does not answer, or there are too many.",
        exactly(
            ok=flag(True),
            complete={"type": "boolean"},
            sessions={"type": "array", "items": one},
        ),
    )
    responses = {
        "200": found,
        "401": refusal(401),
        "403": refused(*FORBIDDEN),
        "405": other_method("GET, HEAD, OPTIONS"),
        "503": with_retry(503, refused("Nobody knows.", AWAY)),
    }
    return {
        "operationId": f"sessions_{method}",
        "summary": "What lives: one's own, and for an admin `?owner=` or `?all=1`.",
        "responses": of_method(method, responses),
    }


def _cancel_all() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    unconfirmed = exactly(ok=flag(False), reason=word("unconfirmed"), cancelled=count)
    return {
        "operationId": "cancel_all",
        "summary": "Stops all that lives: one's own, and for an admin `?owner=` or `?all=1`.",
        "responses": {
            "200": answer(
                "So many were stopped, and their providers' connections shut down.",
                exactly(ok=flag(True), cancelled=count),
            ),
            "401": refusal(401),
            "403": refused(*FORBIDDEN),
            "405": other_method("OPTIONS, POST"),
            "503": answer(
                "This worker's were stopped; the others cannot be reached.",
                only("bus_unavailable"),
            ),
            "504": answer("So many were, and a worker does not answer.", unconfirmed),
        },
    }
