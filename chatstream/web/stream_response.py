"""StreamResponse: a response that begins with its iterable's first `next`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flask import Response, request

from chatstream.stream.iterable import StreamIterable
from chatstream.stream.sides import Detachable, Exchange
from chatstream.web.replies import Refuse, refuse

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


_UNWALKED = "chatstream.unwalked"
"""In the environ: a stream whose response has not been given to the server yet."""


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
        # What the app has put in our body's place is what is sent, and somebody has to walk it.
        begun = _Begun if self.response is self._source else _Walked
        return begun(self, self._source, environ, start_response)

    def without_bytes(self) -> bytes:
        """The stream has ended without any: in an error, or with nothing of the provider's to say.

        Returns:
            The whole body; status and headers are those that go with it.
        """
        error = self._source.refusal
        if error is None:
            data = self._source.stream.last_words()
        else:
            response = self._refuse(error)
            data = response.get_data()
            self.status = response.status
            self.headers.update(response.headers)
            del self.headers["X-Accel-Buffering"]
        if self.response is not self._source:  # then what is said of that body holds no more
            if hasattr(self.response, "close"):
                self.call_on_close(self.response.close)
            self.response = [data]
            for name in ("Content-Encoding", "Content-Length", "ETag"):
                self.headers.pop(name, None)
        return data


class _Walked:
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
        self._pieces = iter(response.iter_encoded())
        self._started = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data = next(filter(None, self._pieces), b"")
        if not self._started:
            self._started = True
            if self._source.said_nothing:  # what was made of nothing, as gzip's end, is no answer
                data = b""
            data = self._start(data)
        if not data:
            raise StopIteration
        return data

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
        if not data and self._source.stream.ended:
            data = response.without_bytes()
        self._start_response(
            response.status, response.get_wsgi_headers(self._environ).to_wsgi_list()
        )
        return data


class _Begun(_Walked, Detachable):
    """The same, where nothing stands in our body's place: nobody has to walk it."""

    def detach(self, exchange: Exchange) -> bool:
        return self._source.detach(exchange, self._start)
