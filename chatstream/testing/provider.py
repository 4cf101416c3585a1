"""Provider: the built-in provider in a thread of the test's process, and what it was told."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import select
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from chatstream.simulator import Simulator
from chatstream.testing.script import checked
from chatstream.workers import draining

if TYPE_CHECKING:
    from flask import Flask

    from chatstream.service.service import Service
    from chatstream.settings.table import Settings
    from chatstream.testing.answer import Answer


Until = Literal["started", "headers", "delivered", "closed"]

TIMEOUT = 10.0
"""Seconds that a condition may take to come true, where a test does not say otherwise."""

_BY_THE_CLIENT = ("client", "reset")
"""How a request ends of which the provider was told: by our FIN or our RST."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """What became of one request to the provider. Instants are of `time.monotonic_ns`.

    Attributes:
        id: The request's name: of an `Answer`, its stream id.
        path: The path it came to.
        headers: Its headers, names in lower case; of `authorization` only that it is "present".
        body: Its JSON, as the app sent it.
        tokens: Of the whole answer.
        generated: Tokens made: by the provider's clock, whether or not anybody takes them.
        delivered: Tokens that the kernel took for the app.
        closed_by: None while it is open. "client" or "reset": the app closed, so the provider was
            told; "finished": the answer was whole; else the key of the script that ended it.
        started_ns: When it came.
        headers_ns: When the answer's headers were sent.
        first_token_ns: When the first token was sent.
        closed_ns: When it ended.
        stop_ms: Milliseconds from the test's stop to the end; None while one of them is missing.
        tokens_after: Tokens made after that stop: what it cost. None if there was no stop.
    """

    id: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    tokens: int
    generated: int
    delivered: int
    closed_by: str | None
    started_ns: int
    headers_ns: int | None
    first_token_ns: int | None
    closed_ns: int | None
    stop_ms: float | None = None
    tokens_after: int | None = None

    @property
    def open(self) -> bool:
        """Whether the answer goes on."""
        return self.closed_ns is None

    def __str__(self) -> str:
        state = "still open" if self.open else f"closed by {self.closed_by!r}"
        return (
            f"request {self.id!r} is {state}: {self.generated} of {self.tokens} tokens generated,"
            f" {self.delivered} delivered"
        )


class Provider:
    """An OpenAI-compatible provider on 127.0.0.1 that measures as well as it answers.

        with Provider(rate=5, silent_after=3) as provider: ...

    It is `chatstream.simulator` in a thread. Safe from any thread, `attach` and `close` apart.

    Attributes:
        url: The address of its chat API.
        key: A key for it. It takes any.
        timeout: Seconds that `wait` and `told` have, unless they are told otherwise.
    """

    def __init__(self, **script: Any) -> None:
        """Listens and serves, until `close`.

        Args:
            script: See `script`.

        Raises:
            ValueError: The script has a wrong key or value.
            RuntimeError: The process has no epoll.
        """
        if not hasattr(select, "epoll"):
            raise RuntimeError(
                "The provider needs Linux, and a process that gevent has not patched. Run it beside"
                " the tests, python -m chatstream.simulator, and set CHATSTREAM_UPSTREAM_URL."
            )
        self._simulator = Simulator(defaults=checked(script)).start()
        self._attached: dict[Service, Settings] = {}  # and their own settings
        self.url = self._simulator.url
        self.key = "chatstream-testing"
        self.timeout = TIMEOUT

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the provider, and what apps have to do with it. Idempotent.

        Streams are aborted, and idle connections closed, of every app that was pointed here, also
        by its own settings. Attached ones get theirs back.
        """
        for service in draining.services():
            if service.settings.upstream_url == self.url:
                service.stop()
        while self._attached:
            attached, settings = self._attached.popitem()
            attached.reconfigure(settings)
        self._simulator.close()

    def attach(self, app: Flask) -> None:
        """Has an app call this provider until `close`, whatever its settings say.

        For an app that has read its settings already, such as one that is made at import time.
        Streams of its that live are aborted.

        Raises:
            LookupError: No ChatStream is mounted in the app.
        """
        __tracebackhide__ = True
        service = service_of(app)
        self._attached.setdefault(service, service.settings)
        service.reconfigure(
            dataclasses.replace(service.settings, upstream_url=self.url, api_key=self.key)
        )

    def script(self, **script: Any) -> None:
        """Says how the requests to come are answered, in the place of what was said before.

        Without arguments, as at first: 200 tokens, 20 a second.

        Args:
            script: Keys of `chatstream.simulator.Plan`. Those for most tests:
                tokens, rate: how many, and how many a second; rate=0: as fast as they are taken.
                text: what it says.
                headers_after: seconds until its headers.
                silent_after: tokens before it falls silent (and goes on to count what it makes).
                status, retry_after, message: a refusal.
                error_after, truncate_after, reset_after: tokens before it breaks.

        Raises:
            ValueError: A key is not known or its value wrong; the message says what it takes.
        """
        __tracebackhide__ = True
        self._simulator.behave(checked(script))

    def requests(self) -> list[Figure]:
        """What became of every request so far, oldest first."""
        status, figures = self._get("/requests")
        assert status == 200
        return [_figure(figure) for figure in figures]

    def figure(self, answer: Answer | Figure | str) -> Figure:
        """What became of a request until now.

        Args:
            answer: What a browser was given for it, or the request's figure or name.

        Raises:
            AssertionError: The provider does not know it.
        """
        __tracebackhide__ = True
        return self.wait(answer, timeout=0)

    def wait(
        self,
        answer: Answer | Figure | str,
        until: Until = "started",
        count: int = 1,
        *,
        timeout: float | None = None,
    ) -> Figure:
        """Waits until a request has come so far.

        Args:
            answer: As in `figure`. The request need not have come yet.
            until: "started": it came; "headers": the answer's headers were sent; "delivered":
                `count` tokens were; "closed": it is over, whichever way.
            count: Tokens.
            timeout: Seconds; None: the provider's.

        Raises:
            AssertionError: It did not come so far in time, or ended before; with the figures.
        """
        __tracebackhide__ = True
        name, since = _name(answer), getattr(answer, "stopped_ns", None)
        seconds = self.timeout if timeout is None else timeout
        query = {"wait": until, "count": count, "timeout": seconds}
        status, found = self._get(
            f"/requests/{quote(name, safe='')}?{urlencode(query | _after(since))}"
        )
        if status == 404:
            raise AssertionError(self._unknown(answer, seconds))
        figure = _figure(found, since)
        if not _reached(figure, until, count):
            wanted = f"{count} delivered" if until == "delivered" else until
            raise AssertionError(f"Not {wanted!r} within {seconds:g} s: {figure}.")
        return figure

    def told(self, answer: Answer | Figure | str, *, timeout: float | None = None) -> Figure:
        """Waits until the app has closed the connection of a request: the provider was told.

        Args:
            answer: As in `figure`.
            timeout: As in `wait`.

        Returns:
            The figures, of which none changes any more.

        Raises:
            AssertionError: The request goes on, or ended by itself before it was stopped.
        """
        __tracebackhide__ = True
        figure = self.wait(answer, "closed", timeout=timeout)
        if figure.closed_by not in _BY_THE_CLIENT:
            raise AssertionError(f"The provider was not told to stop: {figure}.")
        return figure

    def _unknown(self, answer: object, seconds: float) -> str:
        others = ", ".join(repr(figure.id) for figure in self.requests()) or "none"
        return (
            f"The provider got no request {answer!r} within {seconds:g} s; it knows of: {others}."
            " (The name travels in the question's field `simulate`. An app that does not pass it"
            " on is asked about through requests().)"
        )

    def _get(self, path: str) -> tuple[int, Any]:
        # Over its own routes: they wait in its thread, and answer with what is true at one instant.
        connection = http.client.HTTPConnection("127.0.0.1", self._simulator.port)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def service_of(app: Flask) -> Service:
    """The app's `Service`. Raises LookupError where there is none."""
    __tracebackhide__ = True
    if "chatstream" not in getattr(app, "extensions", {}):
        raise LookupError(
            f"No ChatStream is mounted in {app!r}. Give the Flask app itself, after"
            " ChatStream(app) or init_app(app)."
        )
    service: Service = app.extensions["chatstream"]
    return service


def without_proxy() -> dict[str, str]:
    """Environment variables with which 127.0.0.1 is not asked for through a proxy."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    value = f"{known},127.0.0.1" if known else "127.0.0.1"
    return {"no_proxy": value, "NO_PROXY": value}


def _name(answer: Answer | Figure | str) -> str:
    if isinstance(answer, str):
        return answer
    return answer.id if isinstance(answer, Figure) else answer.stream_id


def _after(since: int | None) -> dict[str, int]:
    return {} if since is None else {"after": since}


def _figure(values: Mapping[str, Any], since: int | None = None) -> Figure:
    fields = {field.name for field in dataclasses.fields(Figure)}
    known = {key: value for key, value in values.items() if key in fields}
    closed = values["closed_ns"]
    both = since is not None and closed is not None
    return Figure(
        **known,
        stop_ms=(closed - since) / 1e6 if both else None,
        tokens_after=values.get("generated_after"),
    )


def _reached(figure: Figure, until: Until, count: int) -> bool:
    if until == "headers":
        return figure.headers_ns is not None
    if until == "delivered":
        return figure.delivered >= count
    return until == "started" or not figure.open
