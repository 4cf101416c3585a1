"""OpenAI's chat completions: how an answer ends and fails, what it says, what it used. Pure."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from chatstream.dialects.base import Kind, Usage, Words, parsed
from chatstream.dialects.estimate import estimate
from chatstream.dialects.sse import fields
from chatstream.errors import Refused, StreamError

_CAPPED = ("max_tokens", "max_completion_tokens")

_MODELS = ("models", "fallbacks")

_LOOKED_AT = {"model", *_MODELS, *_CAPPED, "n", "best_of"}


def drop_other_spellings(body: dict[str, Any]) -> None:
    """Providers written in Go read `MODEL`, too, and where there are both, the later one."""
    for name in list(body):
        if str(name) not in _LOOKED_AT and str(name).casefold() in _LOOKED_AT:
            del body[name]


def check_models(body: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """`models` is OpenRouter's field for those that are asked where the first one fails, and
    `fallbacks` LiteLLM's."""
    asked = [body["model"]]
    for others in filter(None, map(body.get, _MODELS)):
        asked += others if isinstance(others, list) else [others]
    if any(model not in allowed for model in asked):
        sentence = f"Use one of these models: {', '.join(allowed)}."
        raise Refused(sentence, code="model_not_allowed")


def cap(body: dict[str, Any], most: int, field: str) -> None:
    """One field, that which the provider heeds: the other would be a way around it.

    Several answers at once (`n`, and vLLM's `best_of`) share what is allowed.
    """
    answers = max(_whole_number(body, "n"), _whole_number(body, "best_of"))
    if answers > most:
        raise Refused(f"n must be at most {most}.", code="bad_number")
    wanted = [_whole_number(body, name) for name in _CAPPED if body.get(name) is not None]
    for name in _CAPPED:
        body.pop(name, None)
    body[field] = min([*wanted, most // answers])


def _whole_number(body: dict[str, Any], name: str) -> int:
    """A field that is a whole number from 1 on; 1 where there is none."""
    value = body.get(name)
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(f"{name} must be a whole number of at least 1.", code="bad_number")
    return value


DONE = b"data: [DONE]\n\n"

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

_PARAMS = {"bad_messages": "messages", "bad_stream": "stream"}

CANCELLED = "cancelled"
"""The finish_reason of an answer that a cancel stopped, or the session's next question."""


def cancelled(
    kind: str, stream_id: str, model: str, created: int, said: dict[str, Any]
) -> dict[str, Any]:
    """An answer of ours: a stop, and what was `said` before it.

    Args:
        kind: The `object`: a chunk, or a whole answer.
        stream_id: Whose.
        model: Who was to answer.
        created: When, in seconds of Unix time.
        said: The choice's delta or message.
    """
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": CANCELLED}
    return {
        "id": f"chatcmpl-{stream_id}",
        "object": kind,
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": None,  # nobody knows, and zero would be a fact
    }


def error_object(error: StreamError) -> dict[str, Any]:
    """An error as OpenAI's API puts it."""
    kind = _TYPES.get(error.status, error.type if error.status >= 500 else "invalid_request_error")
    told = {"message": error.message, "type": kind, "param": _PARAMS.get(error.code)}
    return {"error": {**told, "code": error.code}}


_MESSAGE = 1000
"""Longest sentence of a provider's, in characters."""


def sentence(body: bytes, key: str) -> str:
    """What a provider's error body says, without our key; "" if it is none."""
    value = parsed(body)
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        return ""
    if key:
        message = message.replace(key, "[key]")
    return message.encode(errors="replace").decode()[:_MESSAGE]


COMPLETIONS = "/chat/completions"


def sibling(upstream_url: str, path: str) -> str | None:
    """The address of another route of OpenAI's API, such as `/models`.

    None where the chat's address is not one that ends as OpenAI's does.
    """
    parts = urlsplit(upstream_url)
    base, found, rest = parts.path.rpartition(COMPLETIONS)
    if not found or rest:
        return None
    return urlunsplit((parts.scheme, parts.netloc, base + path, "", ""))


_CR = ord("\r")

_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"[^"]')


def plain_events(blocks: bytes) -> int | None:
    """How many events `blocks` are, where a few searches show that none of them is more than that.

    They do if every block is one line with LF, a JSON object or a comment, and neither an error
    nor a finish_reason is anywhere. Otherwise None. `blocks` ends with an empty line. Searches
    through them all cost a tenth of a look at each.
    """
    if _CR in blocks:  # a number: looking for b"\r" takes ten times as long
        return None
    events = 1 if blocks.startswith(b"data: {") else 0
    comments = 0 if events else blocks.startswith(b":")
    line_ends = 2
    if blocks.find(b"\n") != len(blocks) - 2:
        line_ends = blocks.count(b"\n")
        events += blocks.count(b"\n\ndata: {")
        if line_ends != 2 * (events + comments):
            comments += blocks.count(b"\n\n:")
    if (
        line_ends != 2 * (events + comments)  # no other lines than those two kinds, two ends each
        or blocks.find(b'"error"') >= 0
        or _FINISHED.search(blocks)
    ):
        return None
    return events


def classify(block: bytes) -> Kind:
    """What `block` is. Reads JSON only where a finish_reason or an error is likely."""
    events = plain_events(block)
    if events is not None:
        return Kind.EVENT if events else Kind.COMMENT
    data, event = fields(block)
    if data is None:
        return Kind.COMMENT
    if data.strip() == b"[DONE]":
        return Kind.DONE
    if event == b"error":
        return Kind.ERROR
    if b'"error"' in data and _error(parsed(data)):
        return Kind.ERROR
    if _FINISHED.search(data) and _finish_reason(parsed(data)):
        return Kind.FINISH
    return Kind.EVENT


def _error(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("error"))


def _finish_reason(value: Any) -> bool:
    choices = value.get("choices") if isinstance(value, dict) else None
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


WORDS = re.compile(
    rb'"(?:content|reasoning_content|reasoning)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL
)
"""What a delta says. Within a text a quote has a backslash, so no text looks like this."""

USAGE = re.compile(rb'"usage"\s*:\s*\{')

MOST = 2**53
"""Tokens that a provider is believed: beyond it JSON's numbers may not be whole (RFC 8259)."""


def prompt_tokens(payload: bytes) -> int | None:
    """How many tokens the text of a chat request is, about; None where that cannot be read."""
    request = parsed(payload)
    messages = request.get("messages") if isinstance(request, dict) else None
    if not isinstance(messages, list):
        return None
    return sum(estimate(_text(message.get("content"))) for message in dicts(messages))


def _text(content: Any) -> str:
    """A message's text: it has one, or parts of which some are text."""
    if isinstance(content, str):
        return content
    parts = (part.get("text") for part in dicts(content))
    return "".join(part for part in parts if isinstance(part, str))


def words(value: dict[str, Any], *, whole: bool) -> Words:
    """What one JSON object says: an event's, or a whole answer's. Of several choices the first."""
    text = reasoning = ""
    pieces = 0
    for choice in dicts(value.get("choices")):
        said = choice.get("message" if whole else "delta")
        if isinstance(said, dict) and choice.get("index", 0) == 0:
            content = said.get("content")
            if content and isinstance(content, str):
                text += content
                pieces += 1
            thought = said.get("reasoning_content") or said.get("reasoning")  # DeepSeek, OpenRouter
            if thought and isinstance(thought, str):
                reasoning += thought
                pieces += 1
    model, usage = value.get("model"), value.get("usage")
    return (
        text,
        reasoning,
        pieces,
        model if isinstance(model, str) else None,
        usage_of(usage) if isinstance(usage, dict) else None,
    )


def usage_of(value: dict[str, Any]) -> Usage:
    """A provider's `usage`."""
    return Usage(_count(value.get("prompt_tokens")), _count(value.get("completion_tokens")))


def _count(value: Any) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
    return value if good else None


def dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
