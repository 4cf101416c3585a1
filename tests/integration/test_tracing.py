"""Traces over real workers: from who asks, through us, to the provider."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from tests.conftest import eventually
from tests.integration.conftest import MODES, Rig, serving
from tests.integration.processes import Provider

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
CALLED = {"traceparent": TRACEPARENT, "tracestate": "vendor=x"}

numbers = itertools.count(1)


def named() -> str:
    return f"traced-{next(numbers)}"


class Traced:
    """A server and the spans that it made."""

    def __init__(self, rig: Rig, provider: Provider, file: Path) -> None:
        self.rig = rig
        self.provider = provider
        self._file = file

    def spans(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.read_text().splitlines()]

    def span(self, session: str) -> dict[str, Any]:
        """The one of a session's stream, once it has ended."""

        def found() -> list[dict[str, Any]]:
            return [
                span
                for span in self.spans()
                if span["attributes"].get("gen_ai.conversation.id") == session
            ]

        (span,) = eventually(found, f"the span of {session}")
        return span  # type: ignore[no-any-return]

    def received(self, name: str) -> dict[str, str]:
        """The headers of the provider's request."""
        headers: dict[str, str] = self.provider.request(name)["headers"]
        return headers


@pytest.fixture(scope="module", params=list(MODES))
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traced]:
    """One server for each way in which a stream is moved."""
    folder = tmp_path_factory.mktemp("traced")
    file = folder / "spans"
    file.touch()
    environ = {"CHATSTREAM_WORKER_CLASS": request.param, **MODES[request.param]}
    app = "tests.integration.traced:app"
    with (
        contextlib.closing(Provider()) as provider,
        serving(folder / "log", provider, app=app, SPANS=str(file), **environ) as rig,
    ):
        yield Traced(rig, provider, file)
        rig.close_clients()
        assert rig.server.errors() == []


def test_a_trace_from_end_to_end(traced: Traced) -> None:
    """The caller's trace, the host's span in it, ours in that, and the provider's in ours."""
    session = named()
    client = traced.rig.client()
    simulate = {"id": session, "tokens": 3, "rate": 1000}
    client.post(session, headers={**CALLED, "X-Instrumented": "1"}, simulate=simulate)
    client.head()
    client.body()
    ours = traced.span(session)
    (host,) = [span for span in traced.spans() if span["context"]["span_id"] == ours["parent_id"]]
    assert host["name"] == "/api/chat/stream"
    assert host["parent_id"] == f"0x{CALLER}"
    assert ours["context"]["trace_id"] == host["context"]["trace_id"] == f"0x{TRACE}"
    assert ours["attributes"]["chatstream.outcome"] == "completed"
    child = provider_span(traced.received(session))
    assert child.parent is not None
    assert f"0x{child.context.trace_id:032x}" == f"0x{TRACE}"
    assert f"0x{child.parent.span_id:016x}" == ours["context"]["span_id"]
    assert traced.received(session)["tracestate"] == "vendor=x"


def provider_span(headers: dict[str, str]) -> ReadableSpan:
    """What a provider that traces makes of a request."""
    tracer = TracerProvider().get_tracer("provider")
    span = tracer.start_span("POST /v1", propagate.extract(headers), kind=trace.SpanKind.SERVER)
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


@pytest.mark.parametrize("stop", ["client", "cancel"])
def test_a_stop_ends_the_span(traced: Traced, stop: str) -> None:
    """At once, with its cause, and as no error."""
    session = named()
    client = traced.rig.client().post(session, headers=CALLED, simulate={"rate": 20})
    client.head()
    if stop == "client":
        client.close()
    else:
        assert traced.rig.server.cancel(session)[0] == 200
    span = traced.span(session)
    assert span["status"]["status_code"] == "UNSET"
    assert span["attributes"]["chatstream.cause"] == stop
    assert span["attributes"]["chatstream.stop_ms"] < 100
    assert span["parent_id"] == f"0x{CALLER}"


def test_a_client_that_left_before_the_first_byte(traced: Traced) -> None:
    """Its span ends too: the provider had not answered."""
    session = named()
    client = traced.rig.client().post(session, simulate={"id": session, "headers_after": 30})
    traced.provider.request(session)
    client.close()
    span = traced.span(session)
    # The provider may have the request before we know that it is sent.
    assert span["attributes"]["chatstream.phase"] in ("connecting", "headers")
    assert span["attributes"]["chatstream.cause"] == "client"
    assert "chatstream.time_to_headers" not in span["attributes"]


def test_a_failure_is_an_error(traced: Traced) -> None:
    session = named()
    client = traced.rig.client().post(session, simulate={"status": 500})
    assert client.head()[0] == 502
    span = traced.span(session)
    assert span["status"] == {"status_code": "ERROR", "description": "upstream_error"}


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_without_opentelemetry_a_trace_is_passed_on(
    provider: Provider, log_file: Path, worker_class: str
) -> None:
    """As it came, where it is one."""
    environ = {"CHATSTREAM_WORKER_CLASS": worker_class, "UNTRACED": "1"}
    app = "tests.integration.traced:app"
    with serving(log_file, provider, app=app, **environ) as rig:
        for name, headers in (("good", CALLED), ("bad", {**CALLED, "traceparent": "00-1-2-3"})):
            client = rig.client()
            client.post(headers=headers, simulate={"id": name, "tokens": 1, "rate": 1000})
            client.head()
            client.body()
        good, bad = (provider.request(name)["headers"] for name in ("good", "bad"))
        assert CALLED.items() <= good.items()
        assert not {"traceparent", "tracestate"} & set(bad)
