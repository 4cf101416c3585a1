"""The standalone service: the app of `gunicorn wsgi:app` and of `python -m chatstream`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from flask import Flask

from chatstream.settings.table import PREFIX, STANDALONE, unread
from chatstream.web.extension import ChatStream
from chatstream.workers import server

log = logging.getLogger("chatstream")


def create_app() -> Flask:
    """A Flask app with the page, the chat's routes and OpenAI's, set up from the environment.

    Raises:
        ConfigError: A setting is wrong; the message names it.
    """
    app = Flask("chatstream")
    app.config.update({key: os.environ.get(key, value) for key, value in STANDALONE.items()})
    ChatStream(app)
    return app


def is_first() -> bool:
    """Whether this process says at the start what is true of all workers of its gunicorn."""
    return getattr(server.gunicorn_worker(), "age", 1) == 1


def warn_of_typos(environ: Iterable[str]) -> None:
    """Says which keys are one of ours but for a letter or two: what was meant does not hold.

    Only these: where a service is called chatstream, Kubernetes sets CHATSTREAM_PORT and the like.

    Args:
        environ: The names of the environment.
    """
    for key, near in unread(name for name in environ if name.startswith(PREFIX)):
        if near:
            log.warning("%s is read by nobody. Did you mean %s?", key, near)


def warn_if_open(app: Flask) -> None:
    """Says at start-up that whoever reaches the service may use it, where that is so."""
    service = app.extensions["chatstream"]
    if service.identify is None:
        log.warning(
            "The service is open: whoever reaches it can ask, at your provider's cost. Set"
            " CHATSTREAM_TOKENS to the bearer tokens that may."
        )
