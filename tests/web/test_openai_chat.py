"""openai_chat: an answer to OpenAI's clients, with Flask's test client and a mocked provider.

What they share with the chat's own routes is tested there; with OpenAI's clients and real servers
they are in integration/test_openai.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import flask
import pytest
import requests
import responses
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse

from chatstream import ChatStream
from chatstream.stream.outcome import Cause
from tests.web.chat import DONE, EVENT, KEY, URL
from tests.web.openai import (
    ANSWER,
    ASKED,
    CHAT,
    LIST,
    MODELS,
    Drop,
    MakeDrop,
    assert_refused,
)


def stopped(us: Drop, cause: Cause) -> Drop:
    """Each of its streams is aborted before the provider is called."""

    @us.app.after_request
    def stop(response: flask.Response) -> flask.Response:
        for stream in us.service.registry.live():
            stream.abort(cause)
        return response

    return us


def sent(provider: responses.RequestsMock) -> Any:
    """What the provider was asked last."""
    return json.loads(provider.calls[-1].request.body)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", [None, "off"])
def test_they_are_off_unless_asked_for(where: str | None) -> None:
    """An app that has a /v1 of its own keeps it."""
    app = flask.Flask("host")
    if where is not None:
        app.config["CHATSTREAM_OPENAI_PREFIX"] = where
    ChatStream(app)
    assert not [rule for rule in app.url_map.iter_rules() if "completions" in rule.rule]
    assert app.test_client().get(MODELS).status_code == 404


@pytest.mark.parametrize(("given", "status"), [(None, 204), ("off", 404)])
def test_they_are_on_in_the_standalone_service(
    monkeypatch: pytest.MonkeyPatch, given: str | None, status: int
) -> None:
    """Unless the environment says otherwise."""
    monkeypatch.delenv("CHATSTREAM_OPENAI_PREFIX", raising=False)
    from wsgi import create_app

    if given is not None:
        monkeypatch.setenv("CHATSTREAM_OPENAI_PREFIX", given)
    assert create_app().test_client().options(CHAT).status_code == status


@pytest.mark.parametrize(
    ("prefix", "path"), [("/ai/v2", "/ai/v2/chat/completions"), ("/", "/chat/completions")]
)
def test_they_are_where_the_setting_says(
    drop: MakeDrop, openai: responses.RequestsMock, prefix: str, path: str
) -> None:
    """Also at the root."""
    client = drop(OPENAI_PREFIX=prefix).app.test_client()
    assert client.post(path, json=ASKED, buffered=True).data == ANSWER
    assert client.get(MODELS).status_code == 404


def test_what_else_is_below_the_prefix_is_the_apps(drop: MakeDrop) -> None:
    """Its own routes there, and its own 404."""
    app = flask.Flask("host")
    app.add_url_rule("/v1/files", view_func=lambda: "files")
    app.register_error_handler(404, lambda error: ("nothing of that name", 404))
    client = drop(app).app.test_client()
    assert client.get("/v1/files").text == "files"
    assert client.get("/v1/chat").text == "nothing of that name"
    assert client.get("/v1/models/m").text == "nothing of that name"


def test_they_move_with_their_app(openai: responses.RequestsMock, drop: MakeDrop) -> None:
    """Behind a dispatcher."""
    both = Client(DispatcherMiddleware(flask.Flask("front"), {"/one": drop().app}))
    assert both.post(f"/one{CHAT}", json=ASKED, buffered=True).data == ANSWER
    assert both.get(f"/one{MODELS}").data == LIST


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
def test_an_answer_in_one_piece(
    drop: MakeDrop, openai: responses.RequestsMock, stream: dict[str, Any]
) -> None:
    """Unless a stream is asked for: the provider's JSON as it is."""
    response = drop().post({**ASKED, **stream})
    assert (response.status_code, response.data) == (200, ANSWER)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert openai.calls[0].request.headers["Accept"] == "application/json"


def test_an_answer_in_events(drop: MakeDrop, provider: responses.RequestsMock) -> None:
    """As on the chat's own route."""
    provider.post(URL, body=EVENT + DONE, content_type="text/event-stream")
    response = drop().post({**ASKED, "stream": True})
    assert (response.status_code, response.data) == (200, EVENT + DONE)
    assert response.mimetype == "text/event-stream"
    assert provider.calls[0].request.headers["Accept"] == "text/event-stream"
    assert provider.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


def test_the_body_is_the_providers(drop: MakeDrop, openai: responses.RequestsMock) -> None:
    """Nothing is added to it or taken from it: not what other routes of ours look for, either."""
    body = {**ASKED, "sessionId": "s", "streamId": 7, "n": 1.5, "stream": False, "x": None}
    drop(INCLUDE_USAGE="1").post(body)
    assert sent(openai) == body


def test_the_names_are_in_headers(drop: MakeDrop, openai: responses.RequestsMock) -> None:
    """Given or made up; both are in the answer."""
    us = drop()
    response = us.post(X_Session_Id="s-1", X_Stream_Id="t-1")
    assert [response.headers[f"X-{name}-Id"] for name in ("Session", "Stream")] == ["s-1", "t-1"]
    made = us.post().headers
    assert made["X-Session-Id"].isalnum()
    assert made["X-Stream-Id"] != made["X-Session-Id"]


def test_a_session_is_the_same_on_every_route(
    drop: MakeDrop, openai: responses.RequestsMock
) -> None:
    """What began on the chat's route is superseded on this one."""
    us = drop()
    first = us.hold(session_id="s-1")
    us.post(X_Session_Id="s-1")
    assert first.cause is Cause.SUPERSEDED


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_before_the_first_byte_is_no_error(drop: MakeDrop, stream: bool) -> None:
    """It is an answer in which nothing is said."""
    response = stopped(drop(), Cause.CANCEL).post({**ASKED, "stream": stream})
    assert response.status_code == 200
    chunk = response.data.removeprefix(b"data: ").removesuffix(b"\n\ndata: [DONE]\n\n")
    said = json.loads(chunk if stream else response.data)
    assert (said["choices"][0]["finish_reason"], said["model"]) == ("cancelled", "m")
    assert response.mimetype == ("text/event-stream" if stream else "application/json")


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_is_told(drop: MakeDrop, stream: bool) -> None:
    """As an error, which is not repeated: it would take as long."""
    response = stopped(drop(), Cause.DEADLINE).post({**ASKED, "stream": stream})
    assert_refused(response, 504, "deadline")
    assert response.headers["X-Should-Retry"] == "false"


BAD = {
    "no messages": ({"model": "m"}, 400, "bad_messages"),
    "stream": ({**ASKED, "stream": "yes"}, 400, "bad_stream"),
    "stream as a number": ({**ASKED, "stream": 1}, 400, "bad_stream"),
    "a list": ([], 400, "bad_json"),
    "what JSON cannot carry": ({**ASKED, "x": "\ud800"}, 400, "bad_json"),
    "too long": ({**ASKED, "x": "x" * 500}, 413, "too_large"),
}


@pytest.mark.parametrize(("body", "status", "code"), BAD.values(), ids=BAD)
def test_bad_bodies(drop: MakeDrop, body: Any, status: int, code: str) -> None:
    """What the chat's own route refuses, in OpenAI's shape; and a stream that is neither."""
    assert_refused(drop(MAX_BODY=500).post(body), status, code)


@pytest.mark.parametrize("name", ["X_Session_Id", "X_Stream_Id"])
@pytest.mark.parametrize("value", ["", "a b", "x" * 129, "é"])
def test_bad_names(drop: MakeDrop, name: str, value: str) -> None:
    """A header of another form; the sentence says which."""
    response = drop().post(**{name: value})
    assert_refused(response, 400, "bad_id")
    assert name.replace("_", "-") in response.text


def test_another_media_type(drop: MakeDrop) -> None:
    """Forms are not JSON."""
    response = drop().app.test_client().post(CHAT, data=b"{}", content_type="text/plain")
    assert_refused(response, 415, "unsupported_media_type")


def conflicting(us: Drop) -> TestResponse:
    us.hold(session_id="s", stream_id="t")
    return us.post(X_Session_Id="s-2", X_Stream_Id="t")


def busy(us: Drop) -> TestResponse:
    for _ in range(8):
        us.hold()
    return us.post()


@pytest.mark.parametrize(
    ("scene", "status", "code"), [(conflicting, 409, "conflict"), (busy, 503, "busy")]
)
def test_no_room(
    drop: MakeDrop, scene: Callable[[Drop], TestResponse], status: int, code: str
) -> None:
    """Both of which OpenAI's clients repeat, after what Retry-After says."""
    response = scene(drop())
    assert_refused(response, status, code)
    assert response.headers.get("Retry-After") == ("1" if code == "busy" else None)


FAULTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "key": ({"status": 401}, 502, "upstream_auth"),
    "rate": ({"status": 429, "headers": {"Retry-After": "7"}}, 429, "upstream_rate_limited"),
    "rejected": ({"status": 422, "json": {"error": "No."}}, 400, "upstream_rejected"),
    "failed": ({"status": 500}, 502, "upstream_error"),
    "late": ({"body": requests.ReadTimeout("x")}, 504, "upstream_timeout"),
    "moved": ({"status": 302, "headers": {"Location": "/"}}, 502, "upstream_not_json"),
    "events": ({"body": EVENT, "content_type": "text/event-stream"}, 502, "upstream_not_json"),
    "half": ({"body": ANSWER[:-1], "content_type": "application/json"}, 502, "upstream_truncated"),
}


@pytest.mark.parametrize(("answer", "status", "code"), FAULTS.values(), ids=FAULTS)
def test_a_provider_that_refuses_has_a_true_status(
    drop: MakeDrop, provider: responses.RequestsMock, answer: Any, status: int, code: str
) -> None:
    """For an answer in one piece as for a stream; Retry-After is the provider's."""
    provider.post(URL, **answer)
    response = drop().post()
    assert_refused(response, status, code)
    assert response.headers.get("Retry-After") == ("7" if status == 429 else None)
    assert "X-Session-Id" in response.headers


def test_a_providers_own_error_keeps_its_words(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """A 200 that says it failed is a 502, with what it said."""
    provider.post(URL, json={"error": {"message": "overloaded", "code": "busy"}})
    response = drop().post()
    assert response.status_code == 502
    assert response.json == {"error": {"message": "overloaded", "code": "busy"}}


def test_streams_belong_to_their_owner(drop: MakeDrop, openai: responses.RequestsMock) -> None:
    """What `identify` says is whose the stream is."""
    us = drop(identify=lambda: flask.request.headers["X-User"])
    mine = us.hold(session_id="s", owner="me")
    us.post(X_Session_Id="s", X_User="somebody else")
    assert not mine.ended
    us.post(X_Session_Id="s", X_User="me")
    assert mine.cause is Cause.SUPERSEDED
