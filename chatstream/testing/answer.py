"""Answer: what a visitor sees of one answer."""

from __future__ import annotations

import contextlib
import http.client
import json as json_
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any, Protocol
from urllib.request import Request

from chatstream.dialects import sse

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


@dataclass(frozen=True)
class Sent:
    """A request that was sent. `HTTPConnection` forgets its socket when the response begins."""

    connection: http.client.HTTPConnection
    sock: socket.socket
    request: Request


class Visitor(Protocol):
    """Whose answer it is: a `Browser`."""

    timeout: float

    def cancel(self, answer: Answer) -> Reply: ...
    def _response(self, connection: Sent) -> http.client.HTTPResponse: ...


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

    def __init__(self, browser: Visitor, connection: Sent, session_id: str, stream_id: str) -> None:
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
