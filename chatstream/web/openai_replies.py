"""How OpenAI's routes refuse."""

from __future__ import annotations

from flask import Response

from chatstream.dialects.openai_chat import error_object
from chatstream.errors import StreamError
from chatstream.web.replies import refusal

_IN_VAIN = {
    "deadline",
    "upstream_auth",
    "upstream_not_stream",
    "upstream_not_json",
    "event_too_large",
    "answer_too_large",
}
"""Faults that the next call would meet too, or that cost as much: OpenAI's clients repeat a 5xx."""


def refuse(error: StreamError) -> Response:
    """A refusal, in OpenAI's words."""
    response = refusal(error_object(error), error)
    if error.code in _IN_VAIN:
        response.headers["X-Should-Retry"] = "false"
    return response
