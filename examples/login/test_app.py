"""What the app beside promises. Run it with `pytest`; it needs no key and no network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import users
from app import create_app
from flask import Flask
from flask_login import login_user
from itsdangerous import TimestampSigner

from chatstream.testing import Browser, Live, Provider

PASSWORD = "correct horse battery staple"
QUESTION = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    """With Ada, who is an admin, and Bob, who is not."""
    app = create_app(SECRET_KEY="for the tests only", DATABASE=str(tmp_path / "users.sqlite"))
    with app.app_context():
        users.add("ada", PASSWORD, admin=True)
        users.add("bob", PASSWORD)
    return app


@pytest.fixture
def live(app: Flask, chatstream_live: Callable[[Flask], Live]) -> Live:
    """The app, served."""
    return chatstream_live(app)


@pytest.fixture
def ada(live: Live) -> Live:
    """Ada's browser, logged in."""
    assert log_in(live, "ada") == 302
    return live


def token_of(browser: Browser, path: str) -> str:
    """The CSRF token of a page."""
    found = re.search(r'name="csrf-token" content="([^"]+)"', browser.get(path).text)
    assert found
    return found[1]


def log_in(browser: Browser, name: str, password: str = PASSWORD) -> int:
    """Fills the form in; from then on the browser's requests have the chat page's token."""
    form = {"name": name, "password": password, "csrf_token": token_of(browser, "/login")}
    status = browser.post("/login", data=form).status
    if status == 302:
        browser.headers["X-CSRFToken"] = token_of(browser, "/")
    return status


def test_a_stranger_is_sent_to_the_login(live: Live, chatstream_provider: Provider) -> None:
    live.headers["X-CSRFToken"] = token_of(live, "/login")
    assert live.get("/").status == 302
    refused = live.post("/api/chat/stream", json=QUESTION)
    assert (refused.status, refused.json["reason"]) == (401, "unauthenticated")
    assert live.cancel("s-1").status == 401
    assert chatstream_provider.requests() == []


@pytest.mark.parametrize("name", ["ada", "nobody"])
def test_a_wrong_password(live: Live, name: str) -> None:
    assert log_in(live, name, "guessed") == 401
    assert live.get("/").status == 302


def test_the_password_is_not_kept(app: Flask) -> None:
    assert PASSWORD.encode() not in Path(app.config["DATABASE"]).read_bytes()


def test_the_cookie_is_for_https_and_no_script(live: Live) -> None:
    cookie = live.get("/login").headers["Set-Cookie"]
    assert {"Secure", "HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))


def test_the_page_gets_what_it_imports(ada: Live) -> None:
    for path in ("/static/chat.js", "/api/chat/chatstream.js", "/api/chat/openapi.json"):
        assert ada.get(path).status == 200


def test_an_answer(ada: Live) -> None:
    answer = ada.ask("Hello?", script={"text": "Hello, Ada.", "tokens": 2, "rate": 0})
    assert answer.read() == "Hello, Ada."
    owner = ada.outcome(answer).owner
    assert owner == "1"
    assert type(owner) is str


def test_a_stop(ada: Live, chatstream_provider: Provider) -> None:
    answer = ada.ask("Tell me a story.", script={"rate": 0.1})
    assert answer.cancel().json == {"ok": True, "cancelled": True}
    assert chatstream_provider.told(answer).tokens_after == 0


def test_without_the_token_nothing_is_asked(ada: Live, chatstream_provider: Provider) -> None:
    del ada.headers["X-CSRFToken"]
    refused = ada.post("/api/chat/stream", json=QUESTION)
    assert (refused.status, refused.json["reason"]) == (400, "csrf")
    assert "load it again" in refused.json["message"]
    assert chatstream_provider.requests() == []


def test_another_sites_form_gets_nowhere(ada: Live, chatstream_provider: Provider) -> None:
    token = ada.headers.pop("X-CSRFToken")
    answer = ada.ask("Tell me a story.", headers={"X-CSRFToken": token})
    assert ada.cancel(answer).json["reason"] == "csrf"
    refused = ada.post("/logout", data={})
    assert (refused.status, refused.headers.get_content_type()) == (400, "text/html")
    assert chatstream_provider.figure(answer).open


def test_a_token_is_good_for_as_long_as_the_login(
    ada: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    tomorrow = int(time.time()) + 24 * 3600
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: tomorrow)
    assert ada.cancel("s-1").json == {"ok": False, "reason": "not_found"}


def test_nobody_stops_somebody_elses_answer(ada: Live, chatstream_provider: Provider) -> None:
    bob = ada.browser()
    log_in(bob, "bob")
    answer = ada.ask("Tell me a story.")
    assert bob.cancel(answer).status == 404
    assert chatstream_provider.figure(answer).open


def test_who_is_an_admin(app: Flask) -> None:
    admin = app.extensions["chatstream"].admin
    for name, expected in (("ada", True), ("bob", False)):
        with app.test_request_context():
            login_user(users.check(name, PASSWORD))
            assert admin() is expected
    with app.test_request_context():
        assert admin() is False


def test_logging_out_ends_it_all(ada: Live, chatstream_provider: Provider) -> None:
    token = ada.headers["X-CSRFToken"]
    answer = ada.ask("Tell me a story.")
    assert ada.post("/logout", data={"csrf_token": token}).status == 302
    assert chatstream_provider.told(answer)
    assert ada.outcome(answer).words == "aborted by client/cancel"
    refused = ada.post("/api/chat/stream", json=QUESTION)
    assert (refused.status, refused.json["reason"]) == (401, "unauthenticated")


def test_three_answers_at_a_time(ada: Live) -> None:
    answers = [ada.ask("Tell me a story.") for _ in range(3)]
    refused = ada.ask("And another one.")
    assert (refused.status, refused.json["reason"]) == (429, "too_many_streams")
    answers[0].cancel()
    assert ada.ask("And now?").status == 200


def test_users_are_added_on_the_command_line(app: Flask) -> None:
    run = app.test_cli_runner().invoke
    asked = ["add-user", "cleo", "--admin", "--password", PASSWORD]
    assert run(args=asked).exit_code == 0
    assert "already" in run(args=asked).output
    with app.app_context():
        cleo = users.check("Cleo", PASSWORD)
        assert cleo is not None
        assert cleo.is_admin


def test_it_does_not_start_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET_KEY", raising=False)
    with pytest.raises(RuntimeError, match="Set SECRET_KEY"):
        create_app()
