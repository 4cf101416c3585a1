"""The standalone service: `gunicorn wsgi:app`."""

import logging
import sys

from flask import Flask

from chatstream import ConfigError, standalone


def create_app() -> Flask:
    """The app, with a log. Without a good setting the process ends, with a sentence."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        app = standalone.create_app()
    except ConfigError as error:
        print(f"chatstream: {error}", file=sys.stderr)
        sys.exit(3)  # gunicorn takes 3 for "do not start this worker again"
    standalone.warn_if_open(app)
    return app


app = create_app()
