"""How the process is: healthz and readyz."""

from __future__ import annotations

from flask import Response, request

from chatstream.errors import StreamError, shutting_down
from chatstream.web.caller import service
from chatstream.web.replies import as_json, other_method, refuse


def healthz() -> Response:
    """GET /healthz: this process answers requests."""
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    return as_json({"ok": True}, 200)


def readyz() -> Response:
    """GET /readyz: whether new streams should come here."""
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    try:
        if service().draining():
            raise shutting_down()
        service().check_bus()
    except StreamError as error:
        return refuse(error)
    return as_json({"ok": True}, 200)
