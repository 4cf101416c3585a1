"""OpenAI's routes, whose faults have OpenAI's words."""

from __future__ import annotations

from typing import Any

from chatstream.web.openapi.chat import stream
from chatstream.web.openapi.refusals import OPENAI_BEFORE, OPENAI_MODELS, Table
from chatstream.web.openapi.responses import (
    JSON,
    answer,
    of_method,
    options,
    other_method,
    parameter,
    refused,
    with_retry,
)
from chatstream.web.openapi.schemas import an_id, an_object, chat_request, exactly

_OPENAI = """\
OpenAI's route: with `stream: true` an answer is relayed as on the chat's own route, else in one
piece, before which newlines show life. A fault that comes after these is a 200 whose JSON is the
error. A stopped answer ends with the finish_reason `cancelled`; one piece has no content then."""


def openai_paths(prefix: str, max_body: int) -> dict[str, Any]:
    """The routes, and what they do. Arguments as `document`'s."""
    return {
        f"{prefix}/chat/completions": {
            "post": _completions(max_body),
            "options": options("openai_chat", "OPTIONS, POST"),
        },
        f"{prefix}/models": {
            "get": _models("get"),
            "head": _models("head"),
            "options": options("openai_models", "GET, HEAD, OPTIONS"),
        },
    }


def _completions(max_body: int) -> dict[str, Any]:
    request = chat_request()
    for name in ("sessionId", "streamId"):
        del request["properties"][name]
    request["properties"]["stream"] = {"type": ["boolean", "null"]}
    operation = stream(max_body)
    events = operation["responses"]["200"]
    return {
        "operationId": "openai_chat",
        "summary": "One answer, as OpenAI's API gives it.",
        "description": _OPENAI,
        "parameters": [
            parameter("X-Session-Id", "header", an_id()),
            parameter("X-Stream-Id", "header", an_id()),
        ],
        "requestBody": {**operation["requestBody"], "content": {JSON: {"schema": request}}},
        "responses": {
            "200": {**events, "content": {**events["content"], JSON: {"schema": an_object()}}},
            **_refusals(OPENAI_BEFORE),
            "405": _other_method("OPTIONS, POST"),
        },
    }


def _models(method: str) -> dict[str, Any]:
    found = answer("The provider's list, less what may not be asked here.", an_object())
    return {
        "operationId": f"openai_models_{method}",
        "summary": "The provider's models.",
        "responses": {
            **of_method(method, {"200": found, **_refusals(OPENAI_MODELS)}),
            "405": _other_method("GET, HEAD, OPTIONS"),
        },
    }


def _refusals(before: Table) -> dict[str, dict[str, Any]]:
    """What `refusal` has, in OpenAI's words."""
    return {
        str(status): _in_openais_words(with_retry(status, refused(sentence, reasons)))
        for status, (sentence, reasons) in before.items()
    }


def _other_method(methods: str) -> dict[str, Any]:
    return _in_openais_words(other_method(methods))


def _in_openais_words(response: dict[str, Any]) -> dict[str, Any]:
    codes = response["content"][JSON]["schema"]["properties"]["reason"]
    error = exactly(
        message={"type": "string"},
        type={"type": "string"},
        param={"type": ["string", "null"]},
        code=codes,
    )
    schemas = [exactly(error=error)]
    if "upstream_error" in codes["enum"]:  # the provider's own, where it came as a 200
        schemas.append({"type": "object", "required": ["error"]})
    return {**response, "content": {JSON: {"schema": {"anyOf": schemas}}}}
