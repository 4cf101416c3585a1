"""Browser: asks an app over real sockets, as a visitor's does, and leaves when told to."""

from __future__ import annotations

import http.client
import json as json_
import socket
import uuid
from collections.abc import Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request

from chatstream.testing.answer import Answer, Reply, Sent
from chatstream.testing.script import checked


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
    ) -> Sent:
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
        return Sent(connection, connection.sock, request)

    def _response(self, connection: Sent) -> http.client.HTTPResponse:
        response = connection.connection.getresponse()
        self.cookies.extract_cookies(response, connection.request)
        return response
