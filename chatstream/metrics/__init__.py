"""Figures for Prometheus, where CHATSTREAM_METRICS says that they are on.

`figures` has them, with the route that shows them; `shared` is what gunicorn's master does for
them, and has no Flask in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatstream.errors import ConfigError
from chatstream.metrics.shared import FOLDER, child_exit, on_exit, on_starting, share

if TYPE_CHECKING:
    from flask import Blueprint, Flask

    from chatstream.metrics.figures import Watched

__all__ = ["FOLDER", "child_exit", "mount", "on_exit", "on_starting", "share"]


def mount(place: str, blueprint: Blueprint, app: Flask, service: Watched) -> None:
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
        from chatstream.metrics.figures import routes, watch
    except ImportError as error:
        raise ConfigError(
            "CHATSTREAM_METRICS needs prometheus_client: pip install 'chatstream[metrics]'"
        ) from error
    try:
        watch(app, service)
    except OSError as error:
        raise ConfigError(f"{FOLDER} must name a folder that can be written to: {error}") from error
    blueprint.record(routes(place))
