"""`python -m chatstream`: the commands, for the standalone service. It reads the environment."""

from __future__ import annotations

import os

from flask import Flask

from chatstream.cli import main
from chatstream.config import STANDALONE
from chatstream.extension import ChatStream


def create_app() -> Flask:
    """The app of `gunicorn wsgi:app`, as the commands see it."""
    app = Flask("chatstream")
    app.config.update({key: os.environ.get(key, value) for key, value in STANDALONE.items()})
    ChatStream(app)
    return app


if __name__ == "__main__":
    main(create_app)
