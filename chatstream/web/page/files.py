"""The page, and the module that browsers use: what is served of this folder."""

from __future__ import annotations

import hashlib
import html
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial, update_wrapper
from pathlib import Path
from string import Template
from typing import Any

from flask import Response, current_app, request
from flask.blueprints import BlueprintSetupState

from chatstream.settings.table import Settings
from chatstream.web.page.meter import show_meter
from chatstream.web.replies import other_method
from chatstream.web.routing import add_routes

MODULE = ("chatstream.js", "chatstream.d.ts")
"""The browser's module: always served."""

PAGE = (
    "page.js",
    "access.js",
    "answer.js",
    "blocks.js",
    "conversation.js",
    "failures.js",
    "inline.js",
    "markdown.js",
    "meter.js",
    "page.css",
    "answer.css",
    "access.css",
    "meter.css",
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
        (f"{prefix}/{name}", name.replace(".", "_"), _view(_serve, _read(name)))
        for name in MODULE + (PAGE if settings.page else ())
    ]
    if settings.page:
        template = _template(settings.page, prefix, settings.meter)
        page = _read("page.html", template.substitute(csrf=""))
        entries.append((settings.page, "page", _view(_serve_page, page, template)))
    if settings.meter:
        path = f"{prefix}/meter/<chatstream_anything:stream_id>"
        entries.append((path, "meter", _view(show_meter, settings)))
    return partial(add_routes, routes=entries)


def _view(function: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    """A view that is `function` with what is given. With its name: Flask-WTF looks at that."""
    return update_wrapper(partial(function, *given), function)


def _read(name: str, text: str | None = None) -> File:
    """A file of this folder; with another `text`, if that is given."""
    path = Path(__file__).with_name(name)
    body = path.read_bytes() if text is None else text.encode()
    headers = {**_HEADERS, **(_PAGE_HEADERS if path.suffix == ".html" else {})}
    modified = datetime.fromtimestamp(int(path.stat().st_mtime), timezone.utc)
    return File(_TYPES[path.suffix], body, modified, headers)


def _template(place: str, prefix: str, meter: bool) -> Template:
    """The page at `place`; `csrf` is left open.

    What it needs is addressed relative to it: so a proxy may take a part of the path away, or a
    host mount the app anywhere, and nobody has to say so.
    """
    base = posixpath.relpath(prefix, posixpath.dirname(place))
    text = Path(__file__).with_name("page.html").read_text()
    return Template(Template(text).safe_substitute(base=base, meter="on" if meter else "off"))


def _serve_page(page: File, template: Template) -> Response:
    """The page. Where the app guards its POSTs, with the token that they need."""
    make_token = current_app.jinja_env.globals.get("csrf_token")  # Flask-WTF puts it there
    if not callable(make_token) or request.method not in ("GET", "HEAD"):
        return _serve(page)
    body = template.substitute(csrf=html.escape(str(make_token())))
    response = Response(body, content_type=page.content_type, headers=dict(page.headers))
    response.headers["Cache-Control"] = "no-store"  # the token is one visitor's
    response.headers["Referrer-Policy"] = "same-origin"  # over HTTPS Flask-WTF looks at it
    return response


def _serve(file: File) -> Response:
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    response = Response(file.body, content_type=file.content_type, headers=dict(file.headers))
    response.set_etag(file.etag)
    response.last_modified = file.modified
    response.make_conditional(request)
    return response
