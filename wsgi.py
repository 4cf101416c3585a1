"""The standalone service: `gunicorn wsgi:app`."""

import logging
import os
import sys

from flask import Flask

from chatstream import ChatStream, ConfigError
from chatstream.config import STANDALONE


def create_app() -> Flask:
    """A Flask app with the page, the chat routes and OpenAI's, set up from the environment."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    app = Flask("chatstream")
    app.config.update({key: os.environ.get(key, value) for key, value in STANDALONE.items()})
    try:
        ChatStream(app)
    except ConfigError as error:
        print(f"chatstream: {error}", file=sys.stderr)
        sys.exit(3)  # gunicorn takes 3 for "do not start this worker again"
    return app


app = create_app()
