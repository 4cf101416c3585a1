"""The standalone service: `gunicorn wsgi:app`."""

import logging
import sys

from flask import Flask

from chatstream import ChatStream, ConfigError


def create_app() -> Flask:
    """A Flask app with the chat routes and nothing else, set up from the environment."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    app = Flask("chatstream")
    try:
        ChatStream(app)
    except ConfigError as error:
        print(f"chatstream: {error}", file=sys.stderr)
        sys.exit(3)  # gunicorn takes 3 for "do not start this worker again"
    return app


app = create_app()
