"""caller: who asks, as the app says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
import pytest
import responses
from werkzeug.local import LocalProxy
from werkzeug.test import TestResponse

from tests.web.chat import CANCEL, MESSAGES, STREAM, MakeChat, Walk, assert_not_found
from tests.web.chat import assert_refused as refused_as_ours
from tests.web.openai import CHAT, MODELS
from tests.web.openai import assert_refused as refused_as_openais

QUESTION = {"messages": MESSAGES}

Responses = list[tuple[str, TestResponse]]


def by_header() -> Any:
    return flask.request.headers.get("X-User")


def test_owners_do_not_meet(chat: MakeChat) -> None:
    """Case 20: another's session is the same 404 as none, and its stream lives on."""
    c = chat(identify=by_header)
    body = {"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"}
    mine = Walk(c.app, body, **{"X-User": "me"})
    yours = Walk(c.app, body, **{"X-User": "you"})
    for path in ("/s-1", "/s-1?streamId=t-1"):
        assert_not_found(c.cancel(path, headers={"X-User": "eve"}))
    assert c.cancel("/s-1", headers={"X-User": "me"}).status_code == 200
    assert_not_found(c.cancel("/s-1", headers={"X-User": "me"}))
    assert c.cancel("/s-1", headers={"X-User": "you"}).status_code == 200
    mine.close()
    yours.close()


ASKING = [
    ("POST", STREAM),
    ("POST", f"{CANCEL}/s-1"),
    ("GET", "/api/chat/sessions"),
    ("POST", "/api/chat/cancel-all"),
    ("GET", "/api/chat/meter/s-1"),
    ("POST", CHAT),
    ("GET", MODELS),
]
"""The routes that are somebody's."""


def ask_all(chat: MakeChat, app: flask.Flask | None, identify: Callable[[], Any]) -> Responses:
    """Asks each of these routes, while a stream is live that is nobody's."""
    c = chat(app, identify=identify, OPENAI_PREFIX="/v1", METER="1")
    iterable = c.service.open(b"{}", session_id="s-1")
    said = [(p, c.client.open(p, method=method, json=QUESTION)) for method, p in ASKING]
    assert not iterable.stream.ended
    iterable.close()
    return said


def test_nobody_is_a_401(chat: MakeChat, provider: responses.RequestsMock) -> None:
    """A caller without a name: our 401, on all of them; nothing is asked, told or stopped."""
    for path, response in ask_all(chat, None, lambda: None):
        assert_refused = refused_as_openais if path in (CHAT, MODELS) else refused_as_ours
        assert_refused(response, 401, "unauthenticated")
    assert len(provider.calls) == 0


def test_some_routes_are_nobodys(chat: MakeChat) -> None:
    """The state of the process; the page and its module, which show a 401 in words."""
    asked: list[None] = []
    client = chat(identify=lambda: asked.append(None), HEALTH="/", PAGE="/").client
    for path in ("/healthz", "/readyz", "/", "/api/chat/chatstream.js"):
        assert client.get(path).status_code == 200
    assert asked == []


def test_a_number_is_a_name(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """A user's number does, and is the same owner as its text."""
    c = chat(identify=lambda: 7)
    walk = c.open(sessionId="s-1")
    assert c.service.abort("s-1", owner="7") is True
    walk.close()


def test_a_proxys_name_is_a_plain_name(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """What stands for another object (Flask-Login's current_user does) is a text by its value."""
    c = chat(identify=lambda: LocalProxy(lambda: "me"))
    walk = c.open(sessionId="s-1")
    assert c.service.abort("s-1", owner="me") is True
    assert type(walk.iterable._source.stream.owner) is str
    walk.close()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: flask.redirect("/login"),
        lambda: ("", 302, {"Location": "/login"}),
        lambda: flask.Response(status=302, headers={"Location": "/login"}),
    ],
    ids=["redirect", "tuple", "Response"],
)
def test_identifys_response_is_sent_as_it_is(chat: MakeChat, answer: Callable[[], Any]) -> None:
    """A login page of the app's is the app's."""
    for _, response in ask_all(chat, None, answer):
        assert (response.status_code, response.headers["Location"]) == (302, "/login")


def test_identifys_exception_is_the_apps(chat: MakeChat) -> None:
    """`abort(403)` in identify reaches the app's own error handler."""
    app = flask.Flask("host")
    app.register_error_handler(403, lambda error: ("the app's own", 403))
    for _, response in ask_all(chat, app, lambda: flask.abort(403)):
        assert (response.status_code, response.data) == (403, b"the app's own")


@pytest.mark.parametrize("value", [True, 1.5, b"me", ["me"], object()], ids=lambda v: str(type(v)))
def test_a_name_of_another_kind_is_a_mistake(chat: MakeChat, value: Any) -> None:
    """What is no name is told to the developer, not taken for one."""
    c = chat(identify=lambda: value)
    c.app.testing = True
    for call in (c.post, lambda: c.cancel("/s-1")):
        with pytest.raises(TypeError, match="identify must return"):
            call()
