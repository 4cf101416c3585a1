"""What is sent to the provider: what the caller asks, the app's word on it, and the caps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chatstream.errors import Refused
from chatstream.reading import check_messages, encoded, is_response, service

if TYPE_CHECKING:
    from chatstream.config import Settings

Prepare = Callable[[dict[str, Any], str], Any]
"""The app's word on what is sent: `prepare(payload, owner)`.

Called in the view, so with the app's and the request's contexts, before the stream has a slot.
`payload` is the request's JSON with `sessionId` and `streamId` filled in, which are the stream's
whatever becomes of them there. It may be changed, or another dict returned in its place; a response
is sent instead, and `Refused` is raised to refuse in the route's own words.
"""

NAMES = ("sessionId", "streamId")
"""What is ours in a payload, and not the provider's."""

_CAPPED = ("max_tokens", "max_completion_tokens")
_MODELS = ("models", "fallbacks")
_LOOKED_AT = {"model", *_MODELS, *_CAPPED, "n", "best_of"}


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
        _drop_other_spellings(body)
    if settings.allowed_models is not None:
        _check_models(body, settings.allowed_models)
    if settings.max_tokens is not None:
        _cap(body, settings.max_tokens, settings.max_tokens_field)
    return encoded(body)


def _drop_other_spellings(body: dict[str, Any]) -> None:
    """Providers written in Go read `MODEL`, too, and where there are both, the later one."""
    for name in list(body):
        if str(name) not in _LOOKED_AT and str(name).casefold() in _LOOKED_AT:
            del body[name]


def _check_models(body: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """`models` is OpenRouter's field for those that are asked where the first one fails, and
    `fallbacks` LiteLLM's."""
    asked = [body["model"]]
    for others in filter(None, map(body.get, _MODELS)):
        asked += others if isinstance(others, list) else [others]
    if any(model not in allowed for model in asked):
        sentence = f"Use one of these models: {', '.join(allowed)}."
        raise Refused(sentence, code="model_not_allowed")


def _cap(body: dict[str, Any], most: int, field: str) -> None:
    """One field, that which the provider heeds: the other would be a way around it.

    Several answers at once (`n`, and vLLM's `best_of`) share what is allowed.
    """
    answers = max(_number(body, "n"), _number(body, "best_of"))
    if answers > most:
        raise Refused(f"n must be at most {most}.", code="bad_number")
    wanted = [_number(body, name) for name in _CAPPED if body.get(name) is not None]
    for name in _CAPPED:
        body.pop(name, None)
    body[field] = min([*wanted, most // answers])


def _number(body: dict[str, Any], name: str) -> int:
    """A field that is a whole number from 1 on; 1 where there is none."""
    value = body.get(name)
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(f"{name} must be a whole number of at least 1.", code="bad_number")
    return value
