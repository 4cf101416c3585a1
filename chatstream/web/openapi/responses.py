"""What operations have in common: their responses, headers and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatstream.web.openapi.refusals import BEFORE
from chatstream.web.openapi.schemas import exactly, flag, word

EVENTS = "text/event-stream"

JSON = "application/json"


def answer(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON that nobody keeps."""
    return {
        "description": description,
        "headers": {"Cache-Control": header(word("no-store"))},
        "content": {JSON: {"schema": schema}},
    }


def refused(sentence: str, reasons: Mapping[str, str]) -> dict[str, Any]:
    """A refusal for one of these reasons."""
    meanings = "".join(f"\n- `{reason}`: {meaning}" for reason, meaning in reasons.items())
    return answer(
        f"{sentence}\n{meanings}",
        exactly(ok=flag(False), reason=word(*reasons), message={"type": "string"}),
    )


def refusal(status: int) -> dict[str, Any]:
    """That of a stream."""
    return with_retry(status, refused(*BEFORE[status]))


def with_retry(status: int, response: dict[str, Any]) -> dict[str, Any]:
    """The same, with Retry-After where the status may have it."""
    if status in (429, 503):
        response["headers"]["Retry-After"] = {"schema": {"type": "string"}}
    return response


def other_method(methods: str) -> dict[str, Any]:
    """The 405 of a route that has these."""
    response = refused(
        "The answer to every other method.", {"method_not_allowed": f"use {methods}"}
    )
    response["headers"]["Allow"] = header(word(methods))
    return response


def options(route: str, methods: str) -> dict[str, Any]:
    """The operation that says which methods there are."""
    return {
        "operationId": f"{route}_options",
        "summary": "What is allowed.",
        "security": [],
        "responses": {
            "204": {
                "description": "The methods.",
                "headers": {"Allow": header(word(methods))},
            }
        },
    }


def of_method(method: str, responses: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, without their content where the method is HEAD. Changes them."""
    if method == "head":
        for response in responses.values():
            del response["content"]
    return responses


def header(schema: Mapping[str, Any], description: str = "") -> dict[str, Any]:
    """A header that is always there."""
    described = {"description": description} if description else {}
    return {**described, "required": True, "schema": schema}


def parameter(name: str, place: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter; one of a path has to be there."""
    return {"name": name, "in": place, "required": place == "path", "schema": schema}
