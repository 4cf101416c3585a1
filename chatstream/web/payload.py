"""What is sent to the provider: what the caller asks, the app's word on it, and the caps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from chatstream.dialects.openai_chat import cap, check_models, drop_other_spellings
from chatstream.errors import Refused
from chatstream.web.caller import is_response, service

if TYPE_CHECKING:
    from chatstream.service.service import Service
    from chatstream.settings.table import Settings


NAMES = ("sessionId", "streamId")
"""What is ours in a payload, and not the provider's."""


def prepared(body: dict[str, Any], names: tuple[str, str], owner: str) -> Any:
    """What the app makes of a request.

    Args:
        body: The request's JSON.
        names: The session's and the stream's.
        owner: Who asks.

    Returns:
        The provider's request, a dict; else the response to give instead.

    Raises:
        Refused: There is nothing to answer, or the app refuses.
        TypeError: `prepare` returned something else than it may.
    """
    check_messages(body)
    prepare = service().prepare
    if prepare is None:
        return body
    given = body | dict(zip(NAMES, names, strict=True))
    made = prepare(given, owner)
    if made is None:
        made = given
    if is_response(made):
        return made
    if not isinstance(made, dict):
        raise TypeError(f"prepare must return a dict, a response or None, not {type(made)}")
    made = {key: value for key, value in made.items() if key not in NAMES}
    try:
        check_messages(made)
    except Refused as error:
        raise TypeError(f"what prepare made cannot be asked: {error}") from None
    return made


def capped(body: dict[str, Any], settings: Settings) -> bytes:
    """The provider's request in bytes, with what is missing, and no more than is allowed.

    Raises:
        Refused: The model is not allowed, or the most tokens are no number.
    """
    if body.get("model") is None:
        body["model"] = settings.model
    if settings.allowed_models is not None or settings.max_tokens is not None:
        drop_other_spellings(body)
    if settings.allowed_models is not None:
        check_models(body, settings.allowed_models)
    if settings.max_tokens is not None:
        cap(body, settings.max_tokens, settings.max_tokens_field)
    return encoded(body)


def check_messages(body: dict[str, Any]) -> None:
    """Raises Refused unless there is something to answer."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a non-empty list.", code="bad_messages")
    if not all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in messages):
        raise Refused("Each of messages must be an object with a role.", code="bad_messages")


def encoded(body: dict[str, Any]) -> bytes:
    """`body` for the provider. Raises Refused if JSON cannot carry it."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # 1e999, half a surrogate pair
        raise Refused("The body holds what JSON cannot carry.", code="bad_json") from None


def chat_payload(body: dict[str, Any], service: Service) -> bytes:
    """The provider's request: the caller's, with what is forced and what is missing."""
    body["stream"] = True
    if service.settings.include_usage:
        options = body.get("stream_options")
        given = options if isinstance(options, dict) else {}
        body["stream_options"] = {**given, "include_usage": True}
    return capped(body, service.settings)
