"""Scenes on the routes, and the document that they are held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import flask
import jsonschema
import requests
import responses
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Response

from chatstream import ChatStream, Service
from chatstream.errors import Unconfirmed
from chatstream.stream.outcome import Cause
from chatstream.web import openapi
from tests.web.other_workers import OtherWorkers

URL = "https://provider.test/v1/chat/completions"
MODELS_URL = "https://provider.test/v1/models"
PREFIX = "/api/chat"
STREAM, CANCEL, ITSELF = f"{PREFIX}/stream", f"{PREFIX}/cancel/s-1", f"{PREFIX}/openapi.json"
CHAT = {"messages": [{"role": "user"}], "sessionId": "s-1"}
COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
DOCUMENT = openapi.document(PREFIX, max_body=500, openai_prefix="/v1", health="/")
STREAMS, CANCELS, ITS, LIVING, ENDED, COMPLETED, LISTED, HEALTH, READY = DOCUMENT["paths"].values()

Pairs = set[tuple[int, str]]
Play = Callable[..., TestResponse]


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
