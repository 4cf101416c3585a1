"""How our routes reply: JSON that nobody keeps, refusals, and a method that a route has not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, request

from chatstream.errors import Refused, RequestTimeout, StreamError

Refuse = Callable[[StreamError], Response]
"""Puts an error into a route's words."""


def refuse(error: StreamError) -> Response:
    """A refusal, in the chat routes' words."""
    return refusal({"ok": False, "reason": error.code, "message": error.message}, error)


def refusal(value: Mapping[str, Any], error: StreamError) -> Response:
    """A refusal with the status and the Retry-After that are `error`'s."""
    response = as_json(value, error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = error.retry_after
    return response


def as_json(value: Mapping[str, Any], status: int) -> Response:
    """A response that no cache keeps."""
    return Response(
        json.dumps(value),
        status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def other_method(allowed: str = "OPTIONS, POST", refuse: Refuse = refuse) -> Response:
    """For a method that a route has not; OPTIONS says which it has."""
    if request.method == "OPTIONS":
        return Response(status=204, headers={"Allow": allowed})
    sentence = "Use POST." if "POST" in allowed else "Use GET."
    response = refuse(Refused(sentence, code="method_not_allowed", status=405))
    response.headers["Allow"] = allowed
    return response


def timed_out(error: RequestTimeout) -> Response:
    """For a host's own routes, where one of our workers gave up on a body."""
    return Response(status=408)
