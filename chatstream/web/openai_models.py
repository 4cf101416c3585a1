"""OpenAI's route for the models: GET models."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

from flask import Response, request

from chatstream.errors import Busy, StreamError, UpstreamError
from chatstream.web.caller import owner, service
from chatstream.web.openai_replies import refuse
from chatstream.web.replies import other_method

log = logging.getLogger("chatstream")


ASKING = 2
"""Lists of models that may be awaited at once: each holds a thread that a cancel may need."""

_askers = threading.BoundedSemaphore(ASKING)


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


def _models() -> bytes:
    # Here, after the fork: see `Service.start`.
    from chatstream.upstream import models as models_

    if not _askers.acquire(blocking=False):
        raise Busy("The list of models is being asked for already. Please try again.")
    try:
        listed = models_.models(service().settings)
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
