"""OpenAI's route for an answer: POST chat/completions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from flask import Response, request
from flask.blueprints import BlueprintSetupState

from chatstream.errors import Refused, StreamError
from chatstream.stream.forms import ChunkStream, WholeStream
from chatstream.stream.stream import Stream
from chatstream.web.caller import owner, service
from chatstream.web.openai_models import models
from chatstream.web.openai_replies import refuse
from chatstream.web.payload import capped, check_messages, prepared
from chatstream.web.replies import other_method
from chatstream.web.request import json_body, session_and_stream
from chatstream.web.routing import add_routes
from chatstream.web.stream_response import streamed

_NAMES = ("X-Session-Id", "X-Stream-Id")

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
