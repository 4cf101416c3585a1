"""Which routes there are, and where: the blueprint, from the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint
from flask.blueprints import BlueprintSetupState

from chatstream.web import openai_chat, sessions
from chatstream.web.chat import cancel, openapi, stream
from chatstream.web.page import files
from chatstream.web.routing import add_routes
from chatstream.web.stream_response import drop

if TYPE_CHECKING:
    from chatstream.settings.table import Settings


def blueprint(settings: Settings) -> Blueprint:
    """The routes, where the settings have them."""
    routes = Blueprint("chatstream", __name__, url_prefix=settings.url_prefix)
    routes.record(_add_routes)
    routes.record(sessions.routes(settings.url_prefix, settings.health))
    routes.record(files.routes(settings))
    if settings.openai_prefix is not None:
        routes.record(openai_chat.routes(settings.openai_prefix))
    routes.teardown_request(drop)
    return routes


def _add_routes(state: BlueprintSetupState) -> None:
    prefix = state.url_prefix
    add_routes(
        state,
        (
            (f"{prefix}/stream", "stream", stream),
            (f"{prefix}/cancel/<chatstream_anything:session_id>", "cancel", cancel),
            (f"{prefix}/cancel", "cancel", cancel),
            (f"{prefix}/openapi.json", "openapi", openapi),
        ),
    )
