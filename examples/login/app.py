"""An app with Flask-Login and Flask-WTF, and a chat that only its users have.

How to run it is in the README.md beside.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import suppress
from typing import Any

import click
import users
from flask import Flask, current_app, redirect, render_template, request, url_for
from flask_login import LoginManager, current_user, login_required, login_user, logout_user
from flask_wtf import CSRFProtect, FlaskForm
from flask_wtf.csrf import CSRFError
from werkzeug.wrappers import Response
from wtforms import PasswordField, StringField
from wtforms.validators import InputRequired

from chatstream import BusUnavailable, ChatStream

CONFIG = {
    "CHATSTREAM_MAX_STREAMS_PER_OWNER": 3,
    # A chat stays open for days. By default a token is good for an hour, and after that neither a
    # question nor a stop would get in; now it is good for as long as the login.
    "WTF_CSRF_TIME_LIMIT": None,
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)


class LoginForm(FlaskForm):
    """Name and password."""

    name = StringField("Name", [InputRequired()])
    password = PasswordField("Password", [InputRequired()])


def create_app(**config: Any) -> Flask:
    """The app. SECRET_KEY and the provider come from the environment."""
    logging.basicConfig(level=logging.INFO)  # a line for each stream, and how it ended
    app = Flask(__name__)
    app.config.update(CONFIG, SECRET_KEY=os.environ.get("SECRET_KEY"))
    app.config.update(config)
    if not app.config["SECRET_KEY"]:
        raise RuntimeError("Set SECRET_KEY to what nobody can guess: it signs the logins.")
    users.init_app(app)
    logins = LoginManager(app)
    logins.user_loader(users.find)
    logins.login_view = "login"
    logins.login_message = None
    CSRFProtect(app)
    ChatStream(app, identify=lambda: current_user.get_id(), admin=is_admin)
    add_routes(app)
    app.cli.command("add-user")(add_user)
    return app


def is_admin() -> bool:
    """Whether who asks is one. Who is not logged in is not."""
    return bool(getattr(current_user, "is_admin", False))


def add_routes(app: Flask) -> None:
    """The app's own pages."""
    app.add_url_rule("/", view_func=login_required(chat))
    app.add_url_rule("/login", view_func=login, methods=["GET", "POST"])
    app.add_url_rule("/logout", view_func=logout, methods=["POST"])
    app.register_error_handler(CSRFError, without_token)
    app.after_request(say_what_may_run)


def chat() -> str:
    """The page with the chat."""
    return render_template("chat.html")


def login() -> str | tuple[str, int] | Response:
    """The form, and what is sent with it."""
    form = LoginForm()
    if not form.validate_on_submit():
        return render_template("login.html", form=form)
    user = users.check(form.name.data, form.password.data)
    if user is None:
        return render_template("login.html", form=form, wrong=True), 401
    login_user(user)
    return redirect(url_for("chat"))


def logout() -> Response:
    """The user's answers end with the login, in all tabs."""
    owner = current_user.get_id()
    logout_user()
    if owner is not None:
        with suppress(BusUnavailable):  # then those of this worker are stopped
            current_app.extensions["chatstream"].cancel_all(owner)
    return redirect(url_for("login"))


def without_token(error: CSRFError) -> CSRFError | tuple[dict[str, Any], int]:
    """What a request without a good token gets: on the chat's routes JSON, as all refusals there.

    Flask-WTF refuses before a view is called, so the provider hears nothing of it.
    """
    if request.blueprint != "chatstream":
        return error
    message = "This page is out of date. Please load it again."
    return {"ok": False, "reason": "csrf", "message": message}, 400


def say_what_may_run(response: Response) -> Response:
    """Nothing but the app's own files, should a script ever get into an answer."""
    response.headers.setdefault("Content-Security-Policy", POLICY)
    return response


@click.argument("name")
@click.option("--admin", is_flag=True, help="May see and stop everybody's streams.")
@click.password_option()
def add_user(name: str, admin: bool, password: str) -> None:
    """Lets somebody log in."""
    try:
        users.add(name, password, admin=admin)
    except sqlite3.IntegrityError:
        raise click.ClickException(f"There is a user {name} already.") from None
