"""views: the wire. Flask's test client on one side, a mocked provider on the other."""

from __future__ import annotations

import gc
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import flask
import pytest
import requests
import responses
from flask.testing import FlaskClient
from flask_wtf.csrf import CSRFProtect, generate_csrf
from werkzeug.exceptions import HTTPException
from werkzeug.local import LocalProxy
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

from chatstream import ChatStream, Service
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Claim, Enquiry, Page, Request, Worker
from chatstream.bus.unix.directory import service_directory
from chatstream.errors import BusUnavailable, Unconfirmed
from tests.conftest import eventually

URL = "https://provider.test/v1/chat"
KEY = "sk-very-secret"
EVENT = 'data: {"choices":[{"delta":{"content":"žluť 🙂"},"finish_reason":null}]}\n\n'.encode()
DONE = b"data: [DONE]\n\n"
MESSAGES = [{"role": "user", "content": "hi"}]
STREAM = "/api/chat/stream"
CANCEL = "/api/chat/cancel"


class Chat:
    """An app with the routes in it."""

    def __init__(self, app: flask.Flask, identify: Callable[[], Any] | None) -> None:
        self.app = app
        app.config.from_mapping(CHATSTREAM_UPSTREAM_URL=URL, CHATSTREAM_API_KEY=KEY)
        app.config.setdefault("CHATSTREAM_MAX_STREAMS", 8)
        ChatStream(app, identify=identify)
        self.client: FlaskClient = app.test_client()
        self.service: Service = app.extensions["chatstream"]
        self.walks: list[Walk] = []

    def post(self, body: Any = None, **options: Any) -> TestResponse:
        """POST /stream, read to its end."""
        body = {"messages": MESSAGES} if body is None else body
        return self.client.post(STREAM, json=body, buffered=True, **options)

    def send(self, data: bytes, content_type: str | None = "application/json") -> TestResponse:
        """POST /stream with a raw body."""
        return self.client.post(STREAM, data=data, content_type=content_type, buffered=True)

    def cancel(self, path: str, **options: Any) -> TestResponse:
        return self.client.post(f"{CANCEL}{path}", **options)

    def open(self, **body: Any) -> Walk:
        """A stream that is live and not walked yet."""
        self.walks.append(Walk(self.app, {"messages": MESSAGES, **body}))
        return self.walks[-1]


class Walk:
    """A server that walks one response, step by step."""

    def __init__(self, app: flask.Flask, body: Any, **headers: str) -> None:
        self.started: list[tuple[str, dict[str, str]]] = []
        self.contexts: list[bool] = []
        builder = EnvironBuilder(path=STREAM, method="POST", json=body, headers=headers)
        self.iterable: Any = app.wsgi_app(builder.get_environ(), self._start)

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.started.append((status, dict(headers)))
        self.contexts.append(flask.has_app_context() or flask.has_request_context())

    def next(self) -> bytes:
        return next(self.iterable, b"")

    def close(self) -> None:
        self.iterable.close()


@pytest.fixture
def chat() -> Iterator[Callable[..., Chat]]:
    """Makes an app: settings by name, `identify`, and `app` for one that has things already."""
    made: list[Chat] = []

    def make(
        app: flask.Flask | None = None, identify: Callable[[], Any] | None = None, **settings: Any
    ) -> Chat:
        app = app or flask.Flask("host")
        app.config.from_mapping({f"CHATSTREAM_{key}": value for key, value in settings.items()})
        made.append(Chat(app, identify))
        return made[-1]

    yield make
    for one in made:
        for walk in one.walks:
            walk.close()
        one.service.stop()
        eventually(lambda one=one: len(one.service.registry) == 0, "slots given back")


@pytest.fixture
def provider() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def answers(provider: responses.RequestsMock) -> responses.RequestsMock:
    """A provider that answers with one event and `[DONE]`."""
    provider.post(URL, body=EVENT + DONE, content_type="text/event-stream")
    return provider


MakeChat = Callable[..., Chat]


def assert_refused(response: TestResponse, status: int, reason: str) -> None:
    """The shape of every refusal before the first byte."""
    assert (response.status_code, response.json["reason"]) == (status, reason)  # type: ignore[index]
    assert response.json["ok"] is False  # type: ignore[index]
    assert set(response.json) == {"ok", "reason", "message"}  # type: ignore[arg-type]
    assert response.json["message"].endswith((".", "-", ")"))  # type: ignore[index]
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert "X-Accel-Buffering" not in response.headers


# The answer


def test_the_headers_of_an_answer(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """An event stream that no cache keeps and no proxy holds back, with both names on it."""
    response = chat().post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    assert response.status == "200 OK"
    assert response.content_type.partition(";")[0] == "text/event-stream"
    assert response.headers["X-Session-Id"] == "s-1"
    assert response.headers["X-Stream-Id"] == "t-1"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers


def test_names_are_made_up(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """A caller that names nothing gets two fresh names, which have the form of names."""
    c = chat()
    seen = [c.post().headers for _ in range(2)]
    names = {headers[name] for headers in seen for name in ("X-Session-Id", "X-Stream-Id")}
    assert len(names) == 4
    assert all(name.isalnum() and len(name) >= 32 for name in names)


def test_null_is_no_name(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """An id of null is as none, and is not forwarded either."""
    response = chat().post({"messages": MESSAGES, "sessionId": None, "streamId": None})
    assert response.status_code == 200
    assert "sessionId" not in json.loads(answers.calls[0].request.body)


RELAYED = {
    "events": (EVENT + EVENT + DONE, EVENT + EVENT + DONE),
    "comments": (b": keep-alive\n\n" + EVENT + b": x\n\n" + DONE,) * 2,
    "CRLF": (EVENT.replace(b"\n", b"\r\n") + DONE.replace(b"\n", b"\r\n"),) * 2,
    "names and ids": (b"id: 7\nevent: delta\nretry: 9\ndata:  x \n\n" + DONE,) * 2,
    "after done": (EVENT + DONE + EVENT, EVENT + DONE),
    "not UTF-8": (b"data: \xff\xfe\x00\n\n" + DONE,) * 2,
    "provider's error": (b'data: {"error":{"message":"overloaded"}}\n\n',) * 2,
}


@pytest.mark.parametrize(("sent", "relayed"), RELAYED.values(), ids=RELAYED)
def test_events_are_relayed_byte_for_byte(
    chat: MakeChat, provider: responses.RequestsMock, sent: bytes, relayed: bytes
) -> None:
    """What the provider sends is what the client gets, up to the terminal event."""
    provider.post(URL, body=sent, content_type="text/event-stream")
    assert chat().post().data == relayed


def test_a_truncated_answer_ends_with_one_error_event(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """Whole events, no half one, and then what went wrong."""
    provider.post(URL, body=EVENT + b"data: half", content_type="text/event-stream")
    data = chat().post().data
    assert data.startswith(EVENT + b"event: error\ndata: {")
    error = json.loads(data.removeprefix(EVENT + b"event: error\ndata: "))["error"]
    assert (error["code"], error["type"]) == ("upstream_truncated", "upstream_error")
    assert set(error) == {"message", "type", "code"}


# What the provider gets


def forwarded(answers: responses.RequestsMock) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(answers.calls[0].request.body)
    return value


def test_other_fields_are_forwarded_as_they_are(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """All but the two ids goes to the provider, in its order, with its own types."""
    body = {
        "model": "m-1",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "é 漢 🙂 \u2028"}]}],
        "temperature": 0.1,
        "max_tokens": 12345678901234567890,
        "stop": None,
        "tools": [{"nested": {"deep": [True, False, 1e-7]}}],
        "stream": True,
    }
    chat().send(json.dumps({"sessionId": "s", **body, "streamId": "t"}).encode())
    assert forwarded(answers) == body
    assert list(forwarded(answers)) == list(body)
    assert answers.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("given", [{}, {"stream": False}, {"stream": None}, {"stream": "no"}])
def test_stream_is_forced(
    chat: MakeChat, answers: responses.RequestsMock, given: dict[str, Any]
) -> None:
    """The provider is always asked to stream."""
    chat().post({"messages": MESSAGES, **given})
    assert forwarded(answers)["stream"] is True


@pytest.mark.parametrize(
    ("given", "model"),
    [({}, "house-model"), ({"model": None}, "house-model"), ({"model": "mine"}, "mine")],
)
def test_the_model_has_a_default(
    chat: MakeChat, answers: responses.RequestsMock, given: dict[str, Any], model: str
) -> None:
    """A request that names no model gets the configured one."""
    chat(MODEL="house-model").post({"messages": MESSAGES, **given})
    assert forwarded(answers)["model"] == model


@pytest.mark.parametrize(
    ("usage", "given", "options"),
    [
        ("0", {}, None),
        ("0", {"stream_options": {"x": 1}}, {"x": 1}),
        ("1", {}, {"include_usage": True}),
        ("1", {"stream_options": {"x": 1}}, {"x": 1, "include_usage": True}),
        ("1", {"stream_options": None}, {"include_usage": True}),
    ],
)
def test_usage_is_asked_for_only_when_set(
    chat: MakeChat,
    answers: responses.RequestsMock,
    usage: str,
    given: dict[str, Any],
    options: dict[str, Any] | None,
) -> None:
    """stream_options is the caller's own, unless CHATSTREAM_INCLUDE_USAGE adds to it."""
    chat(INCLUDE_USAGE=usage).post({"messages": MESSAGES, **given})
    assert forwarded(answers).get("stream_options") == options


# Refusals


def with_messages(more: str) -> bytes:
    return b'{"messages":[{"role":"user"}],%s}' % more.encode()


BAD_JSON = {
    "nothing": b"",
    "no JSON": b"{messages: []}",
    "single quotes": b"{'messages': []}",
    "cut off": b'{"messages": [',
    "two values": b'{"messages":[{"role":"user"}]} {}',
    "a list": b'[{"role":"user"}]',
    "a text": b'"messages"',
    "null": b"null",
    "NaN": with_messages('"temperature":NaN'),
    "Infinity": with_messages('"temperature":Infinity'),
    "-Infinity": with_messages('"temperature":-Infinity'),
    "1e999": with_messages('"temperature":1e999'),
    "-1e999 deeper": with_messages('"a":[{"b":-1e999}]'),
    "half a surrogate pair": with_messages(r'"user":"\ud800"'),
    "half a pair as a name": with_messages(r'"\udfff":1'),
    "deep nesting": b"[" * 100_000,
    "deep nesting in a field": with_messages('"a":' + "[" * 100_000 + "]" * 100_000),
    "a number too long": with_messages('"n":' + "1" * 5000),
    "not UTF-8": b'{"messages":[{"role":"\xff"}]}',
    "UTF-16": '{"messages":[{"role":"user"}]}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + with_messages('"a":1'),
}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(chat: MakeChat, provider: responses.RequestsMock, data: bytes) -> None:
    """What is no JSON object in UTF-8, or holds what JSON cannot carry, is a 400."""
    c = chat()
    assert_refused(c.send(data), 400, "bad_json")
    assert len(c.service.registry) == 0
    assert len(provider.calls) == 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": []},
        {"messages": {}},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [{}]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": None}]},
        {"messages": [{"role": 7}]},
        {"messages": [{"role": "user"}, []]},
    ],
    ids=str,
)
def test_bad_messages(chat: MakeChat, provider: responses.RequestsMock, body: Any) -> None:
    """messages has to be a non-empty list of objects with a role."""
    assert_refused(chat().post(body), 400, "bad_messages")
    assert len(provider.calls) == 0


BAD_IDS = [
    "",
    "x" * 129,
    "a b",
    "a/b",
    "a\n",
    "\na",
    "ä",
    "٣",
    "a,b",
    "..%2f",
    7,
    True,
    [],
    {"a": 1},
]


@pytest.mark.parametrize("name", ["sessionId", "streamId"])
@pytest.mark.parametrize("value", BAD_IDS, ids=repr)
def test_bad_ids(chat: MakeChat, provider: responses.RequestsMock, name: str, value: Any) -> None:
    """A name has 1 to 128 of few characters, or is refused; the sentence says which one."""
    response = chat().post({"messages": MESSAGES, name: value})
    assert_refused(response, 400, "bad_id")
    assert name in response.json["message"]  # type: ignore[index]
    assert len(provider.calls) == 0


@pytest.mark.parametrize("name", ["sessionId", "streamId"])
@pytest.mark.parametrize("value", ["a", "x" * 128, "A-Z_a.z:09", "..", "-"])
def test_good_ids(chat: MakeChat, answers: responses.RequestsMock, name: str, value: str) -> None:
    """The whole range of good names is taken, and given back in its header."""
    response = chat().post({"messages": MESSAGES, name: value})
    header = {"sessionId": "X-Session-Id", "streamId": "X-Stream-Id"}[name]
    assert (response.status_code, response.headers[header]) == (200, value)


METHODS = ["GET", "PUT", "PATCH", "DELETE", "TRACE", "PURGE"]


@pytest.mark.parametrize("path", [STREAM, f"{CANCEL}/s-1", f"{CANCEL}/", CANCEL, f"{CANCEL}/a/b"])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods(chat: MakeChat, method: str, path: str) -> None:
    """Any other method, unknown ones too, is our JSON 405 with Allow, not the app's page."""
    environ = EnvironBuilder(path=path).get_environ()
    environ["REQUEST_METHOD"] = method
    response = chat().client.open(environ)
    assert_refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "OPTIONS, POST"


@pytest.mark.parametrize("path", [STREAM, f"{CANCEL}/s-1"])
def test_head_is_refused_without_a_body(chat: MakeChat, path: str) -> None:
    """HEAD gets the 405's headers only."""
    response = chat().client.head(path)
    assert (response.status_code, response.data) == (405, b"")


@pytest.mark.parametrize("path", [STREAM, f"{CANCEL}/s-1"])
def test_options(chat: MakeChat, path: str) -> None:
    """OPTIONS is answered: 204, and what is allowed."""
    response = chat().client.options(path)
    assert (response.status_code, response.data) == (204, b"")
    assert response.headers["Allow"] == "OPTIONS, POST"


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"],
)
def test_other_media_types(
    chat: MakeChat, provider: responses.RequestsMock, content_type: str | None
) -> None:
    """Only JSON that says so: what a foreign page's form can send is a 415."""
    response = chat().send(json.dumps({"messages": MESSAGES}).encode(), content_type)
    assert_refused(response, 415, "unsupported_media_type")
    assert len(provider.calls) == 0


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_by_its_other_spellings(
    chat: MakeChat, answers: responses.RequestsMock, content_type: str
) -> None:
    """Parameters and case do not matter."""
    response = chat().send(json.dumps({"messages": MESSAGES}).encode(), content_type)
    assert response.status_code == 200


def body_of(length: int) -> bytes:
    """A good request of exactly `length` bytes."""
    return with_messages('"user":"' + "x" * (length - 40) + '"')


class Unreadable(io.RawIOBase):
    """A body that must not be read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise AssertionError("read")


def test_the_longest_body(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """Exactly CHATSTREAM_MAX_BODY bytes pass; one more is a 413."""
    c = chat(MAX_BODY="500")
    assert len(body_of(500)) == 500
    assert c.send(body_of(500)).status_code == 200
    assert_refused(c.send(body_of(501)), 413, "too_large")


def test_an_announced_body_too_long_is_not_read(chat: MakeChat) -> None:
    """A Content-Length over the bound is enough."""
    response = chat(MAX_BODY="500").client.post(
        STREAM,
        content_type="application/json",
        environ_overrides={"wsgi.input": Unreadable(), "CONTENT_LENGTH": "501"},
    )
    assert_refused(response, 413, "too_large")


class Endless(Unreadable):
    """A body that does not end; counts what was read of it."""

    taken = 0

    def readinto(self, buffer: Any) -> int:
        self.taken += len(buffer)
        assert self.taken < 10_000_000
        buffer[:] = b" " * len(buffer)
        return len(buffer)


def test_an_endless_body_is_not_read_to_its_end(chat: MakeChat) -> None:
    """A body without a Content-Length is read as far as it may be long, and no further."""
    response = chat(MAX_BODY="500").client.post(
        STREAM,
        content_type="application/json",
        environ_overrides={"wsgi.input": Endless(), "wsgi.input_terminated": True},
    )
    assert_refused(response, 413, "too_large")


@pytest.mark.parametrize(("length", "status"), [(500, 200), (501, 413), (5000, 413)])
def test_a_chunked_body_is_measured(
    chat: MakeChat, answers: responses.RequestsMock, length: int, status: int
) -> None:
    """A body without a Content-Length is counted as it is read."""
    response = chat(MAX_BODY="500").client.post(
        STREAM,
        input_stream=io.BytesIO(body_of(length)),
        content_type="application/json",
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
        buffered=True,
    )
    assert response.status_code == status
    if status == 413:
        assert_refused(response, 413, "too_large")


def test_the_apps_own_limit_is_a_413_of_ours(chat: MakeChat) -> None:
    """Flask's MAX_CONTENT_LENGTH raises inside our view, and still is JSON."""
    app = flask.Flask("host")
    app.config["MAX_CONTENT_LENGTH"] = 100
    assert_refused(chat(app).send(body_of(200)), 413, "too_large")


@pytest.mark.parametrize(("length", "status"), [(500, 200), (501, 413)])
def test_a_body_that_the_app_has_read_already(
    chat: MakeChat, answers: responses.RequestsMock, length: int, status: int
) -> None:
    """A before_request of the app's may look at the body: it is ours to read all the same."""
    app = flask.Flask("host")
    app.before_request(lambda: flask.request.get_data() and None)
    assert chat(app, MAX_BODY="500").send(body_of(length)).status_code == status


def test_a_body_that_breaks_off(chat: MakeChat) -> None:
    """Fewer bytes than announced are a 400, not the app's."""
    response = chat().client.post(
        STREAM,
        input_stream=io.BytesIO(body_of(200)[:100]),
        content_type="application/json",
        content_length=200,
    )
    assert_refused(response, 400, "bad_json")


def test_a_body_that_breaks_off_where_it_could_end(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """What came may be whole JSON, and is not what was announced. Some servers just end it."""
    response = chat().client.post(
        STREAM,
        content_type="application/json",
        environ_overrides={
            "wsgi.input": io.BytesIO(body_of(200)),
            "wsgi.input_terminated": True,
            "CONTENT_LENGTH": "300",
        },
    )
    assert_refused(response, 400, "bad_json")
    assert len(provider.calls) == 0


class Faulty(Unreadable):
    """A body in which the server finds a fault, after what has come before."""

    def __init__(self, before: bytes, error: Exception) -> None:
        self.before, self.error = before, error

    def readinto(self, buffer: Any) -> int:
        piece, self.before = self.before, b""
        if not piece:
            raise self.error
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize(
    "error", [OSError("bad chunk size"), ConnectionResetError(), Exception("bad trailer")], ids=repr
)
@pytest.mark.parametrize("before", [b"", with_messages('"a":1')], ids=["at once", "at the end"])
def test_a_body_in_which_the_server_finds_a_fault(
    chat: MakeChat, provider: responses.RequestsMock, before: bytes, error: Exception
) -> None:
    """Chunks that are none, a reset: each server raises what it likes. A 400, and no traceback."""
    response = chat().client.post(
        STREAM,
        content_type="application/json",
        environ_overrides={"wsgi.input": Faulty(before, error), "wsgi.input_terminated": True},
    )
    assert_refused(response, 400, "bad_json")


class Slow(Unreadable):
    """A body that comes byte by byte: each read gives one."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readinto(self, buffer: Any) -> int:
        piece = self.data.read(1)
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("headers", [{}, {"CONTENT_LENGTH": "200"}], ids=["chunked", "length"])
def test_a_body_that_comes_in_pieces(
    chat: MakeChat, answers: responses.RequestsMock, headers: dict[str, str]
) -> None:
    """A server's `read` may return less than it was asked for: the body goes on all the same."""
    response = chat().client.post(
        STREAM,
        content_type="application/json",
        environ_overrides={
            "wsgi.input": Slow(body_of(200)),
            "wsgi.input_terminated": True,
            **headers,
        },
        buffered=True,
    )
    assert response.status_code == 200


def test_a_full_worker_is_busy(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """With every slot taken: 503 `busy` with Retry-After, until one is free again."""
    c = chat(MAX_STREAMS="1")
    walk = c.open()
    response = c.post()
    assert_refused(response, 503, "busy")
    assert response.headers["Retry-After"] == "1"
    walk.close()
    assert c.post().status_code == 200


def test_a_live_stream_id_is_a_conflict(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """409 while a stream of that name is live, in whatever session; afterwards it is free."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t")
    assert_refused(c.post({"messages": MESSAGES, "streamId": "t"}), 409, "conflict")
    walk.close()
    assert c.post({"messages": MESSAGES, "streamId": "t"}).status_code == 200


def test_a_live_session_is_a_conflict_where_so_set(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """CHATSTREAM_ON_CONFLICT=reject: the second stream of a session is a 409, the first lives."""
    c = chat(ON_CONFLICT="reject")
    walk = c.open(sessionId="s-1")
    assert_refused(c.post({"messages": MESSAGES, "sessionId": "s-1"}), 409, "conflict")
    assert b"".join(walk.iterable) == EVENT + DONE
    walk.close()


# The provider's faults, before the first byte

FAULTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "500": ({"status": 500}, 502, "upstream_error"),
    "401": ({"status": 401, "body": f'{{"error":"{KEY}"}}'}, 502, "upstream_auth"),
    "429": ({"status": 429, "headers": {"Retry-After": "7"}}, 429, "upstream_rate_limited"),
    "400": ({"status": 400, "json": {"error": {"message": "No."}}}, 400, "upstream_rejected"),
    "302": ({"status": 302, "headers": {"Location": "/x"}}, 502, "upstream_not_stream"),
    "HTML": ({"body": "<html>", "content_type": "text/html"}, 502, "upstream_not_stream"),
    "unreachable": ({"body": requests.ConnectionError("x")}, 502, "upstream_unreachable"),
    "no connection": ({"body": requests.ConnectTimeout("x")}, 502, "upstream_connect"),
    "no answer": ({"body": requests.ReadTimeout("x")}, 504, "upstream_timeout"),
    "a bug": ({"body": RuntimeError(KEY)}, 502, "upstream_error"),
}


@pytest.mark.parametrize(("answer", "status", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_provider_that_refuses_has_a_true_status(
    chat: MakeChat,
    provider: responses.RequestsMock,
    answer: dict[str, Any],
    status: int,
    reason: str,
) -> None:
    """Before the first byte a fault is a refusal like ours: status, JSON, nothing of the stream."""
    provider.post(URL, **answer)
    response = chat().post()
    assert_refused(response, status, reason)
    assert int(response.headers["Content-Length"]) == len(response.data)
    assert KEY.encode() not in response.data
    assert response.headers.get("Retry-After") == ("7" if status == 429 else None)
    if reason == "upstream_rejected":
        assert response.json["message"] == "No."  # type: ignore[index]


# Cancel


def assert_not_found(response: TestResponse) -> None:
    assert response.status_code == 404
    assert response.json == {"ok": False, "reason": "not_found"}
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"


def test_a_cancel_stops_the_stream(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """200 and `cancelled`; the stream's body ends empty and properly; the next cancel is a 404."""
    c = chat()
    walk = c.open(sessionId="s-1")
    response = c.cancel("/s-1")
    assert (response.status_code, response.json) == (200, {"ok": True, "cancelled": True})
    assert response.headers["Cache-Control"] == "no-store"
    assert_not_found(c.cancel("/s-1"))
    assert walk.next() == b""
    assert walk.started[0][0] == "200 OK"
    assert walk.started[0][1]["X-Session-Id"] == "s-1"
    assert walk.started[0][1]["Content-Type"].startswith("text/event-stream")
    walk.close()
    assert len(answers.calls) == 0


@pytest.mark.parametrize("query", ["?streamId=t-1", "?streamId=t-1&streamId=t-2", "?x=1"])
def test_a_cancel_may_name_the_stream(chat: MakeChat, query: str) -> None:
    """With its own streamId a stream is found; an unknown argument does not matter."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t-1")
    assert c.cancel(f"/s-1{query}").status_code == 200
    walk.close()


@pytest.mark.parametrize("query", ["x=\xff", "\xff&streamId=t-1", "=&&&=\x80"])
def test_a_cancels_query_may_hold_any_bytes(chat: MakeChat, query: str) -> None:
    """Bytes that are no UTF-8, which werkzeug raises for, do not keep a cancel from its stream."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t-1")
    environ = EnvironBuilder(path=f"{CANCEL}/s-1", method="POST").get_environ()
    run = run_wsgi_app(c.app, {**environ, "QUERY_STRING": query})
    assert run[1] == "200 OK"
    walk.close()


NOT_FOUND = [
    "",
    "/",
    "//",
    "///s-1",
    "//s-1",
    "/s-1/",
    "/s-1//",
    "/s-1/t-1",
    "/s-",
    "/s-11",
    "/S-1",
    "/other",
    "/%20s-1",
    "/s-1%20",
    "/s-1%0A",
    "/%0A",
    "/s-1%00",
    "/s%2F1",
    "/%2Fs-1",
    "/s-1%3FstreamId",
    "/%C3%A4",
    "/%FF",
    "/" + "x" * 129,
    "/" + "x" * 5000,
    "/s-1?streamId=",
    "/s-1?streamId=t-2",
    "/s-1?streamId=t",
    "/s-1?streamId=t-11",
    "/s-1?streamId=t-1%0A",
    "/s-1?streamId=%FF",
    "/s-1?streamId=" + "x" * 129,
    "/t-1?streamId=t-1",
    "/other?streamId=t-1",
]


@pytest.mark.parametrize("path", NOT_FOUND, ids=lambda path: path[:40])
def test_a_cancel_that_finds_nothing(chat: MakeChat, path: str) -> None:
    """Case 20: unknown, malformed, a prefix: the same 404, JSON, and nothing is stopped."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t-1")
    assert_not_found(c.cancel(path))
    assert c.cancel("/s-1?streamId=t-1").status_code == 200
    walk.close()


def test_the_404_is_the_same_for_finished_and_unknown(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """Whether a stream has been is not to be learned."""
    c = chat()
    c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    found = [c.cancel(path) for path in ("/s-1", "/s-1?streamId=t-1", "/x", "/x?streamId=y")]
    assert len({(r.status, r.data, str(r.headers)) for r in found}) == 1
    assert_not_found(found[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"json": {"any": "thing"}},
        {"data": b"\xff not JSON", "content_type": "application/json"},
        {"data": b"x" * 2_000_000},
        {"environ_overrides": {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "9" * 12}},
    ],
    ids=["none", "JSON", "malformed", "huge", "unread"],
)
def test_a_cancels_body_is_ignored(chat: MakeChat, options: dict[str, Any]) -> None:
    """Case 26: a cancel works with any body or none, and does not read it."""
    c = chat()
    walk = c.open(sessionId="s-1")
    assert c.cancel("/s-1", **options).status_code == 200
    walk.close()


def test_a_cancel_works_in_a_full_worker(chat: MakeChat) -> None:
    """Case 25: a cancel takes no stream slot."""
    c = chat(MAX_STREAMS="1")
    walk = c.open(sessionId="s-1")
    assert c.cancel("/s-1").status_code == 200
    walk.close()


def test_a_cancel_that_comes_first(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """Case 19: 404, and remembered: its stream gets 200, an empty body, and no provider."""
    c = chat()
    assert_not_found(c.cancel("/s-1?streamId=t-1"))
    response = c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers["X-Stream-Id"] == "t-1"
    assert len(answers.calls) == 0
    assert c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"}).data == (
        EVENT + DONE
    )


def test_a_late_cancel_does_not_stop_the_next_stream(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """Case 22: a Stop for the first answer that arrives in the second finds nothing."""
    c = chat()
    c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    walk = c.open(sessionId="s-1", streamId="t-2")
    assert_not_found(c.cancel("/s-1?streamId=t-1"))
    assert b"".join(walk.iterable) == EVENT + DONE
    walk.close()


class OtherWorkers(LocalBus):
    """A bus to workers that answer neither a cancel nor a claim."""

    def __init__(self, service: Service, error: Exception) -> None:
        super().__init__(service._neighbours.receive)
        self.error = error
        service._neighbours.bus, service._neighbours.joined = self, os.getpid()

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        raise self.error

    def _others(self) -> list[Worker]:
        if isinstance(self.error, Unconfirmed):
            return [Worker("silent", 1, "host")]
        raise self.error

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        return dict.fromkeys(enquiries)

    def check(self) -> None:
        raise self.error

    def cancel_elsewhere(self, request: Request) -> bool:
        raise self.error


UNSURE = [
    (Unconfirmed(), 504, b'{"ok": false, "reason": "unconfirmed"}'),
    (BusUnavailable(), 503, b'{"ok": false, "reason": "bus_unavailable"}'),
    (OSError("the bus is broken"), 503, b'{"ok": false, "reason": "bus_unavailable"}'),
]


@pytest.mark.parametrize(("error", "status", "body"), UNSURE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("path", ["/s-1", "/s-1?streamId=t-1"])
def test_a_cancel_of_which_nothing_can_be_said(
    chat: MakeChat, error: Exception, status: int, body: bytes, path: str
) -> None:
    """Neither 200 nor 404: a 504 where its worker hangs, a 503 where nobody can be asked."""
    c = chat()
    OtherWorkers(c.service, error)
    response = c.cancel(path)
    assert (response.status_code, response.data) == (status, body)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"


def test_a_malformed_cancel_asks_nobody(chat: MakeChat) -> None:
    """It can be no stream's: a 404, however the bus is."""
    c = chat()
    OtherWorkers(c.service, BusUnavailable())
    assert_not_found(c.cancel("/s%201"))
    assert_not_found(c.cancel("/s-1?streamId="))


def test_a_stream_that_other_workers_keep_from_starting(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """Streams of its session are in workers that hang: a 504 like every refusal, no call."""
    c = chat()
    OtherWorkers(c.service, Unconfirmed())
    assert_refused(c.post(), 504, "unconfirmed")
    assert len(provider.calls) == 0
    assert len(c.service.registry) == 0


def test_a_bus_that_cannot_start(
    chat: MakeChat, answers: responses.RequestsMock, short_base: Path
) -> None:
    """Streams are relayed, this worker's are stopped, and for another's the answer is a 503."""
    c = chat(BUS=f"unix://{short_base}")
    service_directory(short_base, "x", "0").parent.touch()  # where the user's directory should be
    assert c.post().data == EVENT + DONE
    response = c.cancel("/s-1")
    assert (response.status_code, response.json) == (
        503,
        {"ok": False, "reason": "bus_unavailable"},
    )
    walk = c.open(sessionId="s-1")
    assert c.cancel("/s-1").status_code == 200
    assert walk.next() == b""


def test_of_many_cancels_one_is_told_that_it_stopped(chat: MakeChat) -> None:
    """Case 21: N cancels at once: one 200, the others 404."""
    c = chat()
    walk = c.open(sessionId="s-1")
    barrier, codes = threading.Barrier(8), []

    def cancel() -> None:
        barrier.wait(5)
        codes.append(c.app.test_client().post(f"{CANCEL}/s-1").status_code)

    threads = [threading.Thread(target=cancel) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(codes) == [200] + [404] * 7
    walk.close()


def test_a_second_post_supersedes(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """The same session again: the first stream ends silently, the second runs to its end."""
    c = chat()
    first = c.open(sessionId="s-1")
    assert c.post({"messages": MESSAGES, "sessionId": "s-1"}).data == EVENT + DONE
    assert first.next() == b""
    assert first.started[0][0] == "200 OK"
    first.close()


# Callers


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


def both_routes(c: Chat) -> list[TestResponse]:
    return [c.post(), c.cancel("/s-1")]


def test_nobody_is_a_401(chat: MakeChat, provider: responses.RequestsMock) -> None:
    """A caller without a name: our 401, on both routes."""
    for response in both_routes(chat(identify=lambda: None)):
        assert_refused(response, 401, "unauthenticated")
    assert len(provider.calls) == 0


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
    for response in both_routes(chat(identify=answer)):
        assert (response.status_code, response.headers["Location"]) == (302, "/login")


def test_identifys_exception_is_the_apps(chat: MakeChat) -> None:
    """`abort(403)` in identify reaches the app's own error handler."""
    app = flask.Flask("host")
    app.register_error_handler(403, lambda error: ("the app's own", 403))
    for response in both_routes(chat(app, identify=lambda: flask.abort(403))):
        assert (response.status_code, response.data) == (403, b"the app's own")


@pytest.mark.parametrize("value", [True, 1.5, b"me", ["me"], object()], ids=lambda v: str(type(v)))
def test_a_name_of_another_kind_is_a_mistake(chat: MakeChat, value: Any) -> None:
    """What is no name is told to the developer, not taken for one."""
    c = chat(identify=lambda: value)
    c.app.testing = True
    for call in (c.post, lambda: c.cancel("/s-1")):
        with pytest.raises(TypeError, match="identify must return"):
            call()


# The host app


def test_a_hosts_error_pages_do_not_replace_refusals(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """With the app's errorhandler(HTTPException) each of our refusals is still ours."""
    app = flask.Flask("host")
    app.register_error_handler(HTTPException, lambda error: ("<h1>html</h1>", error.code))
    app.register_error_handler(Exception, lambda error: ("<h1>html</h1>", 500))
    provider.post(URL, status=429)
    c = chat(app, MAX_BODY="500", identify=lambda: "me")
    assert_refused(c.client.get(STREAM), 405, "method_not_allowed")
    assert_refused(c.client.delete(f"{CANCEL}/x"), 405, "method_not_allowed")
    assert_refused(c.send(b"{"), 400, "bad_json")
    assert_refused(c.send(body_of(501)), 413, "too_large")
    assert_refused(c.send(b"{}", "text/plain"), 415, "unsupported_media_type")
    assert_refused(c.post(), 429, "upstream_rate_limited")
    assert_not_found(c.cancel("/x"))
    assert_not_found(c.cancel("//x"))
    assert c.client.get("/elsewhere").data == b"<h1>html</h1>"


def test_no_context_is_held_while_it_streams(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """The app's contexts are torn down before the provider is called: its connections are free."""
    app = flask.Flask("host")
    torn_down: list[int] = []
    app.teardown_appcontext(lambda error: torn_down.append(len(answers.calls)))
    walk = chat(app).open()
    assert torn_down == [0]
    assert walk.started == []
    assert walk.next() == EVENT + DONE
    assert walk.contexts == [False]
    assert not flask.has_app_context()
    assert len(answers.calls) == 1
    walk.close()


def test_start_response_is_called_once_before_the_first_bytes(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """PEP 3333: status and headers are begun by the first `next`, and by no later one."""
    walk = chat().open()
    assert walk.started == []
    assert walk.next() == EVENT + DONE
    assert [walk.next(), walk.next()] == [b"", b""]
    assert len(walk.started) == 1
    walk.close()


def test_a_response_that_the_app_replaces_gives_its_slot_back(
    chat: MakeChat, provider: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An after_request of the app's that raises, or answers otherwise, leaves no stream behind."""
    app = flask.Flask("host")
    replaces: list[Callable[[Any], Any]] = [lambda response: 1 // 0]

    @app.after_request
    def after(response: Any) -> Any:
        return replaces[0](response)

    c = chat(app)
    # pytest keeps the records, their tracebacks, and so the response.
    monkeypatch.setattr(app.logger, "disabled", True)
    assert c.post().status_code == 500
    gc.collect()
    assert len(c.service.registry) == 0
    replaces[0] = lambda response: flask.Response("other")
    assert c.post().data == b"other"
    gc.collect()
    assert len(c.service.registry) == 0
    assert len(provider.calls) == 0


def test_an_after_request_may_add_headers(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """The app's own headers are on the answer, and on a refusal of the provider's."""
    app = flask.Flask("host")

    @app.after_request
    def after(response: flask.Response) -> flask.Response:
        response.headers["X-App"] = "1"
        return response

    c = chat(app)
    assert c.post().headers["X-App"] == "1"
    answers.reset()
    answers.post(URL, status=500)
    response = c.post()
    assert_refused(response, 502, "upstream_error")
    assert response.headers["X-App"] == "1"


@pytest.fixture
def guarded(chat: MakeChat) -> Chat:
    """An app with Flask-WTF's CSRFProtect and a route that gives a token."""
    app = flask.Flask("host")
    app.config.update(SECRET_KEY="x", WTF_CSRF_ENABLED=True)
    app.extensions["guard"] = CSRFProtect(app)
    app.add_url_rule("/token", view_func=generate_csrf)
    return chat(app)


def test_csrf_protection_covers_the_routes(guarded: Chat, provider: responses.RequestsMock) -> None:
    """Under CSRFProtect a POST without a token is the app's 400, before anything is opened."""
    assert [response.status_code for response in both_routes(guarded)] == [400, 400]
    assert len(provider.calls) == 0


def test_csrf_token(guarded: Chat, answers: responses.RequestsMock) -> None:
    """With the token in its header both routes work."""
    headers = {"X-CSRFToken": guarded.client.get("/token").text}
    assert guarded.post(headers=headers).data == EVENT + DONE
    assert_not_found(guarded.cancel("/s-1", headers=headers))


def test_csrf_exemption(guarded: Chat, answers: responses.RequestsMock) -> None:
    """The blueprint can be exempted as docs/mount.md says."""
    guarded.app.extensions["guard"].exempt(guarded.app.blueprints["chatstream"])
    assert guarded.post().data == EVENT + DONE
    assert_not_found(guarded.cancel("/s-1"))


def test_quoted_ids_are_the_same_ids(chat: MakeChat) -> None:
    """A client that percent-encodes the allowed `:` names the same session."""
    c = chat()
    walk = c.open(sessionId="a:b")
    assert c.cancel("/" + quote("a:b", safe="")).status_code == 200
    walk.close()
