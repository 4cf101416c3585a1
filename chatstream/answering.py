"""How our routes answer, and how they are entered: what the chat's own and OpenAI's have in common.

Refusals are returned, never raised, and the routes take every method: an app's own
`errorhandler(HTTPException)` gets to see none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flask import Response, request
from flask.blueprints import BlueprintSetupState
from werkzeug.routing import BaseConverter

from chatstream.detached import Detachable, Exchange
from chatstream.errors import Refused, StreamError
from chatstream.iterable import StreamIterable

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

Refuse = Callable[[StreamError], Response]
"""Puts an error into a route's words."""

_UNWALKED = "chatstream.unwalked"
"""In the environ: a stream whose response has not been given to the server yet."""


class _Anything(BaseConverter):
    """The rest of a path, whatever is in it: a malformed id is for the view to answer."""

    regex = r"[\s\S]*"
    part_isolating = False


def add_routes(
    state: BlueprintSetupState, routes: Iterable[tuple[str, str, Callable[..., Any]]]
) -> None:
    """Enters routes that take every method; Blueprint.add_url_rule insists on a list of them.

    Args:
        state: The blueprint's, in its app.
        routes: The rule, as the app knows it, the endpoint's name and the view of each.
    """
    app = state.app
    app.url_map.converters["chatstream_anything"] = _Anything
    for path, name, view in routes:
        endpoint = f"{state.name}.{name}"
        rule = app.url_rule_class(path, endpoint=endpoint, strict_slashes=True, merge_slashes=False)
        app.url_map.add(rule)
        app.view_functions[endpoint] = view


def refuse(error: StreamError) -> Response:
    """A refusal, in the chat routes' words."""
    return refusal({"ok": False, "reason": error.code, "message": error.message}, error)


def refusal(value: Mapping[str, Any], error: StreamError) -> Response:
    """A refusal with the status and the Retry-After that are `error`'s."""
    response = as_json(value, error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = error.retry_after
    return response


def as_json(value: Mapping[str, Any], status: int) -> Response:
    """A response that no cache keeps."""
    return Response(
        json.dumps(value),
        status,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def other_method(allowed: str = "OPTIONS, POST", refuse: Refuse = refuse) -> Response:
    """For a method that a route has not; OPTIONS says which it has."""
    if request.method == "OPTIONS":
        return Response(status=204, headers={"Allow": allowed})
    sentence = "Use POST." if "POST" in allowed else "Use GET."
    response = refuse(Refused(sentence, code="method_not_allowed", status=405))
    response.headers["Allow"] = allowed
    return response


def streamed(source: StreamIterable, refuse: Refuse = refuse) -> StreamResponse:
    """What a view returns for a stream. With what `drop` needs, should the app not send it."""
    request.environ[_UNWALKED] = source
    return StreamResponse(source, refuse)


def drop(error: BaseException | None) -> None:
    """Ends a stream that no server will walk: the app gave another answer after our view."""
    source = request.environ.pop(_UNWALKED, None)
    if source is not None:
        source.drop()


class StreamResponse(Response):
    """A response that is begun by its iterable's first `next`.

    By then Flask's contexts are popped: no database connection of the app waits with us. And by
    then it is known whether the provider refused, so a refusal still has its true status
    (PEP 3333 lets the iterable call `start_response` before its first bytes).
    """

    def __init__(self, source: StreamIterable, refuse: Refuse) -> None:
        stream = source.stream
        super().__init__(source, content_type=stream.media_type, direct_passthrough=True)
        self.headers["X-Session-Id"] = stream.session_id
        self.headers["X-Stream-Id"] = stream.stream_id
        self.headers["Cache-Control"] = "no-cache, no-transform"
        self.headers["X-Accel-Buffering"] = "no"
        self._source = source
        self._refuse = refuse

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ.pop(_UNWALKED, None)
        return _Begun(self, self._source, environ, start_response)

    def without_bytes(self) -> bytes:
        """The stream has ended without any: in an error, or with nothing of the provider's to say.

        Returns:
            The whole body; status and headers are those that go with it.
        """
        error = self._source.refusal
        if error is None:
            return self._source.stream.last_words()
        response = self._refuse(error)
        self.status = response.status
        self.headers.update(response.headers)
        del self.headers["X-Accel-Buffering"]
        return response.get_data()


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
        self._source.drop()

    def _start(self, data: bytes) -> bytes:
        """Sends status and headers; returns the first bytes."""
        response = self._response
        data = data or response.without_bytes()
        self._start_response(
            response.status, response.get_wsgi_headers(self._environ).to_wsgi_list()
        )
        return data
