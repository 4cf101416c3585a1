"""tracing: one span for each stream, and what the provider is told of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from chatstream import Cause, Service, StreamIterable
from chatstream.errors import Busy, UpstreamError
from chatstream.settings.table import Settings
from chatstream.stream.forms import EventStream
from chatstream.stream.outcome import Outcome
from chatstream.stream.stream import Stream
from chatstream.stream.transcript import Transcript
from chatstream.telemetry import tracing
from chatstream.testing import Provider

pytestmark = pytest.mark.usefixtures("nothing_left")

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
CALLED = {"HTTP_TRACEPARENT": TRACEPARENT, "HTTP_TRACESTATE": "vendor=x"}
PAYLOAD = b'{"messages":[{"role":"user","content":"a secret"}],"model":"some-model","stream":true}'


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    """An SDK that is set up for the process, and taken away again."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield provider
    provider.shutdown()


@pytest.fixture
def spans(tracer: TracerProvider) -> Callable[[], tuple[ReadableSpan, ...]]:
    """Those that have ended."""
    exporter = InMemorySpanExporter()
    tracer.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


@pytest.fixture
def provider(nothing_left: None) -> Iterator[Provider]:
    with Provider(tokens=3, rate=1000) as provider:
        yield provider


@pytest.fixture
def service(provider: Provider) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(**settings: Any) -> Service:
        defaults: dict[str, Any] = {"upstream_url": provider.url, "max_streams": 2}
        made.append(Service(Settings(**{**defaults, **settings})))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def walked(source: StreamIterable) -> bytes:
    """All of an answer, to its end."""
    body = b"".join(source)
    source.close()
    return body


def test_a_whole_answer(
    service: Callable[..., Service], provider: Provider, spans: Callable[[], Any]
) -> None:
    """One span with the stream's figures, under the caller's; the provider's parent is ours."""
    source = service().open(
        PAYLOAD, session_id="s", stream_id="t", owner="somebody", environ=CALLED
    )
    assert spans() == ()
    body = b"".join(source)
    assert spans() == ()  # not before it is over
    source.close()
    (span,) = spans()
    assert span.name == "chat some-model"
    assert span.kind is SpanKind.CLIENT
    assert (format(span.context.trace_id, "032x"), format(span.parent.span_id, "016x")) == (
        TRACE,
        PARENT,
    )
    assert span.status.status_code is StatusCode.UNSET
    found = attributes(span)
    assert found.pop("chatstream.time_to_headers") > 0
    assert found.pop("chatstream.time_to_first_event") > 0
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "127.0.0.1",
        "server.address": "127.0.0.1",
        "server.port": int(provider.url.split(":")[2].partition("/")[0]),
        "gen_ai.conversation.id": "s",
        "gen_ai.request.model": "some-model",
        "chatstream.stream_id": "t",
        "chatstream.outcome": "completed",
        "chatstream.phase": "body",
        "chatstream.events": 5,
        "chatstream.bytes": len(body),
    }
    (figure,) = provider.requests()
    assert figure.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert figure.headers["tracestate"] == "vendor=x"
    assert "somebody" not in span.to_json()
    assert "secret" not in span.to_json()


def test_a_long_model_is_cut(service: Callable[..., Service], spans: Callable[[], Any]) -> None:
    """A request's body is a megabyte, and an exporter keeps thousands of spans."""
    payload = b'{"messages":[{"role":"user","content":"hi"}],"model":"%b"}' % (b"m" * 100_000)
    source = service().open(payload)
    source.close()
    (span,) = spans()
    assert attributes(span)["gen_ai.request.model"] == "m" * 128
    assert span.name == f"chat {'m' * 128}"


def test_the_hosts_own_span_is_the_parent(
    service: Callable[..., Service], tracer: TracerProvider, spans: Callable[[], Any]
) -> None:
    """In an instrumented app; and not who called that, whose child it is."""
    with tracer.get_tracer("host").start_as_current_span("GET /") as host:
        source = service().open(PAYLOAD, environ=CALLED)
    walked(source)
    ours = spans()[-1]
    assert ours.parent.span_id == host.get_span_context().span_id
    assert ours.context.trace_id == host.get_span_context().trace_id


def test_without_a_caller_it_is_a_trace_of_its_own(
    service: Callable[..., Service], provider: Provider, spans: Callable[[], Any]
) -> None:
    source = service().open(PAYLOAD)
    walked(source)
    (span,) = spans()
    assert span.parent is None
    (figure,) = provider.requests()
    assert figure.headers["traceparent"].split("-")[1] == format(span.context.trace_id, "032x")


def test_the_callers_baggage_stays_here(
    service: Callable[..., Service], provider: Provider, spans: Callable[[], Any]
) -> None:
    """It may name people; the provider is somebody else."""
    token = context.attach(baggage.set_baggage("user", "joe"))
    try:
        source = service().open(PAYLOAD, environ={**CALLED, "HTTP_BAGGAGE": "user=joe"})
    finally:
        context.detach(token)
    walked(source)
    (figure,) = provider.requests()
    assert "baggage" not in figure.headers
    assert "joe" not in str(figure.headers)
    assert "traceparent" in figure.headers


@pytest.mark.parametrize("cause", list(Cause))
def test_a_stop_is_no_error(
    service: Callable[..., Service], provider: Provider, spans: Callable[[], Any], cause: Cause
) -> None:
    """Whatever the cause; it has its time."""
    provider.script(tokens=3, silent_after=1)
    source = service().open(PAYLOAD)
    next(source)
    source.stream.abort(cause)
    source.close()
    (span,) = spans()
    assert span.status.status_code is StatusCode.UNSET
    found = attributes(span)
    assert (found["chatstream.outcome"], found["chatstream.cause"]) == ("aborted", cause.value)
    assert found["chatstream.stop_ms"] >= 0
    assert "error.type" not in found


def test_a_failure_is_one(
    service: Callable[..., Service], provider: Provider, spans: Callable[[], Any]
) -> None:
    """With its code, which is bounded, and not the provider's sentence."""
    provider.script(status=500)
    source = service().open(PAYLOAD)
    walked(source)
    (span,) = spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "upstream_error"
    assert attributes(span)["error.type"] == "upstream_error"


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_stream_that_never_started(
    service: Callable[..., Service], spans: Callable[[], Any], end: str
) -> None:
    """The client left before the first byte, or the app gave another answer: it ends, once."""
    source = service().open(PAYLOAD)
    getattr(source, end)()
    source.close()
    (span,) = spans()
    assert attributes(span)["chatstream.cause"] == "client"
    assert attributes(span)["chatstream.phase"] == "new"


def test_one_that_goes_on_alone_ends_with_its_answer(
    service: Callable[..., Service], provider: Provider, spans: Callable[[], Any]
) -> None:
    """CHATSTREAM_ON_DISCONNECT=finish: not when its client leaves."""
    provider.script(tokens=3, rate=2)
    source = service(on_disconnect="finish").open(PAYLOAD)
    next(source)
    source.close()
    (span,) = spans()
    found = attributes(span)
    assert (found["chatstream.outcome"], found["chatstream.client_left"]) == ("completed", True)
    assert found["chatstream.events"] == 5


def test_what_was_refused_has_no_span(
    service: Callable[..., Service], spans: Callable[[], Any]
) -> None:
    """No slot, no stream; the next one has its own again."""
    full = service(max_streams=1)
    first = full.open(PAYLOAD)
    with pytest.raises(Busy):
        full.open(PAYLOAD)
    first.close()
    assert len(spans()) == 1


def test_tokens_where_they_are_known(tracer: TracerProvider, spans: Callable[[], Any]) -> None:
    """They are where somebody listens; an estimate is said to be one."""
    stream = EventStream("s", "t")
    stream.transcript = Transcript(9)
    end = tracing.create("https://api.deepseek.com/chat/completions").begin(stream, PAYLOAD, {})
    stream.feed(b'data: {"model":"m-1","choices":[{"delta":{"content":"Hello"}}]}\n\n')
    stream.fail(UpstreamError("It broke.", code="upstream_idle"))
    stream._stopped_in = stream._stopped_in.BODY
    assert end is not None
    end(stream.outcome())
    found = attributes(spans()[0])
    assert found["gen_ai.provider.name"] == "deepseek"
    assert (found["server.address"], found["server.port"]) == ("api.deepseek.com", 443)
    assert found["gen_ai.response.model"] == "m-1"
    assert found["gen_ai.usage.input_tokens"] == 9
    assert found["gen_ai.usage.output_tokens"] == 2
    assert found["chatstream.usage_estimated"] is True


class Broken(SpanProcessor):
    """An SDK that fails wherever it is asked."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("on_start")

    def on_end(self, span: Any) -> None:
        raise RuntimeError("on_end")


class Ending(Broken):
    def on_start(self, span: Any, parent_context: Any = None) -> None: ...


@pytest.mark.parametrize("processor", [Broken(), Ending()])
def test_a_broken_sdk_hurts_no_stream(
    service: Callable[..., Service],
    tracer: TracerProvider,
    processor: SpanProcessor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged; the answer is whole, the slot free."""
    tracer.add_span_processor(processor)
    one = service()
    source = one.open(PAYLOAD)
    assert b"[DONE]" in walked(source)
    assert one.at_rest()
    assert "[trace] a span cannot be" in caplog.text


def test_no_span_is_touched_in_the_loops_thread(
    service: Callable[..., Service], tracer: TracerProvider
) -> None:
    """An exporter may wait; here a deadline, which is the loop's business, ends the stream."""
    threads: list[str] = []

    class Noting(SpanProcessor):
        def on_end(self, span: Any) -> None:
            threads.append(threading.current_thread().name)

    tracer.add_span_processor(Noting())
    source = service(stream_deadline=0.05).open(PAYLOAD)
    while not source.stream.ended:
        next(source, b"")
    source.close()
    assert threads == [threading.current_thread().name]


def test_without_an_sdk_the_trace_goes_on(
    service: Callable[..., Service], provider: Provider
) -> None:
    """The API alone makes no spans: the provider's are the caller's children."""
    source = service().open(PAYLOAD, environ=CALLED)
    walked(source)
    (figure,) = provider.requests()
    assert figure.headers["traceparent"] == TRACEPARENT
    assert figure.headers["tracestate"] == "vendor=x"


GOOD = [
    TRACEPARENT,
    f"00-{TRACE}-{PARENT}-00",
    f"cc-{TRACE}-{PARENT}-01",
    f"cc-{TRACE}-{PARENT}-01-what-comes",
]
BAD = [
    "",
    f"ff-{TRACE}-{PARENT}-01",
    f"00-{TRACE}-{PARENT}-01-more",
    f"00-{TRACE}-{PARENT}-01 ",
    f"cc-{TRACE}-{PARENT}-01.more",
    f"00-{TRACE.upper()}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE}-{PARENT}",
    f"00-{TRACE[:-1]}-{PARENT}-01",
    f"00-{TRACE}-{PARENT}-01\r\nX-Y: z",
    f"cc-{TRACE}-{PARENT}-01-{'x' * 600}",
]


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """What goes to the provider where opentelemetry is not installed."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    def headers(**environ: Any) -> dict[str, str]:
        stream = Stream("s", "t")
        assert tracing.create("http://provider.test/").begin(stream, PAYLOAD, environ) is None
        return dict(stream.headers)

    return headers


@pytest.mark.parametrize("value", GOOD)
def test_a_traceparent_is_passed_on(passed_on: Callable[..., dict[str, str]], value: str) -> None:
    """As it is, with its tracestate."""
    assert passed_on(HTTP_TRACEPARENT=value) == {"traceparent": value}
    both = passed_on(HTTP_TRACEPARENT=value, HTTP_TRACESTATE="a=b", HTTP_BAGGAGE="user=joe")
    assert both == {"traceparent": value, "tracestate": "a=b"}


@pytest.mark.parametrize("value", BAD)
def test_what_is_none_is_not(passed_on: Callable[..., dict[str, str]], value: str) -> None:
    """Neither it, nor a tracestate without it."""
    assert passed_on(HTTP_TRACEPARENT=value, HTTP_TRACESTATE="a=b") == {}


@pytest.mark.parametrize("state", ["", "a=b\r\nX-Y: z", "ä=b", "a=" + "b" * 511])
def test_a_tracestate_that_is_none_is_left_out(
    passed_on: Callable[..., dict[str, str]], state: str
) -> None:
    found = passed_on(HTTP_TRACEPARENT=TRACEPARENT, HTTP_TRACESTATE=state)
    assert found == {"traceparent": TRACEPARENT}


def test_an_installation_that_is_broken_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And then it is as if there were none."""

    def fail(name: str) -> None:
        raise RuntimeError("no such plugin")

    monkeypatch.setattr(trace, "get_tracer", fail)
    stream = Stream("s", "t")
    assert tracing.create("http://provider.test/").begin(stream, PAYLOAD, CALLED) is None
    assert stream.headers == {"traceparent": TRACEPARENT, "tracestate": "vendor=x"}
    assert "opentelemetry cannot be used" in caplog.text


def test_only_a_stream_needs_it() -> None:
    """An app that was made, and had no stream, has not imported it: that is for after the fork."""
    script = (
        "import sys; from flask import Flask; from chatstream import ChatStream;"
        " ChatStream(Flask('a')); assert not [m for m in sys.modules if 'opentelemetry' in m]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_an_outcome_without_figures_has_no_attributes_of_them() -> None:
    """What is not known is not zero."""
    stream = Stream("s", "t")
    stream.abort(Cause.CANCEL)
    outcome: Outcome = stream.outcome()
    names = set(tracing._attributes(outcome))
    assert "gen_ai.usage.output_tokens" not in names
    assert "chatstream.time_to_headers" not in names
    assert {"chatstream.events", "chatstream.bytes", "chatstream.stop_ms"} <= names
