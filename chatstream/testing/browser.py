"""Browser: asks an app over real sockets, as a visitor's does, and leaves when told to."""

from __future__ import annotations

import contextlib
import http.client
import json as json_
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request

from chatstream import sse
from chatstream.testing.provider import checked

_CHUNK = 65536


@dataclass(frozen=True)
class Event:
    """One Server-Sent Event.

    Attributes:
        data: Its data, such as a chunk of the provider's JSON, or "[DONE]".
        type: Its type: "message", or "error" where chatstream tells of a fault.
    """

    data: str
    type: str = "message"

    @property
    def json(self) -> Any:
        """The data as JSON; None where it is none."""
        try:
            return json_.loads(self.data)
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """What the model says with it; "" if nothing."""
        try:
            return self.json["choices"][0]["delta"].get("content") or ""
        except (TypeError, LookupError, AttributeError):
            return ""


@dataclass(frozen=True)
class Reply:
    """A whole response.

    Attributes:
        status: The HTTP status.
        headers: Its headers; names in any case.
        body: Its bytes.
    """

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON. Raises ValueError where it is none."""
        return json_.loads(self.body)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")


class Browser:
    """One visitor: a cookie jar, and a connection for every request. One thread at a time.

    Follows no redirects.

    Attributes:
        url: The server's address, without a slash at its end.
        headers: What is sent with every request, such as an `Authorization`. A `Cookie` here takes
            the place of the jar's.
        cookies: The cookies it was given.
        timeout: Seconds that the server may be silent when something is waited for.
    """

    def __init__(self, url: str, *, prefix: str = "/api/chat", timeout: float = 10.0) -> None:
        """
        Args:
            url: The server's address.
            prefix: Where chatstream's routes are: CHATSTREAM_URL_PREFIX.
            timeout: See above.
        """
        self.url = url.rstrip("/")
        self.headers: dict[str, str] = {}
        # Apps mark their cookies as for https only, and browsers send those to this machine too.
        self.cookies = CookieJar(DefaultCookiePolicy(secure_protocols=("http", "https")))
        self.timeout = timeout
        self._prefix = prefix
        self._answers: list[Answer] = []

    def ask(
        self,
        question: str | list[dict[str, Any]],
        *,
        session_id: str | None = None,
        stream_id: str | None = None,
        script: Mapping[str, Any] | None = None,
        path: str | None = None,
        headers: Mapping[str, str] | None = None,
        wait: bool = True,
        **fields: Any,
    ) -> Answer:
        """Asks, and waits for the answer's first event, or the whole of a refusal.

        Args:
            question: What the user says, or the whole list of messages.
            session_id: The chat; made up when None.
            stream_id: The answer's own name; made up when None.
            script: How the provider is to behave with this one: see `Provider.script`.
            path: Where to post to; None: chatstream's own route.
            headers: For this request only.
            wait: False returns as soon as the request is sent.
            fields: Further fields of the request, such as `model`.

        Raises:
            ValueError: The script has a wrong key or value.
            AssertionError: Nothing comes for `timeout` seconds.
        """
        __tracebackhide__ = True
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else question
        session, stream = session_id or uuid.uuid4().hex, stream_id or uuid.uuid4().hex
        simulate = {**checked(script or {}), "id": stream}
        body: dict[str, Any] = {"messages": asked, "simulate": simulate, **fields}
        sent = {**(headers or {})}
        if path is None:
            body |= {"sessionId": session, "streamId": stream}
        else:  # OpenAI's has no room for them in the body
            sent = {"X-Session-Id": session, "X-Stream-Id": stream, **sent}
        connection = self._send("POST", path or f"{self._prefix}/stream", body, None, sent)
        answer = Answer(self, connection, session, stream)
        self._answers.append(answer)
        if wait:
            answer.wait()
        return answer

    def cancel(self, answer: Answer | str, stream_id: str | None = None) -> Reply:
        """Posts the cancel for an answer, or for a session id, as this visitor.

        The reply comes after the provider was told, see docs/wire.md. `Answer.cancel`
        does it as the visitor who asked, and notes the instant.
        """
        session = answer if isinstance(answer, str) else answer.session_id
        stream = stream_id if isinstance(answer, str) else answer.stream_id
        query = f"?{urlencode({'streamId': stream})}" if stream else ""
        return self.post(f"{self._prefix}/cancel/{quote(session, safe='')}{query}")

    def get(self, path: str, *, headers: Mapping[str, str] | None = None) -> Reply:
        """GETs a path of the app's."""
        return self.request("GET", path, headers=headers)

    def post(
        self,
        path: str,
        *,
        json: Any = None,
        data: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """POSTs JSON, or a form's `data`, to a path of the app's."""
        return self.request("POST", path, json=json, data=data, headers=headers)

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        data: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Any request, and its whole response. Raises OSError where none comes."""
        connection = self._send(method, path, json, data, headers or {})
        try:
            with self._response(connection) as response:
                return Reply(response.status, response.headers, response.read())
        finally:
            connection.connection.close()

    def close(self) -> None:
        """Closes the connections of all answers: the tabs are gone. Idempotent."""
        while self._answers:
            self._answers.pop().close()

    def _send(
        self,
        method: str,
        path: str,
        json: Any,
        data: Mapping[str, str] | None,
        headers: Mapping[str, str],
    ) -> _Connection:
        body, kind = b"", None
        if json is not None:
            body, kind = json_.dumps(json).encode(), "application/json"
        elif data is not None:
            body, kind = urlencode(data).encode(), "application/x-www-form-urlencoded"
        request = Request(f"{self.url}{path}", method=method)
        for name, value in {**self.headers, **headers}.items():
            request.add_header(name, value)
        self.cookies.add_cookie_header(request)
        if kind is not None and not request.has_header("Content-type"):
            request.add_header("Content-Type", kind)
        host = urlsplit(self.url)
        connection = http.client.HTTPConnection(
            host.hostname or "", host.port or 80, timeout=self.timeout
        )
        try:
            connection.request(method, request.selector, body, dict(request.header_items()))
        except BaseException:
            connection.close()
            raise
        assert isinstance(connection.sock, socket.socket)
        return _Connection(connection, connection.sock, request)

    def _response(self, connection: _Connection) -> http.client.HTTPResponse:
        response = connection.connection.getresponse()
        self.cookies.extract_cookies(response, connection.request)
        return response


@dataclass(frozen=True)
class _Connection:
    """A request that was sent. `HTTPConnection` forgets its socket when the response begins."""

    connection: http.client.HTTPConnection
    sock: socket.socket
    request: Request


class Answer:
    """What a visitor sees of one answer. One thread at a time.

        for event in answer:
            ...  # every event, from the first on, as it comes

    It reads only when it is asked for something that has not come yet.

    Attributes:
        session_id: The chat's name.
        stream_id: The answer's own, also towards the provider.
        events: The events read so far; comments are none.
        ended: Whether the body's end was read.
        broken: Whether that end was a connection that broke off.
        stopped_ns: The instant (`time.monotonic_ns`) at which `stop`, `close` or `cancel` was
            called first; None before.
    """

    def __init__(
        self, browser: Browser, connection: _Connection, session_id: str, stream_id: str
    ) -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.events: list[Event] = []
        self.ended = False
        self.broken = False
        self.stopped_ns: int | None = None
        self._browser = browser
        self._connection = connection
        self._started: http.client.HTTPResponse | None = None
        self._splitter = sse.Splitter()
        self._body = b""  # of what is no event stream

    def __repr__(self) -> str:
        state = "ended" if self.ended else "open" if self.stopped_ns is None else "stopped"
        refused = self._started is not None and self._started.status != 200
        seen = f"status {self.status}" if refused else f"{len(self.events)} events"
        return f"<Answer {self.session_id}/{self.stream_id} {state}, {seen}>"

    def __iter__(self) -> Iterator[Event]:
        """Every event from the first on; waits for those to come. Raises as `wait` does."""
        number = 0
        while number < len(self.events) or self._read_on():
            while number < len(self.events):
                yield self.events[number]
                number += 1

    @property
    def status(self) -> int:
        """The HTTP status; waits for it."""
        return self._response().status

    @property
    def headers(self) -> Message:
        """The response's headers; waits for them."""
        return self._response().headers

    @property
    def json(self) -> Any:
        """The body of a refusal, or of any answer in one piece, as JSON. Reads it to its end."""
        self.read()
        return json_.loads(self._body)

    @property
    def text(self) -> str:
        """What the model has said, as far as it was read."""
        return "".join(event.text for event in self.events)

    @property
    def error(self) -> Any:
        """What an error event among those read says: `message`, `type`, `code`; else None."""
        for event in self.events:
            if isinstance(event.json, dict) and event.json.get("error"):
                return event.json["error"]
        return None

    def wait(self, events: int = 1) -> Answer:
        """Reads until so many events are there, or the end.

        Raises:
            AssertionError: Nothing came for the browser's `timeout`.
        """
        __tracebackhide__ = True
        while len(self.events) < events and self._read_on():
            pass
        return self

    def read(self) -> str:
        """Reads to the end. Returns the whole text. Raises as `wait` does."""
        __tracebackhide__ = True
        while self._read_on():
            pass
        return self.text

    def stop(self) -> Reply:
        """Stops as the Stop button does: leaves, and posts the cancel.

        Returns:
            The cancel's reply: 404 where leaving was enough.
        """
        self.close()
        return self._browser.cancel(self)

    def cancel(self) -> Reply:
        """Posts the cancel and stays, to read what is left."""
        self._note_stop()
        return self._browser.cancel(self)

    def close(self) -> None:
        """Leaves, as a tab that is closed: the connection ends, and nothing is posted. Idempotent.

        What was read stays.
        """
        self._note_stop()
        with contextlib.suppress(OSError):  # it has ended
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        if self._started is not None:
            self._started.close()
        self._connection.connection.close()
        self.ended = True

    def _note_stop(self) -> None:
        if self.stopped_ns is None:
            self.stopped_ns = time.monotonic_ns()

    def _response(self) -> http.client.HTTPResponse:
        __tracebackhide__ = True
        if self._started is None:
            try:
                self._started = self._browser._response(self._connection)
            except TimeoutError:
                raise self._silence() from None
            self.session_id = self._started.headers.get("X-Session-Id", self.session_id)
            self.stream_id = self._started.headers.get("X-Stream-Id", self.stream_id)
        return self._started

    def _read_on(self) -> bool:
        """Reads what comes next. Returns whether anything may follow."""
        __tracebackhide__ = True
        if self.ended:
            return False
        response = self._response()
        try:
            data = response.read1(_CHUNK)
        except TimeoutError:
            raise self._silence() from None
        except (OSError, http.client.HTTPException):
            data, self.broken = b"", True
        self.ended = not data
        if response.headers.get_content_type() == "text/event-stream":
            self._take(data)
        else:
            self._body += data
        return not self.ended

    def _take(self, data: bytes) -> None:
        for block in self._splitter.feed(data):
            value, kind = sse.fields(block)
            if value is not None:
                self.events.append(Event(value.decode(), kind.decode() or "message"))

    def _silence(self) -> AssertionError:
        so_far = f"{len(self.events)} events" if self._started else "not even a status"
        return AssertionError(
            f"The answer {self.stream_id!r} was silent for {self._browser.timeout:g} s, after"
            f" {so_far}: {self.text!r}."
        )
