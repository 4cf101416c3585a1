"""The words of JSON Schema that the document is made of, and the schemas that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatstream.web.openapi.refusals import AFTER

PATTERN = "^[A-Za-z0-9._:-]{1,128}$"
"""A sessionId or streamId: `reading.ID`, in JSON Schema's words."""


def chat_request() -> dict[str, Any]:
    """What is checked. All the rest is the provider's to judge."""
    name = {"type": ["string", "null"], "pattern": PATTERN}
    return {
        "type": "object",
        "required": ["messages"],
        "properties": {
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["role"],
                    "properties": {"role": {"type": "string"}},
                },
            },
            "sessionId": {**name, "description": "The chat; made up when missing."},
            "streamId": {**name, "description": "This one answer; made up when missing."},
            "model": {"description": "The provider's; has a default."},
            "stream": {"description": "Forced to true."},
        },
        "additionalProperties": {"description": "Goes to the provider as it is."},
    }


def error_event() -> dict[str, Any]:
    """What an `event: error` has for data."""
    return exactly(
        error=exactly(
            message={"type": "string"},
            type=word("service_error", "upstream_error"),
            code=word(*AFTER),
        )
    )


def exactly(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object with these members and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def word(*words: str) -> dict[str, Any]:
    """One of these."""
    return {"type": "string", "enum": list(words)}


def flag(value: bool) -> dict[str, Any]:
    """True, or False, and not the other."""
    return {"type": "boolean", "const": value}


def an_id() -> dict[str, Any]:
    """A session's or a stream's name."""
    return {"type": "string", "pattern": PATTERN}


def ref(name: str) -> dict[str, Any]:
    """A schema of the document's that has a name."""
    return {"$ref": f"#/components/schemas/{name}"}


def an_object() -> dict[str, Any]:
    """JSON that is the provider's to describe."""
    return {"type": "object"}


def only(reason: str) -> dict[str, Any]:
    """The schema of a refusal without a sentence."""
    return exactly(ok=flag(False), reason=word(reason))
