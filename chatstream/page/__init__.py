"""The page with the chat, the module that browsers use, and the meter: what is served of them.

The files are this folder's. `chatstream.js` and its types are always there, below the routes'
prefix, for whoever builds a page of their own; the page's own files only where the page is on.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from string import Template
from time import monotonic_ns
from typing import Any
from urllib.parse import urlencode

from flask import Response, request
from flask.blueprints import BlueprintSetupState

from chatstream.answering import add_routes, as_json, other_method, refuse
from chatstream.config import Settings
from chatstream.errors import Refused, StreamError, UpstreamError
from chatstream.reading import ID, argument, owner

MODULE = ("chatstream.js", "chatstream.d.ts")
"""The browser's module: always served."""

PAGE = (
    "page.js",
    "answer.js",
    "conversation.js",
    "failures.js",
    "markdown.js",
    "meter.js",
    "page.css",
    "icon.svg",
)
"""What the page needs beside it."""

_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".ts": "application/typescript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes markup or code, whoever writes it
        "trusted-types 'none'",
    )
)

_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache",  # ask each time: a new release is seen at once
    "X-Content-Type-Options": "nosniff",
}

_PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_WAIT = 2.0
"""Seconds that the meter waits for the provider to be told."""


@dataclass(frozen=True)
class File:
    """Something that is served as it is."""

    content_type: str
    body: bytes
    modified: datetime
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        """Of what is in it, so it is the same on every host."""
        return hashlib.sha256(self.body).hexdigest()[:32]


def routes(settings: Settings) -> Callable[[BlueprintSetupState], None]:
    """What enters the routes of what is on. The files are read here, once."""
    prefix = settings.url_prefix
    entries: list[tuple[str, str, Callable[..., Any]]] = [
        (f"{prefix}/{name}", name.replace(".", "_"), partial(_serve, _read(name)))
        for name in MODULE + (PAGE if settings.page else ())
    ]
    if settings.page:
        page = _page(settings.page, prefix, settings.meter)
        entries.append((settings.page, "page", partial(_serve, page)))
    if settings.meter:
        path = f"{prefix}/meter/<chatstream_anything:stream_id>"
        entries.append((path, "meter", partial(_meter, settings)))
    return partial(add_routes, routes=entries)


def _read(name: str, **values: str) -> File:
    path = Path(__file__).with_name(name)
    body = path.read_bytes()
    if values:
        body = Template(body.decode()).substitute(values).encode()
    headers = {**_HEADERS, **(_PAGE_HEADERS if path.suffix == ".html" else {})}
    modified = datetime.fromtimestamp(int(path.stat().st_mtime), timezone.utc)
    return File(_TYPES[path.suffix], body, modified, headers)


def _page(place: str, prefix: str, meter: bool) -> File:
    """The page at `place`.

    What it needs is addressed relative to it: so a proxy may take a part of the path away, or a
    host mount the app anywhere, and nobody has to say so.
    """
    base = posixpath.relpath(prefix, posixpath.dirname(place))
    return _read("page.html", base=base, meter="on" if meter else "off")


def _serve(file: File) -> Response:
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    response = Response(file.body, content_type=file.content_type, headers=dict(file.headers))
    response.set_etag(file.etag)
    response.last_modified = file.modified
    response.make_conditional(request)
    return response


def _meter(settings: Settings, stream_id: str) -> Any:
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
    from chatstream.fetch import at_origin, fetch  # after the fork: see `upstream`

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
