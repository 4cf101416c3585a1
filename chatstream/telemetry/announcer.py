"""What is said of streams: the log's lines, and the signals to who listens."""

from __future__ import annotations

import contextvars
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from blinker import Signal

from chatstream.dialects.openai_chat import prompt_tokens
from chatstream.stream.outcome import Cancelled, Kind, Outcome, Started
from chatstream.stream.stream import Stream
from chatstream.stream.tally import Tally
from chatstream.stream.transcript import Transcript
from chatstream.telemetry.signals import cancel_answered, needs_text, stream_ended, stream_started

if TYPE_CHECKING:
    from flask import Flask


log = logging.getLogger("chatstream")


class Announcer:
    """Says what becomes of an app's streams. In the threads that serve them, never in the loop's.

    What a listener raises is logged, and harms nobody: also its `sys.exit()`, which would end a
    worker of gunicorn's with all its streams, and gevent's Timeout. Only in the main thread, where
    such may be a signal's, is it raised again; then all have been told.
    """

    def __init__(self, app: Flask | None) -> None:
        """
        Args:
            app: The signals' sender; without one nobody listens. Not kept: only looked at while it
                lives.
        """
        self._app = weakref.ref(app) if app is not None else _nobody

    def started(self, stream: Stream) -> None:
        """A stream has its slot and its names."""
        names = {"session_id": stream.session_id, "stream_id": stream.stream_id}
        log.info("[SSE] %s started stream=%s", *names.values(), extra=names)
        if self._is_heard(stream_started):
            started = Started(stream.session_id, stream.stream_id, stream.owner)
            self._tell(stream_started, started=started)

    def ended(self, outcome: Outcome) -> None:
        """To who listens: a stream is over. The log has said so before, see `log_outcome`."""
        self._tell(stream_ended, outcome=outcome)

    def cancelled(self, cancel: Cancelled) -> None:
        """A cancel has its answer."""
        self._tell(cancel_answered, cancel=cancel)

    def transcript(self, payload: bytes, stream: Stream) -> Transcript | None:
        """What keeps of an answer what they need who listen."""
        if not self._is_heard(stream_ended):
            return None
        whole = stream.media_type == "application/json"
        if whole or self.has_readers():
            return Transcript(prompt_tokens(payload), whole=whole)
        return Tally()

    def has_readers(self) -> bool:
        """Whether somebody listens to `stream_ended` for more than figures."""
        app = self._app()
        return app is not None and any(map(needs_text, stream_ended.receivers_for(app)))

    def _is_heard(self, signal: Signal) -> bool:
        if not signal.receivers:  # nobody's, whatever the app
            return False
        app = self._app()
        return app is not None and signal.has_receivers_for(app)

    def _tell(self, signal: Signal, **value: object) -> None:
        """Outside of any request, in an empty context.

        What the thread has of a request, or of another app's, is no business of a listener's.
        """
        app = self._app()
        if app is None or not signal.has_receivers_for(app):
            return
        told = [
            contextvars.Context().run(_call, listener, app, value)
            for listener in signal.receivers_for(app)
        ]
        if threading.current_thread() is threading.main_thread():
            for error in filter(None, told):
                raise error


def _call(
    listener: Callable[..., object], app: Flask, value: Mapping[str, object]
) -> BaseException | None:
    """Returns what is more than the listener's fault, if it may be."""
    try:
        with app.app_context():
            listener(app, **value)
    except BaseException as error:  # its fault is no stream's
        log.exception("[SSE] a listener failed: %r", listener)
        return None if isinstance(error, Exception) else error
    return None


def _nobody() -> None:
    """In the place of a reference to an app."""


def log_outcome(outcome: Outcome) -> None:
    """The one terminal line of a stream."""
    facts = (
        f"phase={outcome.phase.value} stream={outcome.stream_id} events={outcome.events}"
        f" bytes={outcome.bytes} duration={outcome.duration:.3f}s"
    )
    if outcome.client_left:
        facts += " client=left"
    if outcome.kind is Kind.FAILED:
        detail = f' detail="{outcome.detail}"' if outcome.detail else ""
        log.warning(
            "[SSE] %s %s %s%s",
            outcome.session_id,
            outcome.words,
            facts,
            detail,
            extra=outcome.facts,
        )
    elif outcome.cause is not None:
        log.info(
            "[SSE] %s %s cause=%s %s stop_ms=%.3f",
            outcome.session_id,
            outcome.words,
            outcome.cause.value,
            facts,
            outcome.stop_ms,
            extra=outcome.facts,
        )
    else:
        log.info("[SSE] %s %s %s", outcome.session_id, outcome.words, facts, extra=outcome.facts)
