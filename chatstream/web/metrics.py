"""The route for Prometheus."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Response, request

from chatstream.errors import ConfigError
from chatstream.telemetry.metrics import FOLDER
from chatstream.web.replies import other_method
from chatstream.web.routing import add_routes
from chatstream.workers import server

if TYPE_CHECKING:
    from flask import Blueprint, Flask

    from chatstream.service.service import Service


def mount(place: str, blueprint: Blueprint, app: Flask, service: Service) -> None:
    """Has the figures of `service` kept, and shown at `place`.

    Args:
        place: The path.
        blueprint: Where the route is entered.
        app: The sender of the signals.
        service: Whose slots are counted.

    Raises:
        ConfigError: prometheus_client is not installed, or has no folder to write to.
    """
    try:
        from chatstream.telemetry.metrics.figures import watch
    except ImportError as error:
        raise ConfigError(
            "CHATSTREAM_METRICS needs prometheus_client: pip install 'chatstream[metrics]'"
        ) from error
    try:
        # Not in a master that is to fork: what it said would be one worker's more.
        watch(app, service, serves=server.gunicorn_worker() is not None)
    except OSError as error:
        raise ConfigError(f"{FOLDER} must name a folder that can be written to: {error}") from error
    blueprint.record(partial(add_routes, routes=((place, "metrics", show),)))


def show() -> Any:
    """GET: the figures of all processes, as text for Prometheus, and what else the app counts."""
    from chatstream.telemetry.metrics.figures import shown

    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    text, content_type = shown(request.headers.get("Accept", ""))
    return Response(text, content_type=content_type, headers={"Cache-Control": "no-store"})
