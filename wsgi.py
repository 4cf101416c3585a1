"""The standalone service: `gunicorn wsgi:app`."""

import os
import sys

from flask import Flask

from chatstream import ChatStream, ConfigError, logs
from chatstream.config import STANDALONE, Settings


def create_app() -> Flask:
    """A Flask app with the page, the chat routes and OpenAI's, set up from the environment."""
    settings, _ = Settings.survey({}, os.environ)
    app = Flask("chatstream")
    app.config.update({key: os.environ.get(key, value) for key, value in STANDALONE.items()})
    try:
        logs.configure(settings)
        ChatStream(app)
    except ConfigError as error:
        logs.say_last(settings, str(error))
        sys.exit(3)  # gunicorn takes 3 for "do not start this worker again"
    return app


app = create_app()
