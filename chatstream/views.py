"""HTTP in, HTTP out: the routes, their status codes and headers.

Refusals are returned, never raised, and the routes take every method: an app's own
`errorhandler(HTTPException)` gets to see none of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from flask import Blueprint, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.routing import BaseConverter

from chatstream.detached import Detachable, Exchange
from chatstream.errors import Refused, RequestTimeout, StreamError
from chatstream.iterable import StreamIterable
from chatstream.openapi import document

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from chatstream.extension import Service

ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A sessionId or streamId."""

_UNWALKED = "chatstream.unwalked"
"""In the environ: a stream whose response has not been given to the server yet."""


def blueprint(url_prefix: str) -> Blueprint:
    """The routes, under `url_prefix`."""
    routes = Blueprint("chatstream", __name__, url_prefix=url_prefix)
    routes.record(_add_routes)
    routes.teardown_request(_drop)
    return routes


class _Anything(BaseConverter):
    """The rest of a path, whatever is in it: a malformed id is for the view to answer."""

    regex = r"[\s\S]*"
    part_isolating = False


def _add_routes(state: BlueprintSetupState) -> None:
    """Blueprint.add_url_rule insists on a list of methods; a rule without one takes them all."""
    app = state.app
    app.url_map.converters["chatstream_anything"] = _Anything
    for path, name, view in (
        ("/stream", "stream", stream),
        ("/cancel/<chatstream_anything:session_id>", "cancel", cancel),
        ("/cancel", "cancel", cancel),
        ("/openapi.json", "openapi", openapi),
    ):
        endpoint = f"{state.name}.{name}"
        rule = app.url_rule_class(
            f"{state.url_prefix}{path}", endpoint=endpoint, strict_slashes=True, merge_slashes=False
        )
        app.url_map.add(rule)
        app.view_functions[endpoint] = view


def stream() -> Any:
    """POST /stream: opens a stream."""
    if request.method != "POST":
        return _other_method()
    owner = _owner()
    if not isinstance(owner, str):
        return owner
    service = _service()
    try:
        body = _json_body(service.settings.max_body)
        session_id, stream_id = _id(body, "sessionId"), _id(body, "streamId")
        payload = _payload(body, service)
        source = service.open(
            payload,
            session_id=session_id,
            stream_id=stream_id,
            owner=owner,
            environ=request.environ,
        )
    except StreamError as error:
        return _refuse(error)
    request.environ[_UNWALKED] = source
    return StreamResponse(source)


def _drop(error: BaseException | None) -> None:
    """Ends a stream that no server will walk: the app gave another answer after our view."""
    source = request.environ.pop(_UNWALKED, None)
    if source is not None:
        source.close()


def cancel(session_id: str = "") -> Any:
    """POST /cancel/<sessionId>: stops a stream. The request's body is not looked at."""
    if request.method != "POST":
        return _other_method()
    owner = _owner()
    if not isinstance(owner, str):
        return owner
    stream_id = _argument("streamId")
    well_formed = ID.fullmatch(session_id) and (stream_id is None or ID.fullmatch(stream_id))
    try:
        if well_formed and _service().abort(session_id, stream_id, owner=owner):
            return _json({"ok": True, "cancelled": True}, 200)
    except StreamError as error:
        return _json({"ok": False, "reason": error.code}, error.status)
    return _json({"ok": False, "reason": "not_found"}, 404)


def openapi() -> Response:
    """GET /openapi.json: what the routes are. It tells nothing of anybody, and asks for no name."""
    if request.method not in ("GET", "HEAD"):
        return _other_method("GET, HEAD, OPTIONS")
    settings = _service().settings
    root = request.root_path.rstrip("/")
    return _json(document(settings.url_prefix, max_body=settings.max_body, root=root), 200)


def timed_out(error: RequestTimeout) -> Response:
    """For a host's own routes, where one of our workers gave up on a body."""
    return Response(status=408)


class StreamResponse(Response):
    """A response that is begun by its iterable's first `next`.

    By then Flask's contexts are popped: no database connection of the app waits with us. And by
    then it is known whether the provider refused, so a refusal still has its true status
    (PEP 3333 lets the iterable call `start_response` before its first bytes).
    """

    def __init__(self, source: StreamIterable) -> None:
        super().__init__(source, content_type="text/event-stream", direct_passthrough=True)
        self.headers["X-Session-Id"] = source.stream.session_id
        self.headers["X-Stream-Id"] = source.stream.stream_id
        self.headers["Cache-Control"] = "no-cache, no-transform"
        self.headers["X-Accel-Buffering"] = "no"
        self._source = source

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ.pop(_UNWALKED, None)
        return _Begun(self, self._source, environ, start_response)


class _Begun(Detachable):
    """The iterable of one StreamResponse, for one server."""

    def __init__(
        self,
        response: StreamResponse,
        source: StreamIterable,
        environ: WSGIEnvironment,
        start_response: StartResponse,
    ) -> None:
        self._response = response
        self._source = source
        self._environ = environ
        self._start_response = start_response
        self._started = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data = next(self._source, b"")
        if not self._started:
            self._started = True
            data = self._start(data)
        if not data:
            raise StopIteration
        return data

    def detach(self, exchange: Exchange) -> bool:
        return self._source.detach(exchange, self._start)

    def close(self) -> None:
        self._source.close()
        self._response.close()

    def __del__(self) -> None:
        # PEP 3333 has servers call `close`, but werkzeug's does not where the client sent a RST.
        # Its handler drops us then, in its own thread. Where `close` was called this does nothing.
        self._source.close()

    def _start(self, data: bytes) -> bytes:
        """Sends status and headers; returns the first bytes.

        Without any, the stream has ended: in an error, or with nothing to say.
        """
        response = self._response
        error = None if data else self._source.refusal
        if error is not None:
            refusal = _refuse(error)
            data = refusal.get_data()
            response.status = refusal.status
            response.headers.update(refusal.headers)
            del response.headers["X-Accel-Buffering"]
        self._start_response(
            response.status, response.get_wsgi_headers(self._environ).to_wsgi_list()
        )
        return data


def _service() -> Service:
    service: Service = current_app.extensions["chatstream"]
    return service


def _owner() -> Any:
    """The caller's name; else the response to give instead."""
    identify = _service().identify
    if identify is None:
        return ""
    owner = identify()
    if owner is None:
        return _refuse(Refused("Who are you? Please log in.", code="unauthenticated", status=401))
    if _is_response(owner):
        return owner
    if isinstance(owner, (str, int)) and not isinstance(owner, bool):
        return str(owner)  # a plain one, also of a LocalProxy
    raise TypeError(
        f"identify must return a str, an int, a response or None, not {type(owner).__name__}"
    )


def _is_response(value: object) -> bool:
    return isinstance(value, (Response, tuple)) or hasattr(value, "get_wsgi_response")


def _argument(name: str) -> str | None:
    """The query string's. Not werkzeug's `args`: bytes that are no UTF-8 would be a 500."""
    query = parse_qs(request.query_string.decode("latin-1"), keep_blank_values=True)
    return query.get(name, [None])[0]


def _json_body(limit: int) -> dict[str, Any]:
    if request.mimetype != "application/json":
        raise Refused(
            "Send JSON, with Content-Type: application/json.",
            code="unsupported_media_type",
            status=415,
        )
    try:
        body = _DECODER.decode(_bytes_body(limit).decode())
    except (ValueError, RecursionError):
        raise Refused("The body is not JSON (RFC 8259, in UTF-8).", code="bad_json") from None
    if not isinstance(body, dict):
        raise Refused("The body must be a JSON object.", code="bad_json")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # `json.loads` would make one each time


def _bytes_body(limit: int) -> bytes:
    announced = request.content_length or 0
    if announced > limit:
        raise _too_large(limit)
    try:
        # What a hook of the app's has read already, werkzeug has kept.
        data = _read(limit + 1) or request.get_data()
    except RequestEntityTooLarge:  # the app's own MAX_CONTENT_LENGTH
        raise _too_large(limit) from None
    except Exception:  # werkzeug's, the socket's, and each server's own for chunks that are none
        raise _broken_off() from None
    if len(data) > limit:
        raise _too_large(limit)
    if len(data) < announced:
        raise _broken_off()
    return data


def _read(most: int) -> bytes:
    """The body, up to `most` bytes. A single `read` may return less, and more may follow."""
    data = bytearray()
    while len(data) < most and (piece := request.stream.read(most - len(data))):
        data += piece
    return bytes(data)


def _broken_off() -> Refused:
    return Refused("The body broke off.", code="bad_json")


def _too_large(limit: int) -> Refused:
    return Refused(f"The body is longer than {limit} bytes.", code="too_large", status=413)


def _id(body: dict[str, Any], name: str) -> str | None:
    """Takes the id out of `body`: it is ours, not the provider's."""
    value = body.pop(name, None)
    if value is not None and not (isinstance(value, str) and ID.fullmatch(value)):
        raise Refused(f"{name} must be 1 to 128 of A-Z a-z 0-9 . _ : -", code="bad_id")
    return value


def _payload(body: dict[str, Any], service: Service) -> bytes:
    """The provider's request: the caller's, with what is forced and what is missing."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a non-empty list.", code="bad_messages")
    if not all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in messages):
        raise Refused("Each of messages must be an object with a role.", code="bad_messages")
    body["stream"] = True
    if body.get("model") is None:
        body["model"] = service.settings.model
    if service.settings.include_usage:
        options = body.get("stream_options")
        given = options if isinstance(options, dict) else {}
        body["stream_options"] = {**given, "include_usage": True}
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # 1e999, half a surrogate pair
        raise Refused("The body holds what JSON cannot carry.", code="bad_json") from None


def _other_method(allowed: str = "OPTIONS, POST") -> Response:
    if request.method == "OPTIONS":
        return Response(status=204, headers={"Allow": allowed})
    sentence = "Use POST." if "POST" in allowed else "Use GET."
    refusal = _refuse(Refused(sentence, code="method_not_allowed", status=405))
    refusal.headers["Allow"] = allowed
    return refusal


def _refuse(error: StreamError) -> Response:
    refusal = _json({"ok": False, "reason": error.code, "message": error.message}, error.status)
    if error.retry_after is not None:
        refusal.headers["Retry-After"] = error.retry_after
    return refusal


def _json(value: Mapping[str, Any], status: int) -> Response:
    return Response(
        json.dumps(value),
        status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
