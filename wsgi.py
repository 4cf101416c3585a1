"""The standalone service: `gunicorn wsgi:app`."""

import os
import sys

from flask import Flask

from chatstream import ConfigError
from chatstream.settings.table import Settings
from chatstream.telemetry import log_format
from chatstream.web import standalone


def create_app() -> Flask:
    """The app, with a log. Without good settings the process ends, with a sentence."""
    settings, _ = Settings.survey({}, os.environ)
    try:
        log_format.configure(settings)
        app = standalone.create_app()
    except ConfigError as error:
        log_format.say_last(settings, str(error))
        sys.exit(3)  # gunicorn takes 3 for "do not start this worker again"
    if standalone.is_first():
        standalone.warn_of_typos(os.environ)
        standalone.warn_if_open(app)
    return app


app = create_app()
