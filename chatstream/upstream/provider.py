"""The call to the provider, and the judgement of its answer.

requests does what it is good at: TLS, proxies from the environment. What a stop must reach is ours:
dialling and pooling (`chatstream.upstream.pool`), and reading (`chatstream.upstream.body`).
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import requests
from requests.auth import AuthBase

from chatstream.dialects import sse
from chatstream.dialects.openai_chat import sentence
from chatstream.errors import Busy, StreamAborted, StreamError, UpstreamError
from chatstream.settings.table import Settings
from chatstream.stream.sides import Body
from chatstream.stream.stream import Stream
from chatstream.upstream.body import MockedBody, SocketBody
from chatstream.upstream.dialling import Call, serving
from chatstream.upstream.faults import FAULTS, mapped, refused
from chatstream.upstream.pool import Adapter
from chatstream.upstream.threads import CallThreads

_ERROR_BODY = 64 * 1024

_ERROR_PATIENCE = 5.0

_OURS = re.compile(
    r"authorization|proxy-.*|content-.*|accept|accept-.*|host|user-agent|cookie"
    r"|connection|keep-alive|transfer-encoding|te|trailer|upgrade|expect",
    re.IGNORECASE,
)
"""Headers of the provider's request that are nobody else's: what we say in them has to hold."""

log = logging.getLogger("chatstream")


class Upstream:
    """Calls one provider over a pool of connections. Make it after fork. Safe from any thread."""

    def __init__(
        self,
        settings: Settings,
        max_streams: int,
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        """
        Args:
            settings: Address, key and timeouts.
            max_streams: The pool's size.
            call_later: Runs something in the loop's thread, with which idle connections end.
        """
        self._url = settings.upstream_url
        self._key = settings.api_key
        self._timeout = (settings.upstream_connect_timeout, settings.upstream_headers_timeout)
        self._adapter = Adapter(max_streams, call_later)
        self._prepared: _Prepared | None = None
        self._threads = CallThreads()

    def begin(self, payload: bytes, stream: Stream, over: Callable[[], object]) -> None:
        """Calls the provider in a thread of the call's own, which ends when its headers are in.

        Does not wait: `stream` is told of the answer, or fails.

        Args:
            payload: See `open`.
            stream: See `open`.
            over: Called once, when the call needs nothing more.
        """
        try:
            self._threads.run(partial(self._call, payload, stream, over))
        except RuntimeError:  # can't start new thread
            stream.fail(Busy("This worker has no free thread. Please try again."))
            over()

    def _call(self, payload: bytes, stream: Stream, over: Callable[[], object]) -> None:
        try:
            body = self.open(payload, stream)
            if not stream.answered(body):
                body.close()
        except StreamAborted:
            pass
        except StreamError as error:
            stream.fail(error)
        except Exception:
            names = {"session_id": stream.session_id, "stream_id": stream.stream_id}
            log.exception("[SSE] %s stream=%s", *names.values(), extra=names)
            stream.fail(UpstreamError("The provider could not be called."))
        finally:
            over()

    def open(self, payload: bytes, stream: Stream) -> Body:
        """Sends `payload` and returns the provider's answer. Blocks until its headers are in.

        Args:
            payload: The provider's chat request, as JSON.
            stream: Whose call it is; a stop of it ends this at once.

        Raises:
            StreamAborted: The stream ended meanwhile.
            Busy: The process has no descriptor left.
            UpstreamError: The provider refused, failed, or was not reached.
        """
        call = Call(stream)
        try:
            response = self._post(payload, call)
        except BaseException as error:
            stream.disarm()
            if isinstance(error, FAULTS):
                stream.check()
                raise mapped(error) from error
            raise
        body = _body(response, call)
        try:
            self._judge(response, body, stream.media_type)
        except BaseException:
            body.close()
            raise
        body.let_go()
        return body

    def close(self) -> None:
        """Closes the idle connections, ends the idle threads."""
        self._threads.close()
        self._adapter.close()

    def _post(self, payload: bytes, call: Call) -> requests.Response:
        try:
            return self._send(payload, call)
        except requests.ConnectionError:
            if not call.reused or call.answered or call.stream.ended:
                raise
        log.info(
            "[SSE] %s stream=%s the provider had closed an idle connection; calling once more",
            call.stream.session_id,
            call.stream.stream_id,
            extra={"session_id": call.stream.session_id, "stream_id": call.stream.stream_id},
        )
        call.fresh, call.reused = True, False
        return self._send(payload, call)

    def _send(self, payload: bytes, call: Call) -> requests.Response:
        token = serving.set(call)
        try:
            # The first calls may all prepare: they find the same.
            prepared = self._prepared = self._prepared or _prepared(self._url, self._key)
            request = prepared.request(payload, call.stream.media_type, call.stream.headers)
            # Not a session's `send`: what that adds - cookies, redirects, hooks, the environment
            # read anew - must not be, and costs more than the call.
            return self._adapter.send(request, timeout=self._timeout, **prepared.environment)
        finally:
            serving.reset(token)

    def _judge(self, response: requests.Response, body: Body, wanted: str) -> None:
        """Raises UpstreamError unless the response is an answer of the media type `wanted`."""
        status, headers = response.status_code, response.headers
        refusal = refused(status, headers.get("Retry-After"), partial(self._message, body))
        if refusal is not None:
            raise refusal
        if status != 200:
            raise _something_else(f"status {status}", wanted)
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if kind != wanted or encoding != "identity":
            raise _something_else("something else than was asked for", wanted)

    def _message(self, body: Body) -> str:
        """The provider's sentence about a rejected request."""
        try:
            return sentence(_whole(body), self._key)
        except (UpstreamError, TimeoutError):
            return ""


@dataclass(frozen=True)
class _Prepared:
    """What all requests to the provider have in common."""

    template: requests.PreparedRequest
    environment: Mapping[str, Any]

    def request(
        self, payload: bytes, wanted: str, more: Mapping[str, str]
    ) -> requests.PreparedRequest:
        request = copy.copy(self.template)
        request.headers = self.template.headers.copy()
        for name, value in more.items():
            if not _OURS.fullmatch(name):
                request.headers[name] = value
        request.headers["Accept"] = wanted
        request.headers["Content-Length"] = str(len(payload))
        request.body = payload
        return request


def _prepared(url: str, key: str) -> _Prepared:
    """Reads the environment: proxies and certificates, as requests finds them."""
    headers = {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": "chatstream",
    }
    with requests.Session() as session:
        template = session.prepare_request(
            requests.Request("POST", url, headers=headers, auth=Bearer(key))
        )
        environment = session.merge_environment_settings(url, {}, True, None, None)
    return _Prepared(template, dict(environment))


class Bearer(AuthBase):
    """The key. As an auth object, so that a .netrc cannot replace it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _body(response: requests.Response, call: Call) -> SocketBody | MockedBody:
    if call.message is None or call.sock is None:
        return MockedBody(response)
    response.request.body = None  # it is sent, may be long, and lives as long as the response
    return SocketBody(response, call.message, call.sock, call.stream)


def _whole(body: Body) -> bytes:
    """A provider's error body, as far as it is short and prompt."""
    parts: list[bytes] = []
    deadline = monotonic() + _ERROR_PATIENCE
    while sum(map(len, parts)) < _ERROR_BODY:
        part = body.receive(max(0.0, deadline - monotonic()))
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _something_else(what: str, wanted: str) -> UpstreamError:
    words = f"The provider answered with {what}."
    if wanted == sse.MEDIA_TYPE:
        return UpstreamError(words, code="upstream_not_stream")
    return UpstreamError(words, code="upstream_not_json")
