"""The meter's route: what the built-in provider knows of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from time import monotonic_ns
from typing import Any
from urllib.parse import urlencode

from flask import request

from chatstream.errors import Refused, StreamError, UpstreamError
from chatstream.settings.table import Settings
from chatstream.stream.stream import ID
from chatstream.web.caller import owner
from chatstream.web.replies import as_json, other_method, refuse
from chatstream.web.request import argument

_WAIT = 2.0
"""Seconds that the meter waits for the provider to be told."""


def show_meter(settings: Settings, stream_id: str) -> Any:
    """GET /meter/<streamId>: what the built-in provider knows of an answer.

    That may be nothing yet: an answer begins with the provider's knowing of it. With `at`, an
    instant of this service's clock as `now_ms` tells it, also what came after that. With
    `wait=closed`, once the provider was told, or after two seconds.
    """
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    if not ID.fullmatch(stream_id) or not stream_id.strip("."):  # .. is another path
        return as_json({"ok": False, "reason": "not_found"}, 404)
    try:
        at_ns = _at(argument("at"))
        figure = _figure(settings, stream_id, at_ns, wait=argument("wait") == "closed")
    except StreamError as error:
        return refuse(error)
    told = {"known": False} if figure is None else {"known": True, **_told(figure, at_ns)}
    return as_json({"ok": True, "now_ms": monotonic_ns() / 1e6, **told}, 200)


def _at(text: str | None) -> int | None:
    """An instant of `time.monotonic_ns`, which the provider on this host shares."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
        raise Refused("at must be an instant in ms, as now_ms is.", code="bad_id")
    return int(float(text) * 1e6)


def _figure(
    settings: Settings, stream_id: str, at_ns: int | None, *, wait: bool
) -> dict[str, Any] | None:
    """What the provider tells of a request; None if it does not know it."""
    from chatstream.upstream.fetch import (
        at_origin,
        fetch,  # after the fork: see `upstream`
    )

    fields: dict[str, object] = {"wait": "closed", "timeout": _WAIT} if wait else {}
    if at_ns is not None:
        fields["after"] = at_ns
    got = fetch(
        at_origin(settings.upstream_url, f"/requests/{stream_id}?{urlencode(fields)}"),
        connect=settings.upstream_connect_timeout,
        timeout=_WAIT * 2,
    )
    if got.status == 404:
        return None
    try:
        figure: dict[str, Any] = json.loads(got.body)
        _ = figure["generated"]
    except (ValueError, LookupError, TypeError):
        raise UpstreamError(
            "CHATSTREAM_METER is on, but the provider is not the built-in one."
        ) from None
    return figure


def _told(figure: Mapping[str, Any], at_ns: int | None) -> dict[str, Any]:
    """The meter's part of a figure."""
    told = {key: figure[key] for key in ("generated", "delivered", "open", "closed_by")}
    if at_ns is not None:
        stopped = figure["closed_by"] in ("client", "reset")
        told["generated_after"] = figure["generated_after"]
        told["stop_ms"] = max(0.0, (figure["closed_ns"] - at_ns) / 1e6) if stopped else None
    return told
