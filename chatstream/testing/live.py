"""Live: an app behind a real server, in threads of the test's process."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import TYPE_CHECKING, Any

from werkzeug.serving import WSGIRequestHandler, make_server

from chatstream.telemetry.signals import stream_ended
from chatstream.testing.answer import Answer
from chatstream.testing.browser import Browser
from chatstream.testing.provider import service_of
from chatstream.testing.threads import join

if TYPE_CHECKING:
    from flask import Flask

    from chatstream.stream.outcome import Outcome


STREAMS = 64
"""Stream slots, where the app's settings say nothing: werkzeug's threads have no bound."""

_POLL = 0.02
"""Seconds until werkzeug's loop sees that it is to end."""


class Live(Browser):
    """A Flask app on a port of 127.0.0.1, and a first browser to ask it with.

        with Live(app) as live:
            answer = live.ask("Tell me a story.")

    The server is werkzeug's, with a thread for each request: what `flask run` is.
    """

    def __init__(self, app: Flask, *, timeout: float = 10.0) -> None:
        """Serves until `close`.

        Args:
            app: The Flask app in which a ChatStream is mounted. Its provider is the one of its
                settings: see `Provider.attach`.
            timeout: Seconds that the app may be silent when something is waited for.

        Raises:
            LookupError: No ChatStream is mounted in the app.
        """
        self._service = service_of(app)
        self._settings = settings = self._service.settings
        if settings.max_streams is None:
            self._service.reconfigure(dataclasses.replace(settings, max_streams=STREAMS))
        self._outcomes: dict[str, Outcome] = {}
        self._news = threading.Condition()  # guards the above
        self._app = app
        stream_ended.connect(self._note, app)
        self._handlers: set[threading.Thread] = set()
        self._server = make_server(
            "127.0.0.1", 0, app, threaded=True, request_handler=_handler(self._handlers)
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL,), name="chatstream-live", daemon=True
        )
        self._thread.start()
        self._browsers: list[Browser] = []
        super().__init__(
            f"http://127.0.0.1:{self._server.port}", prefix=settings.url_prefix, timeout=timeout
        )

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def browser(self) -> Browser:
        """Another visitor, with cookies of its own."""
        browser = Browser(self.url, prefix=self._settings.url_prefix, timeout=self.timeout)
        self._browsers.append(browser)
        return browser

    def outcome(self, answer: Answer | str, *, timeout: float | None = None) -> Outcome:
        """How a stream ended, as the log says it: waits for that.

        `outcome.words` is the log's: "completed", "aborted by client/cancel", "failed: …".

        Args:
            answer: What `ask` returned, or a stream id.
            timeout: Seconds; None: the browser's.

        Raises:
            AssertionError: It has not ended in time.
        """
        __tracebackhide__ = True
        name = answer if isinstance(answer, str) else answer.stream_id
        seconds = self.timeout if timeout is None else timeout
        with self._news:
            if not self._news.wait_for(lambda: name in self._outcomes, seconds):
                ended = ", ".join(map(repr, self._outcomes)) or "none"
                raise AssertionError(
                    f"The stream {name!r} has not ended within {seconds:g} s. Ended: {ended}."
                )
            return self._outcomes[name]

    def close(self) -> None:
        """Closes all browsers' connections, aborts what streams, ends the server. Idempotent.

        The app gets its own settings back. Warns of requests that are still being answered after
        five seconds: their threads cannot be ended from outside.
        """
        for browser in self._browsers:
            browser.close()
        super().close()
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._thread.join()
        self._service.reconfigure(self._settings)
        stuck = join(self._handlers)
        stream_ended.disconnect(self._note, self._app)
        if stuck:
            message = f"{stuck} requests to the app are still being answered, by {self.url}"
            warnings.warn(message, ResourceWarning, stacklevel=2)

    def _note(self, _app: Flask, outcome: Outcome) -> None:
        with self._news:
            self._outcomes[outcome.stream_id] = outcome
            self._news.notify_all()


def _handler(threads: set[threading.Thread]) -> type[WSGIRequestHandler]:
    """A handler of werkzeug's that is not chatty, and says which threads answer requests."""

    class Handler(WSGIRequestHandler):
        def handle(self) -> None:
            threads.difference_update(t for t in list(threads) if not t.is_alive())
            threads.add(threading.current_thread())
            super().handle()

        def log_request(self, *_: Any) -> None:
            pass

    return Handler
