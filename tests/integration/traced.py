"""The host app of the tests of tracing: instrumented by hand, as by opentelemetry's package.

With UNTRACED in the environment, opentelemetry is as if it were not installed.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("UNTRACED"):
    sys.modules["opentelemetry"] = None  # type: ignore[assignment]

from flask import g, request

from tests.integration.app import app

__all__ = ["app"]

if not os.environ.get("UNTRACED"):
    from opentelemetry import context, propagate, trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    def line(span: object) -> str:
        return span.to_json(indent=None) + "\n"  # type: ignore[attr-defined]

    provider = TracerProvider()
    spans = open(os.environ["SPANS"], "a")  # noqa: SIM115
    exporter = ConsoleSpanExporter(out=spans, formatter=line)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

    @app.before_request
    def begin() -> None:
        if request.headers.get("X-Instrumented"):
            parent = propagate.extract({key.lower(): value for key, value in request.headers})
            g.span = trace.get_tracer("host").start_span(request.path, parent)
            g.token = context.attach(trace.set_span_in_context(g.span))

    @app.teardown_request
    def end(error: BaseException | None) -> None:
        if "span" in g:
            context.detach(g.token)
            g.span.end()
