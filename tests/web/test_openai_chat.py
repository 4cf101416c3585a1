"""openai: OpenAI's routes, with Flask's test client on one side and a mocked provider on the other.

What they share with the chat's own routes is tested there (test_views, test_hostile); with OpenAI's
clients and real servers they are in integration/test_openai.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import requests
import responses
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse

from chatstream import ChatStream, Service
from chatstream.errors import UpstreamError
from chatstream.settings.table import Settings
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.outcome import Cause
from chatstream.stream.stream import Stream
from chatstream.web import openai_models, openai_replies
from chatstream.web.openapi import refusals
from tests.conftest import eventually
from tests.web.test_chat import DONE, EVENT, KEY, MESSAGES

URL = "https://provider.test/v1/chat/completions"
MODELS_URL = "https://provider.test/v1/models"
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
ASKED = {"model": "m", "messages": MESSAGES}
ANSWER = b'{"object": "chat.completion", "choices": [{"message": {"content": "\xc5\xbe"}}]}'
SETTINGS = {"OPENAI_PREFIX": "/v1", "UPSTREAM_URL": URL, "API_KEY": KEY, "MAX_STREAMS": 8}
LIST = b'{"object": "list", "data": [{"id": "a"}]}'


class Drop:
    """An app in whose place OpenAI's API could be."""

    def __init__(self, app: flask.Flask, identify: Callable[[], Any] | None) -> None:
        for key, value in SETTINGS.items():
            app.config.setdefault(f"CHATSTREAM_{key}", value)
        ChatStream(app, identify=identify)
        self.app = app
        self.service: Service = app.extensions["chatstream"]
        self._held: list[StreamIterable] = []

    def hold(self, **names: str) -> Stream:
        """A stream that is live and not walked."""
        self._held.append(self.service.open(b"", **names))  # type: ignore[arg-type]
        return self._held[-1].stream

    def close(self) -> None:
        for iterable in self._held:
            iterable.close()
        self.service.stop()
        eventually(lambda: len(self.service.registry) == 0, "slots given back")

    def post(self, body: Any = None, /, **headers: str) -> TestResponse:
        """Asks, and reads to the end. A header's name has underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = ASKED if body is None else body
        return self.app.test_client().post(CHAT, json=body, headers=named, buffered=True)

    def models(self, method: str = "GET") -> TestResponse:
        return self.app.test_client().open(MODELS, method=method)


@pytest.fixture
def drop() -> Iterator[Callable[..., Drop]]:
    """Makes an app: settings by name, `identify`, and `app` for one that has things already."""
    made: list[Drop] = []

    def make(
        app: flask.Flask | None = None, identify: Callable[[], Any] | None = None, **settings: Any
    ) -> Drop:
        app = app or flask.Flask("host")
        app.config.from_mapping({f"CHATSTREAM_{key}": value for key, value in settings.items()})
        made.append(Drop(app, identify))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def provider() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def answers(provider: responses.RequestsMock) -> responses.RequestsMock:
    """A provider that answers in one piece, and has a list of models."""
    provider.post(URL, body=ANSWER, content_type="application/json")
    provider.get(MODELS_URL, body=LIST, content_type="application/json; charset=utf-8")
    return provider


MakeDrop = Callable[..., Drop]


def stopped(us: Drop, cause: Cause) -> Drop:
    """Each of its streams is aborted before the provider is called."""

    @us.app.after_request
    def stop(response: flask.Response) -> flask.Response:
        for stream in us.service.registry.live():
            stream.abort(cause)
        return response

    return us


def assert_refused(response: TestResponse, status: int, code: str) -> None:
    """The shape of every refusal here."""
    assert (response.status_code, response.json["error"]["code"]) == (status, code)  # type: ignore[index]
    assert set(response.json) == {"error"}  # type: ignore[arg-type]
    assert set(response.json["error"]) == {"message", "type", "param", "code"}  # type: ignore[index]
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert "X-Accel-Buffering" not in response.headers


def sent(provider: responses.RequestsMock) -> Any:
    """What the provider was asked last."""
    return json.loads(provider.calls[-1].request.body)  # type: ignore[arg-type]


# Where they are


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
    drop: MakeDrop, answers: responses.RequestsMock, prefix: str, path: str
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


def test_they_move_with_their_app(answers: responses.RequestsMock, drop: MakeDrop) -> None:
    """Behind a dispatcher."""
    both = Client(DispatcherMiddleware(flask.Flask("front"), {"/one": drop().app}))
    assert both.post(f"/one{CHAT}", json=ASKED, buffered=True).data == ANSWER
    assert both.get(f"/one{MODELS}").data == LIST


# An answer


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": None}])
def test_an_answer_in_one_piece(
    drop: MakeDrop, answers: responses.RequestsMock, stream: dict[str, Any]
) -> None:
    """Unless a stream is asked for: the provider's JSON as it is."""
    response = drop().post({**ASKED, **stream})
    assert (response.status_code, response.data) == (200, ANSWER)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert answers.calls[0].request.headers["Accept"] == "application/json"


def test_an_answer_in_events(drop: MakeDrop, provider: responses.RequestsMock) -> None:
    """As on the chat's own route."""
    provider.post(URL, body=EVENT + DONE, content_type="text/event-stream")
    response = drop().post({**ASKED, "stream": True})
    assert (response.status_code, response.data) == (200, EVENT + DONE)
    assert response.mimetype == "text/event-stream"
    assert provider.calls[0].request.headers["Accept"] == "text/event-stream"
    assert provider.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


def test_the_body_is_the_providers(drop: MakeDrop, answers: responses.RequestsMock) -> None:
    """Nothing is added to it or taken from it: not what other routes of ours look for, either."""
    body = {**ASKED, "sessionId": "s", "streamId": 7, "n": 1.5, "stream": False, "x": None}
    drop(INCLUDE_USAGE="1").post(body)
    assert sent(answers) == body


def test_the_model_has_a_default(drop: MakeDrop, answers: responses.RequestsMock) -> None:
    """The one thing that is added, where there is none."""
    drop(MODEL="house-model").post({"messages": MESSAGES})
    assert sent(answers)["model"] == "house-model"


def test_the_names_are_in_headers(drop: MakeDrop, answers: responses.RequestsMock) -> None:
    """Given or made up; both are in the answer."""
    us = drop()
    response = us.post(X_Session_Id="s-1", X_Stream_Id="t-1")
    assert [response.headers[f"X-{name}-Id"] for name in ("Session", "Stream")] == ["s-1", "t-1"]
    made = us.post().headers
    assert made["X-Session-Id"].isalnum()
    assert made["X-Stream-Id"] != made["X-Session-Id"]


def test_a_session_is_the_same_on_every_route(
    drop: MakeDrop, answers: responses.RequestsMock
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


# Refusals

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


def test_what_would_be_asked_in_vain_is_not_repeated(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """OpenAI's clients repeat a 5xx unless a header tells them not to."""
    us = drop()
    for answer, again in (({"status": 401}, "false"), ({"status": 500}, None)):
        provider.reset()
        provider.post(URL, **answer)
        assert us.post().headers.get("X-Should-Retry") == again


IN_VAIN = {
    "deadline",
    "upstream_auth",
    "upstream_not_stream",
    "upstream_not_json",
    "event_too_large",
    "answer_too_large",
}
"""Which faults these are, as docs/openai.md has it."""


def test_which_faults_are_in_vain(drop: MakeDrop) -> None:
    """Of all that the routes know; the others may be gone when the client asks again."""
    codes = {code for _, known in refusals.OPENAI_BEFORE.values() for code in known}
    with drop().app.test_request_context():
        told = {code: openai_replies.refuse(UpstreamError("", code=code)).headers for code in codes}
    assert {code for code in codes if told[code].get("X-Should-Retry") == "false"} == IN_VAIN


METHODS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "PURGE"]


@pytest.mark.parametrize(
    ("path", "method"),
    [(CHAT, method) for method in METHODS] + [(MODELS, m) for m in ("POST", "DELETE", "PURGE")],
)
def test_other_methods(drop: MakeDrop, path: str, method: str) -> None:
    """A 405 of ours, with what is allowed; no page of the app's."""
    app = flask.Flask("host")
    app.register_error_handler(HTTPException, lambda error: ("<h1>app's</h1>", 418))
    response = drop(app).app.test_client().open(path, method=method)
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"] or "GET" in response.headers["Allow"]
    if method == "HEAD":
        assert response.data == b""
    else:
        assert_refused(response, 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "allowed"), [(CHAT, "OPTIONS, POST"), (MODELS, "GET, HEAD, OPTIONS")]
)
def test_options(drop: MakeDrop, path: str, allowed: str) -> None:
    """What is allowed, to whoever asks."""
    response = drop(identify=lambda: None).app.test_client().options(path)
    assert (response.status_code, response.headers["Allow"]) == (204, allowed)


# Who asks


@pytest.mark.parametrize("path", [CHAT, MODELS])
def test_nobody_is_a_401(drop: MakeDrop, provider: responses.RequestsMock, path: str) -> None:
    """On both routes, and the provider hears nothing."""
    client = drop(identify=lambda: None).app.test_client()
    method = "GET" if path == MODELS else "POST"
    assert_refused(client.open(path, method=method, json=ASKED), 401, "unauthenticated")
    assert len(provider.calls) == 0


@pytest.mark.parametrize("path", [CHAT, MODELS])
def test_identifys_response_is_sent_as_it_is(drop: MakeDrop, path: str) -> None:
    """A login page, if the app says so."""
    client = drop(identify=lambda: flask.Response("log in", 302)).app.test_client()
    response = client.open(path, method="GET" if path == MODELS else "POST", json=ASKED)
    assert (response.status_code, response.text) == (302, "log in")


def test_streams_belong_to_their_owner(drop: MakeDrop, answers: responses.RequestsMock) -> None:
    """What `identify` says is whose the stream is."""
    us = drop(identify=lambda: flask.request.headers["X-User"])
    mine = us.hold(session_id="s", owner="me")
    us.post(X_Session_Id="s", X_User="somebody else")
    assert not mine.ended
    us.post(X_Session_Id="s", X_User="me")
    assert mine.cause is Cause.SUPERSEDED


# The models


def test_the_list_is_passed_through(drop: MakeDrop, answers: responses.RequestsMock) -> None:
    """The provider's JSON as it is, asked for with the key."""
    response = drop().models()
    assert (response.status_code, response.data) == (200, LIST)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert answers.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


def test_a_head_of_the_list(drop: MakeDrop, answers: responses.RequestsMock) -> None:
    """As the GET, without the body."""
    response = drop().models("HEAD")
    assert (response.status_code, response.data) == (200, b"")


def test_models_that_may_not_be_asked_are_not_listed(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """The rest is as the provider has it, in its order and with all that it says of each."""
    models = [{"id": name, "owned_by": "ž", "n": [1.5, None]} for name in ("c", "b", "a", "bb")]
    whole = {"object": "list", "data": models, "has_more": False}
    provider.get(MODELS_URL, json=whole)
    us = drop(MODEL="a", ALLOWED_MODELS="a,b,d")
    response = us.models()
    assert response.json == {**whole, "data": models[1:3]}
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.headers["Cache-Control"] == "no-store"
    head = us.models("HEAD")
    assert (head.status_code, head.data) == (200, b"")


ODD = [
    "[]",
    "7",
    "null",
    "{}",
    '{"data": {"id": 7}}',
    '{"data": [7]}',
    '{"data": [{}]}',
    "{",
    '"data"',
]


@pytest.mark.parametrize("body", [*ODD, "[" * 200_000], ids=lambda text: text[:16])
def test_a_list_that_cannot_be_told_from_what_is_allowed(
    drop: MakeDrop, provider: responses.RequestsMock, body: str
) -> None:
    """Of another form: nothing of it is shown, and it is no fault of ours."""
    provider.get(MODELS_URL, body=body, content_type="application/json")
    us = drop(MODEL="a", ALLOWED_MODELS="a")
    assert_refused(us.models(), 502, "upstream_not_json")
    assert drop().models().text == body


NO_LISTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "key": ({"status": 403}, 502, "upstream_auth"),
    "rate": ({"status": 429, "headers": {"Retry-After": "7"}}, 429, "upstream_rate_limited"),
    "none": ({"status": 404, "json": {"error": {"message": "No."}}}, 400, "upstream_rejected"),
    "failed": ({"status": 503}, 502, "upstream_error"),
    "moved": ({"status": 302, "headers": {"Location": "/"}}, 502, "upstream_not_json"),
    "moved, in JSON": ({"status": 301, "json": {}}, 502, "upstream_not_json"),
    "a page": ({"body": "<h1>"}, 502, "upstream_not_json"),
    "late": ({"body": requests.ReadTimeout("x")}, 504, "upstream_timeout"),
    "down": ({"body": requests.ConnectTimeout("x")}, 502, "upstream_connect"),
}


@pytest.mark.parametrize(("answer", "status", "code"), NO_LISTS.values(), ids=NO_LISTS)
def test_a_list_that_is_not_to_be_had(
    drop: MakeDrop,
    provider: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
    answer: Any,
    status: int,
    code: str,
) -> None:
    """The same words as for an answer; a line in the log where it is no fault of the caller's."""
    caplog.set_level(logging.WARNING, "chatstream")
    provider.get(MODELS_URL, **answer)
    response = drop().models()
    assert_refused(response, status, code)
    assert response.headers.get("Retry-After") == ("7" if status == 429 else None)
    lines = [line.partition(" detail=")[0] for line in caplog.messages]
    assert lines == ([f"The list of models failed: {code}"] if status >= 500 else [])


def test_a_providers_sentence_tells_no_key(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """What it says of a rejected question goes on without it."""
    provider.get(MODELS_URL, status=400, json={"error": {"message": f"{KEY} is wrong"}})
    assert drop().models().json["error"]["message"] == "[key] is wrong"  # type: ignore[index]


def test_a_provider_of_another_kind_has_no_list(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """Where its address is not OpenAI's, nobody is asked, and the sentence says what to set."""
    response = drop(UPSTREAM_URL="https://provider.test/chat").models()
    assert_refused(response, 404, "no_models")
    assert "CHATSTREAM_UPSTREAM_URL" in response.text


def test_lists_do_not_hold_all_threads(
    drop: MakeDrop, answers: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that does not answer holds two; whoever else asks is told to come again."""
    us = drop()
    seen: list[TestResponse] = []

    def slow(settings: Settings) -> bytes:
        seen.append(us.models())  # another one meanwhile
        return LIST

    with monkeypatch.context() as patched:
        patched.setattr("chatstream.upstream.models.models", slow)
        seen.append(us.models())
    refused, *served = seen
    assert_refused(refused, 503, "busy")
    assert refused.headers["Retry-After"] == "1"
    assert [response.data for response in served] == [LIST] * openai_models.ASKING
    assert us.models().data == LIST
