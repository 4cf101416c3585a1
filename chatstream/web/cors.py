"""Other origins' pages: which may use the routes. Off unless configured; Flask-CORS does it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flask import Flask

from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from chatstream.settings.table import Settings


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
    CORS(
        app,
        resources=list(_resources(settings)),
        origins=list(settings.cors_origins),
        expose_headers=["X-Session-Id", "X-Stream-Id", "Retry-After", "WWW-Authenticate"],
        max_age=600,
    )


def _resources(settings: Settings) -> Iterator[str]:
    """Patterns of the routes. OpenAI's may be at the root, beside all of the app's."""
    yield rf"{re.escape(settings.url_prefix)}/.*"
    if settings.openai_prefix is not None:
        yield rf"{re.escape(settings.openai_prefix.rstrip('/'))}/(chat/completions|models)$"
