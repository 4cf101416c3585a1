"""What the routes are, for machines: an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1).

Pure: no I/O. The words are those of docs/wire.md; tests hold this against what the routes
do, and fuzz the routes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PATTERN = "^[A-Za-z0-9._:-]{1,128}$"
"""A sessionId or streamId: `reading.ID`, in JSON Schema's words."""

BEFORE: Mapping[int, tuple[str, Mapping[str, str]]] = {
    400: (
        "The request is not what it should be, or the provider rejected it.",
        {
            "bad_json": "the body is no JSON object, or broke off",
            "bad_messages": "messages is not a non-empty list of objects with a role",
            "bad_id": "sessionId or streamId has another form",
            "bad_number": "max_tokens or n is no whole number from 1 on, or too high",
            "model_not_allowed": "the model is none of those that may be asked",
            "upstream_rejected": "the provider rejected the request; its message",
        },
    ),
    401: ("The caller has no name.", {"unauthenticated": "log in first"}),
    409: (
        "The name is taken.",
        {"conflict": "the stream, or where so set the session, is live in some worker"},
    ),
    413: ("The body is too long.", {"too_large": "nothing of it was used"}),
    415: (
        "The body does not say that it is JSON.",
        {"unsupported_media_type": "send Content-Type: application/json"},
    ),
    429: (
        "The caller has as many answers running as it may, or the provider limits this service.",
        {
            "too_many_streams": "stop one of them first, or wait; with Retry-After",
            "upstream_rate_limited": "with the provider's Retry-After, if it gave one",
        },
    ),
    502: (
        "The provider failed.",
        {
            "upstream_connect": "no connection: name, address, TLS, proxy",
            "upstream_unreachable": "the provider closed without an answer",
            "upstream_error": "the provider failed (5xx)",
            "upstream_auth": "the provider refused the service's key (401, 403)",
            "upstream_not_stream": "a 200 that is no event stream, an encoded body, a redirect",
            "upstream_idle": "headers, and then nothing for too long",
            "upstream_truncated": "headers, and then the end",
            "event_too_large": "the first event has more than 1 MiB",
        },
    ),
    503: (
        "No room, or the worker is going away.",
        {
            "busy": "every slot is taken, or descriptors ran out; with Retry-After",
            "shutting_down": "the service is restarting",
        },
    ),
    504: (
        "It took too long.",
        {
            "upstream_timeout": "the provider sent no headers in time",
            "deadline": "the stream's deadline passed",
            "unconfirmed": "the session has streams in four workers, and all of them hang",
        },
    ),
}
"""Status, sentence and reasons of the refusals of a stream, before its first byte."""

AFTER = (
    *(reason for reason in BEFORE[502][1]),
    "upstream_timeout",
    "upstream_rate_limited",
    "upstream_rejected",
    "busy",
    "deadline",
    "shutting_down",
)
"""The codes that an `event: error` can have. With headers that come late, nearly all refusals."""

OPENAI_BEFORE: Mapping[int, tuple[str, Mapping[str, str]]] = {
    **BEFORE,
    400: (
        BEFORE[400][0],
        {
            **BEFORE[400][1],
            "bad_id": "X-Session-Id or X-Stream-Id has another form",
            "bad_stream": "stream is neither true nor false",
        },
    ),
    502: (
        BEFORE[502][0],
        {
            **BEFORE[502][1],
            "upstream_not_json": "for an answer in one piece: a 200 that is no JSON, or encoded",
            "answer_too_large": "an answer in one piece has more than 16 MiB",
        },
    ),
}
"""The same of OpenAI's route for an answer."""

OPENAI_MODELS: Mapping[int, tuple[str, Mapping[str, str]]] = {
    400: ("The provider rejected it.", {"upstream_rejected": "with its message"}),
    401: BEFORE[401],
    404: ("There is no list.", {"no_models": "the provider's address is not OpenAI's"}),
    429: (
        "The provider is limiting this service's rate.",
        {"upstream_rate_limited": BEFORE[429][1]["upstream_rate_limited"]},
    ),
    502: (
        "The provider failed.",
        {
            reason: OPENAI_BEFORE[502][1][reason]
            for reason in (
                "upstream_connect",
                "upstream_unreachable",
                "upstream_error",
                "upstream_auth",
                "upstream_not_json",
            )
        },
    ),
    503: ("Others ask for it.", {"busy": "two are being answered; with Retry-After"}),
    504: ("It took too long.", {"upstream_timeout": "or is too long"}),
}
"""The same of OpenAI's route for the models."""

_FORBIDDEN = ("They are others'.", {"forbidden": "only an admin may"})
_AWAY = {"bus_unavailable": "the other workers cannot be reached; with Retry-After"}

_OPENAI = """\
OpenAI's route: with `stream: true` an answer is relayed as on the chat's own route, else in one
piece, before which newlines show life. A fault that comes after these is a 200 whose JSON is the
error. A stopped answer ends with the finish_reason `cancelled`; one piece has no content then."""

_STREAM = """\
Relays the provider's answer as Server-Sent Events, byte for byte, whole events only, up to
`data: [DONE]`. Comments are passed on; in silence `: ping` comments go out. After the first byte a
fault is one `event: error` (its data: the schema `ErrorEvent`), and the end. A stop adds nothing:
the body ends. To stop, close the connection or use the cancel route.

The app in which this is mounted may answer for itself, before it or instead: a login page, a check
of CSRF."""

_CANCEL = """\
Stops a stream, whichever worker of whichever host has it. Its body is not looked at. A cancel that
names a streamId which has not started is answered with 404 and remembered for 30 s: if that stream
then starts, it is born aborted."""

_SSE = "text/event-stream"
_JSON = "application/json"


def document(
    url_prefix: str,
    *,
    max_body: int,
    root: str = "",
    openai_prefix: str | None = None,
    health: str | None = None,
    challenge: str | None = None,
) -> dict[str, Any]:
    """The document. Holds nothing of a user, a key or a provider.

    Args:
        url_prefix: Where the routes are mounted in their app.
        max_body: Longest request body, bytes.
        root: Where the app is mounted in its server (WSGI's SCRIPT_NAME).
        openai_prefix: Where OpenAI's routes are; None for none.
        health: Where healthz and readyz are; None for none.
        challenge: What a 401 says, where bearer tokens are asked for; None where they are not.
    """
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "chatstream",
            "version": "1",
            "description": "Relays an LLM provider's answer as Server-Sent Events, and stops it.",
        },
        "servers": [{"url": root or "/"}],
        "paths": {
            f"{url_prefix}/stream": {
                "post": _stream(max_body),
                "options": _options("stream", "OPTIONS, POST"),
            },
            f"{url_prefix}/cancel/{{sessionId}}": {
                "post": _cancel(),
                "options": {
                    **_options("cancel", "OPTIONS, POST"),
                    "parameters": [_parameter("sessionId", "path", {"type": "string"})],
                },
            },
            f"{url_prefix}/openapi.json": {
                "get": _itself("get"),
                "head": _itself("head"),
                "options": _options("openapi", "GET, HEAD, OPTIONS"),
            },
            **_watching(url_prefix),
            **({} if openai_prefix is None else _openai(openai_prefix.rstrip("/"), max_body)),
            **({} if health is None else _health(health.rstrip("/"))),
        },
        "components": {"schemas": {"ChatRequest": _chat_request(), "ErrorEvent": _error_event()}},
    }
    return made if challenge is None else _with_tokens(made, challenge)


def _with_tokens(made: dict[str, Any], challenge: str) -> dict[str, Any]:
    """Adds to a document that a bearer token is asked for, but where `security` is empty."""
    made["security"] = [{"token": []}]
    made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path in made["paths"].values():
        for operation in path.values():
            if refusal := operation["responses"].get("401"):
                refusal["headers"]["WWW-Authenticate"] = _header(_word(challenge))
    return made


def _stream(max_body: int) -> dict[str, Any]:
    return {
        "operationId": "stream",
        "summary": "Streams one answer.",
        "description": _STREAM,
        "requestBody": {
            "description": f"JSON in UTF-8, of at most {max_body} bytes.",
            "required": True,
            "content": {_JSON: {"schema": _ref("ChatRequest")}},
        },
        "responses": {
            "200": {
                "description": "The answer; without a byte where a stop came before the headers.",
                "headers": {
                    "X-Session-Id": _header(_id(), "The chat."),
                    "X-Stream-Id": _header(_id(), "This one answer."),
                    "Cache-Control": _header(_word("no-cache, no-transform")),
                    "X-Accel-Buffering": _header(_word("no"), "For nginx."),
                },
                # No type: to some tools a schema is of the whole text, to others of each event.
                "content": {_SSE: {"schema": {"description": "Events, pings, [DONE]."}}},
            },
            **{str(status): _refusal(status) for status in BEFORE},
            "405": _other_method("OPTIONS, POST"),
        },
    }


def _openai(prefix: str, max_body: int) -> dict[str, Any]:
    return {
        f"{prefix}/chat/completions": {
            "post": _completions(max_body),
            "options": _options("openai_chat", "OPTIONS, POST"),
        },
        f"{prefix}/models": {
            "get": _models("get"),
            "head": _models("head"),
            "options": _options("openai_models", "GET, HEAD, OPTIONS"),
        },
    }


def _completions(max_body: int) -> dict[str, Any]:
    request = _chat_request()
    for name in ("sessionId", "streamId"):
        del request["properties"][name]
    request["properties"]["stream"] = {"type": ["boolean", "null"]}
    operation = _stream(max_body)
    answer = {
        **operation["responses"]["200"],
        "content": {**operation["responses"]["200"]["content"], _JSON: {"schema": _an_object()}},
    }
    return {
        "operationId": "openai_chat",
        "summary": "One answer, as OpenAI's API gives it.",
        "description": _OPENAI,
        "parameters": [
            _parameter("X-Session-Id", "header", _id()),
            _parameter("X-Stream-Id", "header", _id()),
        ],
        "requestBody": {**operation["requestBody"], "content": {_JSON: {"schema": request}}},
        "responses": {
            "200": answer,
            **_openai_refusals(OPENAI_BEFORE),
            "405": _openai_other_method("OPTIONS, POST"),
        },
    }


def _models(method: str) -> dict[str, Any]:
    found = _json("The provider's list, less what may not be asked here.", _an_object())
    refusals = _openai_refusals(OPENAI_MODELS)
    if method == "head":
        for response in (found, *refusals.values()):
            del response["content"]
    return {
        "operationId": f"openai_models_{method}",
        "summary": "The provider's models.",
        "responses": {
            "200": found,
            **refusals,
            "405": _openai_other_method("GET, HEAD, OPTIONS"),
        },
    }


def _openai_refusals(
    before: Mapping[int, tuple[str, Mapping[str, str]]],
) -> dict[str, dict[str, Any]]:
    """What `_refusal` has, in OpenAI's words."""
    return {
        str(status): _openai_words(_with_retry(status, _refused(sentence, reasons)))
        for status, (sentence, reasons) in before.items()
    }


def _openai_other_method(methods: str) -> dict[str, Any]:
    return _openai_words(_other_method(methods))


def _openai_words(response: dict[str, Any]) -> dict[str, Any]:
    codes = response["content"][_JSON]["schema"]["properties"]["reason"]
    error = _exactly(
        message={"type": "string"},
        type={"type": "string"},
        param={"type": ["string", "null"]},
        code=codes,
    )
    schemas = [_exactly(error=error)]
    if "upstream_error" in codes["enum"]:  # the provider's own, where it came as a 200
        schemas.append({"type": "object", "required": ["error"]})
    return {**response, "content": {_JSON: {"schema": {"anyOf": schemas}}}}


def _an_object() -> dict[str, Any]:
    return {"type": "object"}


def _cancel() -> dict[str, Any]:
    return {
        "operationId": "cancel",
        "summary": "Stops a stream.",
        "description": _CANCEL,
        "parameters": [
            _parameter("sessionId", "path", _id()),
            _parameter("streamId", "query", _id()),
        ],
        "responses": {
            "200": _json(
                "The provider's connection was shut down.",
                _exactly(ok=_flag(True), cancelled=_flag(True)),
            ),
            "401": _refusal(401),
            "404": _json("Nothing by that name is live, in any worker.", _not("not_found")),
            "405": _other_method("OPTIONS, POST"),
            "503": _json(
                "It is not this worker's, and whose it is cannot be found out.",
                _not("bus_unavailable"),
            ),
            "504": _json(
                "The worker that has the stream does not answer; it stops the stream when it does.",
                _not("unconfirmed"),
            ),
        },
    }


def _watching(prefix: str) -> dict[str, Any]:
    """The routes for what lives."""
    whose = [
        _parameter("all", "query", {"type": "string"}),
        _parameter("owner", "query", {"type": "string"}),
    ]
    sessions = {method: {**_sessions(method), "parameters": whose} for method in ("get", "head")}
    return {
        f"{prefix}/sessions": {**sessions, "options": _options("sessions", "GET, HEAD, OPTIONS")},
        f"{prefix}/cancel-all": {
            "post": {**_cancel_all(), "parameters": whose},
            "options": _options("cancel_all", "OPTIONS, POST"),
        },
    }


def _sessions(method: str) -> dict[str, Any]:
    one = _exactly(
        sessionId=_id(),
        streamId=_id(),
        phase=_word("new", "connecting", "headers", "body", "sending"),
        seconds={"type": "number", "minimum": 0},
        events={"type": "integer", "minimum": 0},
    )
    one["properties"] |= {  # for an admin who asks for those of others
        "owner": {"type": "string"},
        "host": {"type": "string"},
        "pid": {"type": "integer"},
    }
    found = _json(
        "What lives in all workers. Not complete: a worker does not answer, or there are too many.",
        _exactly(
            ok=_flag(True),
            complete={"type": "boolean"},
            sessions={"type": "array", "items": one},
        ),
    )
    responses = {
        "200": found,
        "401": _refusal(401),
        "403": _refused(*_FORBIDDEN),
        "405": _other_method("GET, HEAD, OPTIONS"),
        "503": _with_retry(503, _refused("Nobody knows.", _AWAY)),
    }
    if method == "head":
        for response in responses.values():
            del response["content"]
    return {
        "operationId": f"sessions_{method}",
        "summary": "What lives: one's own, and for an admin `?owner=` or `?all=1`.",
        "responses": responses,
    }


def _cancel_all() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    unconfirmed = _exactly(ok=_flag(False), reason=_word("unconfirmed"), cancelled=count)
    return {
        "operationId": "cancel_all",
        "summary": "Stops all that lives: one's own, and for an admin `?owner=` or `?all=1`.",
        "responses": {
            "200": _json(
                "So many were stopped, and their providers' connections shut down.",
                _exactly(ok=_flag(True), cancelled=count),
            ),
            "401": _refusal(401),
            "403": _refused(*_FORBIDDEN),
            "405": _other_method("OPTIONS, POST"),
            "503": _json(
                "This worker's were stopped; the others cannot be reached.",
                _not("bus_unavailable"),
            ),
            "504": _json("So many were, and a worker does not answer.", unconfirmed),
        },
    }


def _health(at: str) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    unready = {"shutting_down": BEFORE[503][1]["shutting_down"], **_AWAY}
    for name, sentence in (("healthz", "It answers."), ("readyz", "New streams are welcome.")):
        operations = paths[f"{at}/{name}"] = {
            "options": _options(name, "GET, HEAD, OPTIONS"),
        }
        for method in ("get", "head"):
            responses = {
                "200": _json(sentence, _exactly(ok=_flag(True))),
                "405": _other_method("GET, HEAD, OPTIONS"),
            }
            if name == "readyz":
                responses["503"] = _with_retry(503, _refused("They had better not come.", unready))
            if method == "head":
                for response in responses.values():
                    del response["content"]
            operations[method] = {
                "operationId": f"{name}_{method}",
                "summary": sentence,
                "security": [],
                "responses": responses,
            }
    return paths


def _itself(method: str) -> dict[str, Any]:
    found = _json("This document.", {"type": "object", "required": ["openapi", "paths"]})
    if method == "head":
        del found["content"]
    return {
        "operationId": f"openapi_{method}",
        "summary": "This document.",
        "security": [],
        "responses": {"200": found, "405": _other_method("GET, HEAD, OPTIONS")},
    }


def _options(route: str, methods: str) -> dict[str, Any]:
    return {
        "operationId": f"{route}_options",
        "summary": "What is allowed.",
        "security": [],
        "responses": {
            "204": {
                "description": "The methods.",
                "headers": {"Allow": _header(_word(methods))},
            }
        },
    }


def _chat_request() -> dict[str, Any]:
    """What is checked. All the rest is the provider's to judge."""
    name = {"type": ["string", "null"], "pattern": PATTERN}
    return {
        "type": "object",
        "required": ["messages"],
        "properties": {
            "messages": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["role"],
                    "properties": {"role": {"type": "string"}},
                },
            },
            "sessionId": {**name, "description": "The chat; made up when missing."},
            "streamId": {**name, "description": "This one answer; made up when missing."},
            "model": {"description": "The provider's; has a default."},
            "stream": {"description": "Forced to true."},
        },
        "additionalProperties": {"description": "Goes to the provider as it is."},
    }


def _error_event() -> dict[str, Any]:
    return _exactly(
        error=_exactly(
            message={"type": "string"},
            type=_word("service_error", "upstream_error"),
            code=_word(*AFTER),
        )
    )


def _refusal(status: int) -> dict[str, Any]:
    return _with_retry(status, _refused(*BEFORE[status]))


def _with_retry(status: int, response: dict[str, Any]) -> dict[str, Any]:
    if status in (429, 503):
        response["headers"]["Retry-After"] = {"schema": {"type": "string"}}
    return response


def _other_method(methods: str) -> dict[str, Any]:
    response = _refused(
        "The answer to every other method.", {"method_not_allowed": f"use {methods}"}
    )
    response["headers"]["Allow"] = _header(_word(methods))
    return response


def _refused(sentence: str, reasons: Mapping[str, str]) -> dict[str, Any]:
    meanings = "".join(f"\n- `{reason}`: {meaning}" for reason, meaning in reasons.items())
    return _json(
        f"{sentence}\n{meanings}",
        _exactly(ok=_flag(False), reason=_word(*reasons), message={"type": "string"}),
    )


def _not(reason: str) -> dict[str, Any]:
    return _exactly(ok=_flag(False), reason=_word(reason))


def _json(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {"Cache-Control": _header(_word("no-store"))},
        "content": {_JSON: {"schema": schema}},
    }


def _exactly(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object with these members and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _header(schema: Mapping[str, Any], description: str = "") -> dict[str, Any]:
    described = {"description": description} if description else {}
    return {**described, "required": True, "schema": schema}


def _parameter(name: str, place: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _word(*words: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(words)}


def _flag(value: bool) -> dict[str, Any]:
    return {"type": "boolean", "const": value}


def _id() -> dict[str, Any]:
    return {"type": "string", "pattern": PATTERN}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
