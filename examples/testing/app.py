"""An app with a login of its own, and a chat: what `test_app.py` beside it tests."""

from __future__ import annotations

from typing import Any

from flask import Flask, redirect, request, session
from werkzeug.wrappers import Response

from chatstream import ChatStream


def create_app(**config: Any) -> Flask:
    """The app. The provider comes from the environment, as in production."""
    app = Flask(__name__)
    app.config.update(SECRET_KEY="for the example only", SESSION_COOKIE_SECURE=True)
    app.config.update(config)
    ChatStream(app, identify=lambda: session.get("user"))

    @app.post("/login")
    def login() -> Response:
        session["user"] = request.form["name"]  # an app of yours asks for a password
        return redirect("/")

    return app
