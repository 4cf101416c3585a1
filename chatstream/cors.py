"""Other origins' pages: which may use the routes. Off unless configured; Flask-CORS does it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flask import Flask

from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from chatstream.config import Settings


def allow(app: Flask, settings: Settings) -> None:
    """Lets pages of the settings' origins use the chat's and OpenAI's routes.

    No cookies go along: a bearer token does, or nothing. An app whose users log in with cookies
    sets Flask-CORS up itself.

    Raises:
        ConfigError: Flask-CORS is not there.
    """
    if settings.cors_origins is None:
        return
    try:
        from flask_cors import CORS
    except ImportError:
        raise ConfigError(
            "CHATSTREAM_CORS_ORIGINS needs Flask-CORS: pip install 'chatstream[cors]'"
        ) from None
    places = filter(None, (settings.url_prefix, settings.openai_prefix))
    CORS(
        app,
        resources=[rf"{re.escape(place.rstrip('/'))}/.*" for place in places],
        origins=list(settings.cors_origins),
        expose_headers=["X-Session-Id", "X-Stream-Id", "Retry-After", "WWW-Authenticate"],
        max_age=600,
    )
