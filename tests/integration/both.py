"""Two apps with a service each, in one process."""

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from chatstream import ChatStream
from tests.integration.app import app

other = Flask("other")
ChatStream(other)
both = DispatcherMiddleware(app, {"/other": other})
