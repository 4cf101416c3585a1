"""OpenAI's routes: what its clients ask for, when their `base_url` is ours.

The streams are those of the chat's own routes; what is different is where the names are given (in
headers: the body is the provider's), the words of a refusal, and that an answer may be wanted in
one piece.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from flask import Response, request
from flask.blueprints import BlueprintSetupState

from chatstream.answering import add_routes, other_method, refusal, streamed
from chatstream.asking import capped, prepared
from chatstream.completions import ChunkStream, WholeStream, error_object
from chatstream.errors import Busy, Refused, StreamError, UpstreamError
from chatstream.reading import check_messages, json_body, owner, service, session_and_stream
from chatstream.stream import Stream

ASKING = 2
"""Lists of models that may be awaited at once: each holds a thread that a cancel may need."""

_IN_VAIN = {
    "deadline",
    "upstream_auth",
    "upstream_not_stream",
    "upstream_not_json",
    "event_too_large",
    "answer_too_large",
}
"""Faults that the next call would meet too, or that cost as much: OpenAI's clients repeat a 5xx."""

_NAMES = ("X-Session-Id", "X-Stream-Id")

_askers = threading.BoundedSemaphore(ASKING)

log = logging.getLogger("chatstream")


def routes(prefix: str) -> Callable[[BlueprintSetupState], None]:
    """What enters the routes under `prefix`, which is from the app's root on."""
    at = prefix.rstrip("/")

    def add(state: BlueprintSetupState) -> None:
        chat = (f"{at}/chat/completions", "openai_chat", completions)
        add_routes(state, (chat, (f"{at}/models", "openai_models", models)))

    return add


def completions() -> Any:
    """POST /chat/completions: opens a stream, of events or of one piece."""
    if request.method != "POST":
        return other_method(refuse=refuse)
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    try:
        body = json_body(service().settings.max_body)
        names = session_and_stream(map(request.headers.get, _NAMES), _NAMES)
        wanted = _wanted(body)
        body = prepared(body, names, name)
        if not isinstance(body, dict):
            return body
        whole, form = _form(body, wanted)
        source = service().open(
            capped(body, service().settings),
            session_id=names[0],
            stream_id=names[1],
            owner=name,
            environ=request.environ,
            form=form,
        )
    except StreamError as error:
        return refuse(error)
    return streamed(source, partial(_refuse_whole, source.stream) if whole else refuse)


def models() -> Any:
    """GET /models: the provider's list, as it is; where only some may be asked, these of it."""
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS", refuse)
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    try:
        body = _models()
    except StreamError as error:
        if error.status >= 500:
            detail = f' detail="{error.detail}"' if error.detail else ""
            log.warning("The list of models failed: %s%s", error.code, detail)
        return refuse(error)
    headers = {"Cache-Control": "no-store"}
    return Response(body, 200, content_type="application/json", headers=headers)


def refuse(error: StreamError) -> Response:
    """A refusal, in OpenAI's words."""
    response = refusal(error_object(error), error)
    if error.code in _IN_VAIN:
        response.headers["X-Should-Retry"] = "false"
    return response


def _refuse_whole(stream: Stream, error: StreamError) -> Response:
    """The refusal that is the whole answer, in the words that it would have had later, too."""
    response = refuse(error)
    response.set_data(stream.last_words())
    return response


def _wanted(body: dict[str, Any]) -> bool | None:
    """What the request's `stream` says."""
    check_messages(body)
    wanted = body.get("stream")
    if not (wanted is None or isinstance(wanted, bool)):
        raise Refused("stream must be true or false.", code="bad_stream")
    return wanted


def _form(
    body: dict[str, Any], wanted: bool | None
) -> tuple[bool, Callable[[str, str, str], Stream]]:
    """Whether the answer is to be in one piece, and what makes the stream.

    That is what its client understands, whatever the app has made of the request.
    """
    if wanted is not None or "stream" in body:
        body["stream"] = bool(wanted)
    if body.get("model") is None:
        body["model"] = service().settings.model
    model = body["model"] if isinstance(body["model"], str) else ""
    return not wanted, partial(ChunkStream if wanted else WholeStream, model=model)


def _models() -> bytes:
    # Here, after the fork: see `Service.start`.
    from chatstream import fetch

    if not _askers.acquire(blocking=False):
        raise Busy("The list of models is being asked for already. Please try again.")
    try:
        listed = fetch.models(service().settings)
    finally:
        _askers.release()
    allowed = service().settings.allowed_models
    return listed if allowed is None else _less(listed, allowed)


def _less(listed: bytes, allowed: tuple[str, ...]) -> bytes:
    """A list of models without those that may not be asked; else as the provider has it.

    Raises:
        UpstreamError: It is none of OpenAI's form, so which they are is not known.
    """
    try:
        found = json.loads(listed)
        models: list[Any] = found["data"]
        found["data"] = [model for model in models if model["id"] in allowed]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UpstreamError(
            "The provider's list of models is not of OpenAI's form.", code="upstream_not_json"
        ) from None
    return json.dumps(found).encode()
