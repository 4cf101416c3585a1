"""Traces: one span for each stream, and the provider is told whose it is part of.

The room of opentelemetry, which need not be there. Without it, what a caller says of its trace goes
on to the provider as it is.

    caller ── traceparent ──> host's span, if instrumented ──> our span ── traceparent ──> provider
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from chatstream.stream.outcome import Kind, Outcome
from chatstream.stream.stream import Stream

if TYPE_CHECKING:
    from opentelemetry.trace import Span


log = logging.getLogger("chatstream")

End = Callable[[Outcome], None]
"""Ends what was begun for a stream: once, with how it ended. Never raises."""

_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_STATE = re.compile(r"[\x20-\x7e]{1,512}")
"""W3C Trace Context, sections 3.2 and 3.3: https://www.w3.org/TR/trace-context/"""

_MODEL = 128
"""Longest name of a model, in characters."""

_PROVIDERS = {
    "api.deepseek.com": "deepseek",
    "api.groq.com": "groq",
    "api.mistral.ai": "mistral_ai",
    "api.openai.com": "openai",
    "api.perplexity.ai": "perplexity",
    "api.x.ai": "x_ai",
}
"""The names that the semantic conventions for generative AI have; another has its host's."""


class Tracing(Protocol):
    """Who is told of streams. Safe from any thread, but for the loop's: an exporter may wait."""

    def begin(self, stream: Stream, payload: bytes, environ: Mapping[str, Any]) -> End | None:
        """A stream begins. May give it headers for the provider. Never raises.

        Args:
            stream: Not moved yet.
            payload: The provider's chat request.
            environ: The request's WSGI environ.
        """


def create(url: str) -> Tracing:
    """Spans where opentelemetry is installed. After a fork: it may patch, and starts what it likes.

    Args:
        url: The provider's.
    """
    try:
        return _Spans(url)
    except ImportError:
        return _PassedOn()
    except Exception:  # installed, and broken: a wrong plugin, a wrong variable
        log.exception("[trace] opentelemetry cannot be used")
        return _PassedOn()


class _PassedOn:
    """Nobody here makes spans: the provider's are the caller's children."""

    def begin(self, stream: Stream, payload: bytes, environ: Mapping[str, Any]) -> End | None:
        parent = environ.get("HTTP_TRACEPARENT")
        if parent is not None and _is_parent(parent):
            headers = {"traceparent": parent}
            state = environ.get("HTTP_TRACESTATE")
            if state is not None and _STATE.fullmatch(state):
                headers["tracestate"] = state
            stream.headers = headers
        return None


def _is_parent(value: str) -> bool:
    """Whether it is a traceparent: of version 00, or of one to come, which may be longer."""
    found = _PARENT.match(value)
    if found is None or not _STATE.fullmatch(value):
        return False
    rest = value[found.end() :]
    return not rest or (rest.startswith("-") and not value.startswith("00"))


class _Spans:
    """A span for each stream, where an SDK is set up: without one there is nobody to end it for."""

    def __init__(self, url: str) -> None:
        from opentelemetry import context, propagate, trace

        self._trace, self._propagate, self._nothing = trace, propagate, context.Context()
        self._passed_on = _PassedOn()
        self._tracer = trace.get_tracer("chatstream")
        parts = urlsplit(url)
        host = parts.hostname or ""
        self._server: dict[str, str | int] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(host, host),
            "server.address": host,
            "server.port": parts.port or (443 if parts.scheme == "https" else 80),
        }

    def begin(self, stream: Stream, payload: bytes, environ: Mapping[str, Any]) -> End | None:
        try:
            if isinstance(self._trace.get_tracer_provider(), self._trace.ProxyTracerProvider):
                return self._passed_on.begin(stream, payload, environ)
            return self._begin(stream, payload, environ)
        except Exception:
            log.exception("[trace] a span cannot be begun")
            return None

    def _begin(self, stream: Stream, payload: bytes, environ: Mapping[str, Any]) -> End | None:
        context = None
        if not self._trace.get_current_span().get_span_context().is_valid:
            context = self._propagate.extract(environ, getter=_HEADERS)
        span = self._tracer.start_span(
            "chat",
            context,
            kind=self._trace.SpanKind.CLIENT,
            start_time=time.time_ns() - int((time.monotonic() - stream.started) * 1e9),
            attributes={
                **self._server,
                "gen_ai.conversation.id": stream.session_id,
                "chatstream.stream_id": stream.stream_id,
            },
        )
        headers: dict[str, str] = {}
        # Of this span only: what else the caller's context carries (baggage) is not the provider's.
        self._propagate.inject(headers, self._trace.set_span_in_context(span, self._nothing))
        if headers:
            stream.headers = headers
        if not span.is_recording():
            return None
        if (model := _model(payload)) is not None:
            span.set_attribute("gen_ai.request.model", model)
            span.update_name(f"chat {model}")

        def end(outcome: Outcome) -> None:
            try:
                self._end(span, outcome)
            except Exception:
                log.exception("[trace] a span cannot be ended")

        return end

    def _end(self, span: Span, outcome: Outcome) -> None:
        span.set_attributes(_attributes(outcome))
        if outcome.kind is Kind.FAILED:  # a stop is none
            span.set_status(self._trace.StatusCode.ERROR, outcome.code)
        span.end()


def _attributes(outcome: Outcome) -> dict[str, Any]:
    """What is known of it: of what is not, there is no attribute."""
    usage = outcome.usage
    known = {
        "chatstream.outcome": outcome.kind.value,
        "chatstream.cause": outcome.cause and outcome.cause.value,
        "error.type": outcome.code,
        "chatstream.phase": outcome.phase.value,
        "chatstream.events": outcome.events,
        "chatstream.bytes": outcome.bytes,
        "chatstream.stop_ms": outcome.stop_ms,
        "chatstream.time_to_headers": outcome.time_to_headers,
        "chatstream.time_to_first_event": outcome.time_to_first_event,
        "chatstream.client_left": outcome.client_left or None,
        "gen_ai.response.model": outcome.model,
        "gen_ai.usage.input_tokens": usage and usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage and usage.completion_tokens,
        "chatstream.usage_estimated": usage and usage.estimated,
    }
    return {name: value for name, value in known.items() if value is not None}


class _Headers:
    """Where a propagator finds the headers that it looks for in a WSGI environ: its `Getter`."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get("HTTP_" + key.upper().replace("-", "_"))
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return [name[5:].replace("_", "-").lower() for name in carrier if name.startswith("HTTP_")]


_HEADERS: Any = _Headers()  # the class that it would have is opentelemetry's


def _model(payload: bytes) -> str | None:
    """Which model is asked. Short: it is the caller's word, and an exporter gathers many spans."""
    try:
        model = json.loads(payload)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return model[:_MODEL] if isinstance(model, str) else None
