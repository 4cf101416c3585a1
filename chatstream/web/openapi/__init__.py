"""What the routes are, for machines: an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1).

Pure: no I/O. The words are those of docs/wire.md; tests hold this against what the routes do, and
fuzz the routes with it. The codes are in `refusals`, the routes in `chat`, `openai_chat`,
`sessions` and `health`; what they are made of is in `responses` and `schemas`.
"""

from __future__ import annotations

from typing import Any

from chatstream.web.openapi.chat import chat_paths
from chatstream.web.openapi.health import health_paths
from chatstream.web.openapi.openai_chat import openai_paths
from chatstream.web.openapi.responses import header
from chatstream.web.openapi.schemas import chat_request, error_event, word
from chatstream.web.openapi.sessions import watching_paths


def document(
    url_prefix: str,
    *,
    max_body: int,
    root: str = "",
    openai_prefix: str | None = None,
    health: str | None = None,
    challenge: str | None = None,
) -> dict[str, Any]:
    """The document. Holds nothing of a user, a key or a provider.

    Args:
        url_prefix: Where the routes are mounted in their app.
        max_body: Longest request body, bytes.
        root: Where the app is mounted in its server (WSGI's SCRIPT_NAME).
        openai_prefix: Where OpenAI's routes are; None for none.
        health: Where healthz and readyz are; None for none.
        challenge: What a 401 says, where bearer tokens are asked for; None where they are not.
    """
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "chatstream",
            "version": "1",
            "description": "Relays an LLM provider's answer as Server-Sent Events, and stops it.",
        },
        "servers": [{"url": root or "/"}],
        "paths": {
            **chat_paths(url_prefix, max_body),
            **watching_paths(url_prefix),
            **({} if openai_prefix is None else openai_paths(openai_prefix.rstrip("/"), max_body)),
            **({} if health is None else health_paths(health.rstrip("/"))),
        },
        "components": {"schemas": {"ChatRequest": chat_request(), "ErrorEvent": error_event()}},
    }
    return made if challenge is None else _with_tokens(made, challenge)


def _with_tokens(made: dict[str, Any], challenge: str) -> dict[str, Any]:
    """Adds to a document that a bearer token is asked for, but where `security` is empty."""
    made["security"] = [{"token": []}]
    made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path in made["paths"].values():
        for operation in path.values():
            if refusal := operation["responses"].get("401"):
                refusal["headers"]["WWW-Authenticate"] = header(word(challenge))
    return made
