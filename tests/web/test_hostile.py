"""Hostile requests to the routes, in this process: whatever comes, the answer is of the wire's.

An exception that a route lets out is raised here, and not made a 500. The provider is well and
slots are free, so no 5xx is right. First comes what schemathesis makes of the app's own document,
then what no client that speaks HTTP would send. Over real sockets: integration/test_hostile.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flask
import pytest
import responses
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from requests import PreparedRequest
from werkzeug.test import EnvironBuilder, run_wsgi_app
from werkzeug.wrappers import Response

from chatstream.stream.stream import ID
from tests.web.openapi.scenes import (
    CANCELS,
    COMPLETED,
    COMPLETIONS,
    MODELS_URL,
    PREFIX,
    STREAM,
    STREAMS,
    URL,
    app,
    assert_as_documented,
    service_of,
)

ANSWER = b'data: {"choices":[]}\n\ndata: [DONE]\n\n'
WHOLE = b'{"choices":[]}'
KEY = "sk-of-the-tests"
MESSAGES = [{"role": "user"}]

fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass
class World:
    """An app with the routes in it, and its provider."""

    app: flask.Flask
    provider: responses.RequestsMock

    def post(self, path: str, **environ: Any) -> flask.Response:
        """POST with these things in the WSGI environ, as a server would put them there."""
        whole = EnvironBuilder(path="/", method="POST").get_environ()
        whole |= {"PATH_INFO": path, "wsgi.input_terminated": True, **environ}
        self.provider.calls.reset()
        # Not Flask's client, which would refuse to send such things.
        response = flask.Response(*run_wsgi_app(self.app, whole, buffered=True))
        assert len(service_of(self.app).registry) == 0, "a slot is kept"
        return response

    def stream(self, body: bytes, **environ: Any) -> flask.Response:
        """POST /stream, and the answer is one of the document's, and no fault of ours."""
        given = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        given |= {"CONTENT_TYPE": "application/json", **environ}
        response = self.post(f"{PREFIX}/stream", **given)
        assert response.status_code < 500
        assert_as_documented(STREAMS["post"], response)
        assert len(self.provider.calls) == (response.status_code == 200)
        if response.status_code == 200:
            assert response.data == ANSWER
            assert_untouched(self.request)
        return response

    @property
    def request(self) -> PreparedRequest:
        """What the provider got."""
        request: PreparedRequest = self.provider.calls[0].request
        return request


def assert_untouched(request: PreparedRequest) -> None:
    """Towards the provider, address and headers are ours alone, whoever asked and however."""
    assert (request.method, request.url) == ("POST", URL)
    headers = {name.lower(): value for name, value in request.headers.items()}
    assert headers == {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "user-agent": "chatstream",
        "connection": "keep-alive",
        "content-length": str(len(request.body or b"")),
        "authorization": f"Bearer {KEY}",
    }


host = app(API_KEY=KEY, MAX_BODY=20_000)
host.config["PROPAGATE_EXCEPTIONS"] = True


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as provider:
        for kind, body in (("text/event-stream", ANSWER), ("application/json", WHOLE)):
            wanted = responses.matchers.header_matcher({"Accept": kind})
            provider.post(URL, body=body, content_type=kind, match=[wanted])
        provider.get(MODELS_URL, json={"data": []})
        yield World(host, provider)
        service_of(host).stop()


# By the document

served = schemathesis.openapi.from_wsgi(f"{PREFIX}/openapi.json", host)


@served.parametrize()
@settings(fuzzed, max_examples=40, suppress_health_check=list(HealthCheck))
def test_the_routes_keep_to_their_document(case: schemathesis.Case, world: World) -> None:
    """Good requests are served, bad ones are refused; status, headers and JSON are as it says."""
    case.call_and_validate()
    assert len(service_of(world.app).registry) == 0, "a slot is kept"


# Bodies

text = st.text(max_size=20) | st.text(
    st.characters(categories=["Cs", "Cc", "Co", "Ll"]), max_size=9
)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, 1e308, -0.0])
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(st.dictionaries(text, values, max_size=2).map(lambda m: {**m, "role": "user"}))
fields = st.sampled_from(["messages", "model", "stream", "stream_options", "sessionId", "streamId"])
chats = st.dictionaries(fields | text, values, max_size=5).flatmap(
    lambda chat: (messages | values).map(lambda asked: {**chat, "messages": asked})
)


def encoded(value: Any, *, escaped: bool) -> bytes:
    return json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")


@fuzzed
@given(body=st.binary(max_size=200) | st.binary(max_size=50).map(lambda b: b'{"messages":' + b))
@example(b'{"a":' * 4_000)
@example(b"9" * 20_000)
@example(b'"' + b"\\" * 19_999)
@example(b"\0")
def test_any_bytes_as_a_body(world: World, body: bytes) -> None:
    """Bytes that are no chat are a 400; nobody is asked."""
    assert world.stream(body).status_code == 400


@fuzzed
@given(value=chats | values, escaped=st.booleans())
@example({"messages": MESSAGES, "a": "\ud800"}, False)
@example({"messages": MESSAGES, "a": "\r\nX-Injected: 1\r\n\r\n\0\u2028"}, False)
def test_any_json_as_a_body(world: World, value: Any, escaped: bool) -> None:
    """The provider gets the values that came, less the ids; what JSON cannot carry is a 400."""
    body = encoded(value, escaped=escaped)
    response = world.stream(body)
    if response.status_code == 200:
        came, sent = json.loads(body), json.loads(world.request.body or b"")
        model = came.get("model")
        forced = {"stream": True, "model": "deepseek-chat" if model is None else model}
        ours = ("sessionId", "streamId")
        assert sent == {key: came[key] for key in came if key not in ours} | forced
    else:
        assert response.status_code == 400


@fuzzed
@given(
    announced=st.sampled_from(["0", "-1", "+5", "5", " 7 ", "1e3", "٣", "", "x", "9" * 5000])
    | st.integers(0, 30_000).map(str),
    chunked=st.booleans(),
    terminated=st.booleans(),
)
def test_any_length_announced(
    world: World, announced: str, chunked: bool, terminated: bool
) -> None:
    """A Content-Length that is none, too short, too long or beside chunks: 200, or a refusal."""
    body = json.dumps({"messages": MESSAGES}).encode()
    environ = {"CONTENT_LENGTH": announced, "wsgi.input_terminated": terminated}
    if chunked:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    response = world.stream(body, **environ)
    assert response.status_code in (200, 400, 413)
    if announced == str(len(body)):
        assert response.status_code == 200


@fuzzed
@given(
    given_type=st.text(st.characters(max_codepoint=255), max_size=30)
    | st.text(st.sampled_from(" ;charset*0='\"\\=,%x\xff"), max_size=30).map(
        lambda text: f"application/json;{text}"
    )
)
@example("application/json; charset*=nothing''%ff")
@example("application/json; a*0=x; a*1*=''%zz")
@example("application/json;" * 1000)
def test_any_content_type(world: World, given_type: str) -> None:
    """JSON that says so is read; everything else is a 415."""
    body = json.dumps({"messages": MESSAGES}).encode()
    response = world.stream(body, CONTENT_TYPE=given_type)
    assert response.status_code in (200, 415)
    if response.status_code == 200:
        assert given_type.strip().lower().startswith("application/json")


# Names

names = text | st.from_regex(ID, fullmatch=True) | st.sampled_from(["a\n", "..", "x" * 129])


@fuzzed
@given(session=names | values, stream=names | values)
def test_any_ids(world: World, session: Any, stream: Any) -> None:
    """A name of the right form comes back in its header; any other is refused; none reaches out."""
    body = encoded({"messages": MESSAGES, "sessionId": session, "streamId": stream}, escaped=True)
    response = world.stream(body)
    if response.status_code == 200:
        for name, value in (("X-Session-Id", session), ("X-Stream-Id", stream)):
            assert response.headers[name] == value or value is None
            assert ID.fullmatch(response.headers[name])
        assert json.loads(world.request.body or b"").keys() == {"messages", "stream", "model"}
    else:
        assert response.status_code == 400


@settings(fuzzed, max_examples=60)
@given(session=names, stream=names, wanted=st.booleans())
def test_any_names_in_headers(world: World, session: str, stream: str, wanted: bool) -> None:
    """On OpenAI's route they are held against the same form, as a server decodes a header."""
    body = encoded({"messages": MESSAGES, "stream": wanted}, escaped=True)
    given_names = {"SESSION": session, "STREAM": stream}
    response = world.post(
        COMPLETIONS,
        **{"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))},
        CONTENT_TYPE="application/json",
        **{f"HTTP_X_{name}_ID": value for name, value in given_names.items()},
    )
    assert_as_documented(COMPLETED["post"], response)
    good = all(ID.fullmatch(value) for value in given_names.values())
    assert response.status_code == (200 if good else 400)
    if good:
        assert response.data == (ANSWER if wanted else WHOLE)
        assert (response.headers["X-Session-Id"], response.headers["X-Stream-Id"]) == (
            session,
            stream,
        )


@fuzzed
@given(
    path=st.text(st.characters(max_codepoint=255), max_size=60),
    query=st.text(st.characters(max_codepoint=255), max_size=60)
    | st.text(st.characters(max_codepoint=255), max_size=40).map(lambda text: f"streamId={text}"),
    separator=st.sampled_from(["", "/", "//", "/../", "/%2F"]),
)
@example(path="s", separator="/", query="&" * 20_000)
@example(path="s", separator="/", query="streamId=%ED%A0%80&streamId[]=%00")
def test_any_path_and_query(world: World, path: str, separator: str, query: str) -> None:
    """A cancel of whatever is a 404, as nothing is live. What is no cancel is the app's 404."""
    response = world.post(f"{PREFIX}/cancel{separator}{path}", QUERY_STRING=query)
    assert response.status_code == 404
    if separator.startswith("/") or not path or path.startswith("/"):
        assert_as_documented(CANCELS["post"], response)


@fuzzed
@given(path=st.text(st.characters(max_codepoint=255), max_size=30))
def test_no_other_path_is_ours(world: World, path: str) -> None:
    """`/stream` is that, and not what follows it."""
    response = world.post(f"{PREFIX}/stream{path}")
    assert response.status_code == (404 if path else 415)


# Headers

HEADERS = [
    "ACCEPT",
    "ACCEPT_ENCODING",
    "AUTHORIZATION",
    "CONNECTION",
    "CONTENT_ENCODING",
    "COOKIE",
    "EXPECT",
    "IF_NONE_MATCH",
    "LAST_EVENT_ID",
    "ORIGIN",
    "RANGE",
    "REFERER",
    "TRANSFER_ENCODING",
    "UPGRADE",
    "USER_AGENT",
    "X_FORWARDED_FOR",
    "X_FORWARDED_HOST",
    "X_HTTP_METHOD_OVERRIDE",
    "X_SESSION_ID",
    "X_STREAM_ID",
]
header_values = st.text(st.characters(max_codepoint=255), max_size=40) | st.sampled_from(
    ["x\r\nX-Injected: 1", "a" * 9_000, "=" * 9_000, "bytes=0-0,-1", 'W/"', "[::1", "\xff:99999"]
)


@fuzzed
@given(headers=st.dictionaries(st.sampled_from(HEADERS), header_values, max_size=4))
def test_any_header_values(world: World, headers: dict[str, str]) -> None:
    """None of them changes the answer, reaches the provider, or comes back."""
    body = json.dumps({"messages": MESSAGES}).encode()
    response = world.stream(body, **{f"HTTP_{name}": value for name, value in headers.items()})
    assert response.status_code == 200
    assert "X-Injected" not in response.headers


@fuzzed
@given(name=header_values)
def test_any_host(world: World, name: str) -> None:
    """A Host that is none is the app's 400; else it does not matter."""
    response = world.post(f"{PREFIX}/cancel/s", HTTP_HOST=name)
    assert response.status_code in (400, 404)


# A provider that is not well


@fuzzed
@given(
    status=st.sampled_from([200, 204, 302, 400, 401, 407, 429]) | st.integers(200, 599),
    body=st.binary(max_size=80) | st.builds(encoded, values, escaped=st.booleans()),
    media_type=st.sampled_from(["text/event-stream", "application/json", "", "\xff;", "text/html"]),
    retry_after=st.text(st.characters(max_codepoint=255), max_size=30),
)
def test_any_answer_of_the_provider(
    status: int, body: bytes, media_type: str, retry_after: str
) -> None:
    """Whatever it answers, ours is one of the document's, 5xx among them but never a 500."""
    headers = {"Retry-After": retry_after}
    response = answered(status=status, body=body, headers=headers, content_type=media_type)
    assert response.status_code != 500
    assert KEY not in response.text


@settings(fuzzed, max_examples=60)
@given(body=st.binary(max_size=80) | st.builds(encoded, values, escaped=st.booleans()))
@example(b'{"error": {}}')
@example(b'\n\n{"error": 1} ')
@example(b"{" * 9_000)
def test_any_answer_in_one_piece(body: bytes) -> None:
    """It is passed on if it is a JSON object that is no error; else there is a 502."""
    kind = "application/json"
    response = answered(COMPLETIONS, COMPLETED, body=body, content_type=kind)
    assert response.status_code in (200, 502)
    if response.status_code == 200:
        assert isinstance(json.loads(response.data), dict)
        assert response.data == body.lstrip()


lines = [
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    ":",
    "data: ",
    "x",
    "[DONE]",
    '{"error":1}',
    '"finish_reason":"',
]


@fuzzed
@given(parts=st.lists(st.sampled_from(lines), max_size=20))
def test_any_events_of_the_provider(parts: list[str]) -> None:
    """They are passed on as they are, as far as they are whole; then at most one of ours."""
    body = "".join(parts).encode()
    response = answered(body=body, content_type="text/event-stream")
    if response.status_code == 200 and not body.startswith(response.data):
        passed, _, ours = response.data.rpartition(b"event: error\n")
        assert body.startswith(passed)
        assert json.loads(ours.removeprefix(b"data: "))["error"]["code"] == "upstream_truncated"
    assert response.status_code in (200, 502)


def answered(path: str = STREAM, told: Any = STREAMS, **answer: Any) -> Response:
    """What a good request gets if the provider answers so. It is as documented."""
    other = app(API_KEY=KEY)
    other.config["PROPAGATE_EXCEPTIONS"] = True
    with responses.RequestsMock() as provider:
        provider.post(URL, **answer)
        response = other.test_client().post(path, json={"messages": MESSAGES}, buffered=True)
    service_of(other).stop()
    assert_as_documented(told["post"], response)
    return response
