"""openapi: the document is valid, and the routes do what it says, no less and no more."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import jsonschema
import openapi_spec_validator
import pytest
import requests
import responses
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from chatstream import ChatStream, Service, errors, openapi, page, reading
from chatstream.errors import BusUnavailable, Unconfirmed
from chatstream.outcome import Cause
from chatstream.simulator import Simulator
from chatstream.tokens import CHALLENGE
from tests.test_views import OtherWorkers

URL = "https://provider.test/v1/chat/completions"
MODELS_URL = "https://provider.test/v1/models"
PREFIX = "/api/chat"
STREAM, CANCEL, ITSELF = f"{PREFIX}/stream", f"{PREFIX}/cancel/s-1", f"{PREFIX}/openapi.json"
CHAT = {"messages": [{"role": "user"}], "sessionId": "s-1"}
COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
DOCUMENT = openapi.document(PREFIX, max_body=500, openai_prefix="/v1", health="/")
STREAMS, CANCELS, ITS, LIVING, ENDED, COMPLETED, LISTED, HEALTH, READY = DOCUMENT["paths"].values()

Pairs = set[tuple[int, str]]


def app(*, identify: Callable[[], Any] | None = None, **settings: Any) -> flask.Flask:
    host = flask.Flask("host")
    named = {f"CHATSTREAM_{key}": value for key, value in settings.items()}
    host.config.from_mapping(
        {
            "CHATSTREAM_UPSTREAM_URL": URL,
            "CHATSTREAM_OPENAI_PREFIX": "/v1",
            "CHATSTREAM_HEALTH": "/",
            "CHATSTREAM_MAX_BODY": 500,
            "CHATSTREAM_MAX_STREAMS": 4,
        }
        | named
    )
    ChatStream(host, identify=identify)
    return host


def service_of(host: flask.Flask) -> Service:
    service: Service = host.extensions["chatstream"]
    return service


def served(client: Client, path: str = ITSELF) -> dict[str, Any]:
    document: dict[str, Any] = client.get(path).json
    return document


# The document itself


@pytest.mark.parametrize("root", ["", "/mounted"])
def test_it_is_openapi(root: str) -> None:
    """By the specification's own rules, and its schemas by JSON Schema's."""
    for prefix in (None, "/", "/v1"):
        document = openapi.document(
            "/x/y", max_body=1, root=root, openai_prefix=prefix, health=prefix
        )
        openapi_spec_validator.validate(document)


def test_a_name_has_the_form_of_a_name() -> None:
    """The pattern in the document is the one that the routes hold names against."""
    assert f"^{reading.ID.pattern}$" == openapi.PATTERN


def test_it_has_the_routes_and_no_others() -> None:
    """Each path is a route of the app's, and each route is in it (`/cancel` alone is a 404).

    The browser's module, a file, is none.
    """
    rules = {rule.rule for rule in app().url_map.iter_rules()} - {"/static/<path:filename>"}
    named = {re.sub(r"<[^>]*>", "{sessionId}", rule) for rule in rules}
    others = {f"{PREFIX}/{name}" for name in ("cancel", *page.MODULE)}
    assert named - others == set(DOCUMENT["paths"])


# Where the service asks for a token

TOKENS = {"TOKENS": "ann:t-1"}
CLOSED = openapi.document(
    PREFIX, max_body=500, openai_prefix="/v1", health="/", challenge=CHALLENGE
)


def test_a_token_that_is_asked_for_is_in_it() -> None:
    """By the specification's rules; not where there is none, or an app's `identify`."""
    openapi_spec_validator.validate(CLOSED)
    assert served(app(**TOKENS).test_client()) == CLOSED
    assert (
        served(app().test_client()) == served(app(identify=lambda: "x").test_client()) == DOCUMENT
    )
    assert not {"security", "securitySchemes"} & {*DOCUMENT, *DOCUMENT["components"]}
    assert CLOSED["components"]["securitySchemes"] == {
        "token": {"type": "http", "scheme": "bearer"}
    }


def test_which_routes_ask_for_a_token() -> None:
    """Those, and no others, refuse who has none; with the header that the document has."""
    client = app(**TOKENS).test_client()
    asking = set()
    for path, operations in CLOSED["paths"].items():
        for method, operation in operations.items():
            response = client.open(path.format(sessionId="s-1"), method=method.upper())
            if operation.get("security", CLOSED["security"]):
                asking.add((path, method))
                assert response.status_code == 401
                assert_as_documented(operation, response)
                assert response.headers["WWW-Authenticate"] == CHALLENGE
            else:
                assert response.status_code in (200, 204)
    posts = (STREAM, f"{PREFIX}/cancel/{{sessionId}}", f"{PREFIX}/cancel-all", COMPLETIONS)
    reads = {(path, way) for path in (f"{PREFIX}/sessions", MODELS) for way in ("get", "head")}
    assert asking == {(path, "post") for path in posts} | reads


# It is served


def test_it_is_served_under_the_prefix() -> None:
    """It knows where the routes are and how long a body may be."""
    client = app(URL_PREFIX="/ai", MAX_BODY=77, OPENAI_PREFIX="off", HEALTH="off").test_client()
    document = served(client, "/ai/openapi.json")
    assert document == openapi.document("/ai", max_body=77)
    names = ("stream", "cancel/{sessionId}", "openapi.json", "sessions", "cancel-all")
    assert list(document["paths"]) == [f"/ai/{name}" for name in names]
    assert "77" in document["paths"]["/ai/stream"]["post"]["requestBody"]["description"]


def test_it_knows_where_its_app_is_mounted() -> None:
    """Behind a dispatcher the paths stay, and the server's address says what stands before."""
    both = Client(DispatcherMiddleware(flask.Flask("front"), {"/one": app()}))
    assert served(both, f"/one{ITSELF}")["servers"] == [{"url": "/one"}]
    assert served(app().test_client())["servers"] == [{"url": "/"}]


def test_it_asks_for_no_name_and_tells_none() -> None:
    """`identify` is not called, and nothing of the settings but the bound of a body is told."""
    named: list[None] = []
    host = app(identify=lambda: named.append(None), MODEL="house-model", API_KEY="sk-secret")
    text = host.test_client().get(ITSELF).text
    assert named == []
    assert not re.search("house-model|sk-secret|provider.test", text)


def test_it_opens_nothing() -> None:
    """Reading it starts no thread and joins no bus."""
    host = app()
    served(host.test_client())
    assert (service_of(host)._started, service_of(host)._joined) == (0, 0)


# Its codes are those of the code


def written(package: Path) -> Iterator[tuple[int, str]]:
    """Status and code of each error that is made in the package, as it is written there."""
    for path in package.rglob("*.py"):
        if path.parent.name == "simulator" or path.name == "openapi.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield from made_by(node)


def made_by(call: ast.Call) -> Iterator[tuple[int, str]]:
    kind = getattr(errors, ast.unparse(call.func), None)
    if isinstance(kind, type) and issubclass(kind, errors.StreamError):
        words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        yield words.get("status") or kind.status, words.get("code") or kind.code


def reasons(operation: dict[str, Any]) -> Pairs:
    """Status and reason of every refusal that an operation can give."""
    found = set()
    for status, response in operation["responses"].items():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        properties = schema.get("anyOf", [schema])[0].get("properties", {})
        in_openais_words = properties.get("error", {}).get("properties", {}).get("code", {})
        for reason in properties.get("reason", in_openais_words).get("enum", []):
            found.add((int(status), reason))
    return found


def test_every_error_of_the_code_is_in_it() -> None:
    """Whoever adds a code, or changes a status, has to say so here; and nothing is made up."""
    made = set(written(Path(openapi.__file__).parent))
    made |= {(kind.status, kind.code) for kind in (errors.BusUnavailable, errors.Unconfirmed)}
    told = reasons(STREAMS["post"]) | reasons(CANCELS["post"]) | reasons(ITS["get"])
    told |= reasons(COMPLETED["post"]) | reasons(LISTED["get"])
    told |= reasons(LIVING["get"]) | reasons(ENDED["post"]) | reasons(READY["get"])
    assert told - {(404, "not_found")} == made


def test_what_comes_after_the_first_byte() -> None:
    """An error event's code is a code of the provider's or of ours that can come so late."""
    late = {reason for _, reason in reasons(STREAMS["post"]) if reason.startswith("upstream_")}
    late |= {"event_too_large", "busy", "deadline", "shutting_down"}
    assert set(openapi.AFTER) == late
    assert len(openapi.AFTER) == len(late)


# The routes do what it says


def assert_as_documented(operation: dict[str, Any], response: Response) -> None:
    """Status, media type, headers and JSON are those that the document gives for it."""
    told = operation["responses"][str(response.status_code)]
    for name, header in told.get("headers", {}).items():
        assert name in response.headers or not header.get("required"), name
        if name in response.headers:
            jsonschema.validate(response.headers[name], header["schema"])
    if "content" in told:
        media_type = response.mimetype
        schema = told["content"][media_type]["schema"]
        if media_type == "application/json":
            jsonschema.validate(json.loads(response.data), schema)
    else:
        assert response.data == b""


Scene = Callable[[responses.RequestsMock], tuple[flask.Flask, dict[str, Any]]]


def posted(body: Any = CHAT, /, **settings: Any) -> Scene:
    """A body, JSON or raw, to an app with these settings and a provider that is well."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        if not provider.registered():
            provider.post(URL, body=b"data: [DONE]\n\n", content_type="text/event-stream")
        return app(**settings), {"data": data, "content_type": "application/json"}

    return scene


def answered(**answer: Any) -> Scene:
    """A good request, to which the provider answers so."""

    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        if isinstance(answer.get("body"), bytes):
            answer["content_type"] = "text/event-stream"
        provider.post(URL, **answer)
        return posted()(provider)

    return scene


def beside_another(stream_id: str, session_id: str = "s-1", **settings: Any) -> Scene:
    """A good request, while another stream is live: t, of session s-1."""

    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        host, request = posted(
            {**CHAT, "streamId": stream_id, "sessionId": session_id}, **settings
        )(provider)
        service_of(host).open(b"", session_id="s-1", stream_id="t")
        return host, request

    return scene


def as_one_of_two(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    """A good request of an owner who may have one stream, and has it in another session."""
    host, request = posted(MAX_STREAMS_PER_OWNER=1)(provider)
    service_of(host).open(b"", session_id="s-2")
    return host, request


def unsure(error: Exception) -> Scene:
    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        host, request = posted()(provider)
        OtherWorkers(service_of(host), error)
        return host, request

    return scene


def stopped(cause: Cause) -> Scene:
    """A good request that is aborted before its provider is called."""

    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        host, request = posted()(provider)

        @host.after_request
        def stop(response: flask.Response) -> flask.Response:
            for stream in service_of(host).registry.live():
                stream.abort(cause)
            return response

        return host, request

    return scene


def as_text(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = posted()(provider)
    return host, {**request, "content_type": "text/plain"}


REFUSALS: dict[tuple[int, str], Scene] = {
    (400, "bad_json"): posted(b"{"),
    (400, "bad_messages"): posted({}),
    (400, "bad_id"): posted({**CHAT, "sessionId": "a b"}),
    (400, "bad_number"): posted({**CHAT, "max_tokens": "many"}, MAX_TOKENS=7),
    (400, "model_not_allowed"): posted({**CHAT, "model": "dear"}, ALLOWED_MODELS="deepseek-chat"),
    (400, "upstream_rejected"): answered(status=422, json={"error": {"message": "No."}}),
    (401, "unauthenticated"): posted(identify=lambda: None),
    (409, "conflict"): beside_another("t"),
    (413, "too_large"): posted(b" " * 501),
    (415, "unsupported_media_type"): as_text,
    (429, "too_many_streams"): as_one_of_two,
    (429, "upstream_rate_limited"): answered(status=429, headers={"Retry-After": "7"}),
    (502, "upstream_connect"): answered(body=requests.ConnectTimeout("x")),
    (502, "upstream_unreachable"): answered(body=requests.ConnectionError("x")),
    (502, "upstream_error"): answered(status=500),
    (502, "upstream_auth"): answered(status=401),
    (502, "upstream_not_stream"): answered(status=204),
    (502, "upstream_truncated"): answered(body=b"data: half"),
    (502, "event_too_large"): answered(body=b"data: " + b"x" * 1_100_000),
    (503, "busy"): beside_another("u", MAX_STREAMS=1),
    (503, "shutting_down"): stopped(Cause.SHUTDOWN),
    (504, "upstream_timeout"): answered(body=requests.ReadTimeout("x")),
    (504, "deadline"): stopped(Cause.DEADLINE),
    (504, "unconfirmed"): unsure(Unconfirmed()),
}


@pytest.fixture
def play() -> Iterator[Callable[..., TestResponse]]:
    """Plays a scene on one of the routes; then everything is given back."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as provider:
        hosts = []

        def played(scene: Scene, path: str, method: str = "post") -> TestResponse:
            host, request = scene(provider)
            hosts.append(host)
            return host.test_client().open(path, method=method.upper(), buffered=True, **request)

        yield played
        for host in hosts:
            service_of(host).stop()


Play = Callable[..., TestResponse]


def test_there_is_a_scene_for_each_refusal() -> None:
    """Every refusal in the document is brought about below, two of them by tests of their own."""
    others = {(405, "method_not_allowed"), (502, "upstream_idle")}
    assert set(REFUSALS) == reasons(STREAMS["post"]) - others


@pytest.mark.parametrize(("refusal", "scene"), REFUSALS.items(), ids=map(str, REFUSALS))
def test_each_refusal_is_as_documented(play: Play, refusal: tuple[int, str], scene: Scene) -> None:
    """Each has the status, the headers and the JSON that the document gives for it."""
    response = play(scene, STREAM)
    assert (response.status_code, response.json["reason"]) == refusal  # type: ignore[index]
    assert_as_documented(STREAMS["post"], response)


@pytest.mark.parametrize(
    ("scene", "body"),
    [(posted(), b"data: [DONE]\n\n"), (stopped(Cause.CANCEL), b"")],
    ids=["whole", "stopped"],
)
def test_an_answer_is_as_documented(play: Play, scene: Scene, body: bytes) -> None:
    """Its four headers, and an event stream; also where a stop came first."""
    response = play(scene, STREAM)
    assert (response.status_code, response.data) == (200, body)
    assert_as_documented(STREAMS["post"], response)


def test_silence_is_as_documented(play: Play) -> None:
    """Headers, and then nothing for too long: as no byte was sent, the status can still say so."""
    settings = {"UPSTREAM_IDLE_TIMEOUT": "0.05", "PING_INTERVAL": "60"}
    with contextlib.closing(Simulator().start()) as simulator:

        def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
            provider.add_passthru(simulator.url)
            body = {**CHAT, "simulate": {"silent_after": 0}}
            return posted(body, UPSTREAM_URL=simulator.url, **settings)(provider)

        response = play(scene, STREAM)
        assert (response.status_code, response.json["reason"]) == (502, "upstream_idle")  # type: ignore[index]
        assert_as_documented(STREAMS["post"], response)


CANCELLED: dict[tuple[int, str | None], Scene] = {
    (200, None): beside_another("u"),
    (401, "unauthenticated"): posted(identify=lambda: None),
    (404, "not_found"): posted(),
    (503, "bus_unavailable"): unsure(BusUnavailable()),
    (504, "unconfirmed"): unsure(Unconfirmed()),
}


def test_there_is_a_scene_for_each_answer_to_a_cancel() -> None:
    """Every status of the cancel route in the document is brought about below."""
    statuses = {str(status) for status, _ in CANCELLED}
    assert statuses == set(CANCELS["post"]["responses"]) - {"405"}


@pytest.mark.parametrize(("answer", "scene"), CANCELLED.items(), ids=map(str, CANCELLED))
def test_each_answer_to_a_cancel_is_as_documented(
    play: Play, answer: tuple[int, str | None], scene: Scene
) -> None:
    """Each has the status, the headers and the JSON that the document gives for it."""
    response = play(scene, CANCEL)
    assert (response.status_code, response.json.get("reason")) == answer  # type: ignore[union-attr]
    assert_as_documented(CANCELS["post"], response)


def of_another(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = posted()(provider)
    return host, {**request, "query_string": "owner=another"}


WATCHED: dict[tuple[str, int, str | None], Scene] = {
    ("sessions", 200, None): beside_another("u"),
    ("sessions", 401, "unauthenticated"): posted(identify=lambda: None),
    ("sessions", 403, "forbidden"): of_another,
    ("sessions", 503, "bus_unavailable"): unsure(BusUnavailable()),
    ("cancel-all", 200, None): beside_another("u"),
    ("cancel-all", 401, "unauthenticated"): posted(identify=lambda: None),
    ("cancel-all", 403, "forbidden"): of_another,
    ("cancel-all", 503, "bus_unavailable"): unsure(BusUnavailable()),
    ("cancel-all", 504, "unconfirmed"): unsure(Unconfirmed()),
}


def test_there_is_a_scene_for_each_answer_to_who_watches() -> None:
    """Every status of these two routes in the document is brought about below."""
    for name, operation in (("sessions", LIVING["get"]), ("cancel-all", ENDED["post"])):
        statuses = {str(status) for route, status, _ in WATCHED if route == name}
        assert statuses == set(operation["responses"]) - {"405"}


@pytest.mark.parametrize(("answer", "scene"), WATCHED.items(), ids=map(str, WATCHED))
def test_each_answer_to_who_watches_is_as_documented(
    play: Play, answer: tuple[str, int, str | None], scene: Scene
) -> None:
    """Each has the status, the headers and the JSON that the document gives for it."""
    name, *expected = answer
    method, operation = ("get", LIVING) if name == "sessions" else ("post", ENDED)
    response = play(scene, f"{PREFIX}/{name}", method)
    assert [response.status_code, response.json.get("reason")] == expected  # type: ignore[union-attr]
    assert_as_documented(operation[method], response)


WHOLE = '{"choices": []}'


def in_one_piece(**answer: Any) -> Scene:
    """A good request to OpenAI's route, to which the provider answers so."""
    return answered(**{"content_type": "application/json", **answer})


def listed(**answer: Any) -> Scene:
    """A provider that has such a list of models."""

    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        provider.get(MODELS_URL, **answer)
        return app(), {}

    return scene


def named_badly(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = posted()(provider)
    return host, {**request, "headers": {"X-Stream-Id": "a b"}}


def named_as_another(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = beside_another("t")(provider)
    return host, {**request, "headers": {"X-Session-Id": "s-1", "X-Stream-Id": "t"}}


IN_OPENAIS_WORDS: dict[tuple[int, str], Scene] = {
    **REFUSALS,
    (400, "bad_id"): named_badly,
    (400, "bad_stream"): posted({**CHAT, "stream": "yes"}),
    (409, "conflict"): named_as_another,
    (502, "upstream_not_json"): answered(body=b"data: x\n\n"),
    (502, "upstream_truncated"): in_one_piece(body="{"),
    (502, "answer_too_large"): in_one_piece(body="x" * (16 * 1024 * 1024 + 1)),
    (502, "upstream_not_stream"): answered(status=200, json={}),
}


def test_there_is_a_scene_for_each_refusal_in_openais_words() -> None:
    """As for the chat's own route."""
    others = {(405, "method_not_allowed"), (502, "upstream_idle")}
    assert set(IN_OPENAIS_WORDS) == reasons(COMPLETED["post"]) - others


@pytest.mark.parametrize(
    ("refusal", "scene"), IN_OPENAIS_WORDS.items(), ids=map(str, IN_OPENAIS_WORDS)
)
def test_each_refusal_in_openais_words_is_as_documented(
    play: Play, refusal: tuple[int, str], scene: Scene
) -> None:
    """The same status and code, in another shape; those of events where a stream is wanted."""
    if refusal[1] in ("upstream_not_stream", "event_too_large"):
        scene = streaming(scene)
    response = play(scene, COMPLETIONS)
    assert (response.status_code, response.json["error"]["code"]) == refusal  # type: ignore[index]
    assert_as_documented(COMPLETED["post"], response)


def streaming(scene: Scene) -> Scene:
    """The same, with `stream: true`."""

    def streamed(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        host, request = scene(provider)
        return host, {**request, "data": json.dumps({**CHAT, "stream": True}).encode()}

    return streamed


@pytest.mark.parametrize(
    ("scene", "status"),
    [
        (in_one_piece(body=WHOLE), 200),
        (streaming(answered(body=b"data: [DONE]\n\n")), 200),
        (stopped(Cause.CANCEL), 200),
        (in_one_piece(body='{"error": "overloaded"}'), 502),
    ],
    ids=["whole", "events", "stopped", "the provider's own error"],
)
def test_an_answer_of_openais_route_is_as_documented(play: Play, scene: Scene, status: int) -> None:
    """Of events or in one piece, or what there is in its place."""
    response = play(scene, COMPLETIONS)
    assert response.status_code == status
    assert_as_documented(COMPLETED["post"], response)


LISTS: dict[tuple[int, str | None], Scene] = {
    (200, None): listed(json={"data": []}),
    (400, "upstream_rejected"): listed(status=404),
    (401, "unauthenticated"): posted(identify=lambda: None),
    (404, "no_models"): posted(UPSTREAM_URL="https://provider.test/chat"),
    (429, "upstream_rate_limited"): listed(status=429),
    (502, "upstream_connect"): listed(body=requests.ConnectTimeout("x")),
    (502, "upstream_unreachable"): listed(body=requests.ConnectionError("x")),
    (502, "upstream_error"): listed(status=500),
    (502, "upstream_auth"): listed(status=401),
    (502, "upstream_not_json"): listed(body="<h1>"),
    (504, "upstream_timeout"): listed(body=requests.ReadTimeout("x")),
}


def test_there_is_a_scene_for_each_list() -> None:
    """Every answer in the document is brought about below, but for one of test_openai's."""
    others = {(405, "method_not_allowed"), (503, "busy")}
    assert {answer for answer in LISTS if answer[1]} == reasons(LISTED["get"]) - others


@pytest.mark.parametrize("method", ["get", "head"])
@pytest.mark.parametrize(("answer", "scene"), LISTS.items(), ids=map(str, LISTS))
def test_each_list_is_as_documented(
    play: Play, answer: tuple[int, str | None], scene: Scene, method: str
) -> None:
    """Also without a body."""
    response = play(scene, MODELS, method)
    assert response.status_code == answer[0]
    if method == "get" and answer[1]:
        assert response.json["error"]["code"] == answer[1]  # type: ignore[index]
    assert_as_documented(LISTED[method], response)


PATHS = {STREAM: STREAMS, CANCEL: CANCELS, ITSELF: ITS, COMPLETIONS: COMPLETED, MODELS: LISTED}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_as_documented(path: str, method: str) -> None:
    """A method that the document has is served; any other is the 405, with what is allowed."""
    operations = PATHS[path]
    response = app().test_client().open(path, method=method)
    if method.lower() in operations:
        assert response.status_code != 405
        assert_as_documented(operations[method.lower()], response)
    else:
        assert response.status_code == 405
        assert set(response.headers["Allow"].split(", ")) == {name.upper() for name in operations}
        if method != "HEAD":
            assert_as_documented(next(iter(operations.values())), response)
