"""request: names, query, JSON, and bodies of every length and fault."""

from __future__ import annotations

import io
import json
from typing import Any
from urllib.parse import quote

import flask
import pytest
import responses

from tests.web.chat import (
    MESSAGES,
    STREAM,
    MakeChat,
    Unreadable,
    assert_refused,
    body_of,
    with_messages,
)


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


def test_quoted_ids_are_the_same_ids(chat: MakeChat) -> None:
    """A client that percent-encodes the allowed `:` names the same session."""
    c = chat()
    walk = c.open(sessionId="a:b")
    assert c.cancel("/" + quote("a:b", safe="")).status_code == 200
    walk.close()
