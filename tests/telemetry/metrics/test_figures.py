"""metrics.figures: what is counted, and how it is shown, in one process."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from prometheus_client import REGISTRY

import chatstream
from chatstream import ChatStream
from chatstream.dialects.base import Usage
from chatstream.errors import ConfigError
from chatstream.service.registry import Registry
from chatstream.stream.outcome import Cancelled, Cause, Kind, Outcome, Started
from chatstream.stream.stream import Stream
from chatstream.telemetry.metrics.figures import ANSWERS, CODES, STOPS, figures
from chatstream.telemetry.signals import cancel_answered, needs_text, stream_ended, stream_started
from chatstream.testing import Provider
from chatstream.workers.slots import Slots
from tests.stream.outcomes import outcome

COMPLETED = outcome(
    session_id="session-of-somebody",
    stream_id="stream-of-somebody",
    owner="somebody",
    events=12,
    bytes=3456,
    time_to_headers=0.2,
    time_to_first_event=0.3,
    usage=Usage(5, 10),
)
STOPPED = replace(
    COMPLETED,
    kind=Kind.ABORTED,
    cause=Cause.CANCEL,
    stop_ms=0.2,
    usage=Usage(None, 4, estimated=True),
)
FAILED = replace(
    COMPLETED,
    kind=Kind.FAILED,
    code="upstream_idle",
    events=0,
    bytes=0,
    time_to_headers=None,
    time_to_first_event=None,
    usage=None,
)


def make(**config: Any) -> Flask:
    app = Flask("metrics")
    app.config.update({"CHATSTREAM_METRICS": "/metrics", "CHATSTREAM_BUS": "local", **config})
    ChatStream(app)
    return app


@pytest.fixture
def app() -> Flask:
    return make()


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"chatstream_{name}", labels) or 0.0


@pytest.fixture
def more() -> Callable[..., float]:
    """By how much a figure is more than when it was first asked for: they are the process's."""
    before = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
    }

    def difference(name: str, **labels: str) -> float:
        return value(name, **labels) - before.get(
            (f"chatstream_{name}", frozenset(labels.items())), 0.0
        )

    return difference


def told(app: Flask, value: Outcome) -> None:
    stream_started.send(app, started=Started("s", "t", "o"))
    stream_ended.send(app, outcome=value)


def test_an_outcome_is_counted_once(app: Flask, more: Callable[..., float]) -> None:
    """By how it ended, with what it delivered, and in the histograms of what it has."""
    for each in (COMPLETED, STOPPED, FAILED):
        told(app, each)
    total = "outcomes_total"
    assert more(total, kind="completed", cause="", code="", phase="body") == 1
    assert more(total, kind="aborted", cause="cancel", code="", phase="body") == 1
    assert more(total, kind="failed", cause="", code="upstream_idle", phase="body") == 1
    assert (more("events_delivered_total"), more("bytes_delivered_total")) == (24, 6912)
    assert more("tokens_delivered_total", estimated="false") == 10
    assert more("tokens_delivered_total", estimated="true") == 4
    assert more("stop_seconds_count") == 1
    assert more("stop_seconds_bucket", le="0.0001") == 0
    assert more("stop_seconds_bucket", le="0.00025") == 1  # 0.2 ms: in seconds
    assert more("headers_seconds_count") == more("first_event_seconds_count") == 2
    assert more("headers_seconds_sum") == pytest.approx(0.4)
    assert more("first_event_seconds_sum") == pytest.approx(0.6)
    assert more("live_streams") == 0


def test_what_lives_is_what_began_and_is_not_over(app: Flask, more: Callable[..., float]) -> None:
    stream_started.send(app, started=Started("s", "t", "o"))
    assert more("live_streams") == 1
    stream_ended.send(app, outcome=COMPLETED)
    assert more("live_streams") == 0


@pytest.mark.parametrize("answer", [*ANSWERS, "something else"])
def test_cancels_by_their_answers(app: Flask, more: Callable[..., float], answer: str) -> None:
    """An answer that is not known is `other`: labels are bounded."""
    cancel_answered.send(app, cancel=Cancelled("s", None, "o", answer, 0.004))
    assert more("cancels_total", answer=answer if answer in ANSWERS else "other") == 1
    assert more("cancel_seconds_bucket", le="0.005") == 1
    assert more("cancel_seconds_bucket", le="0.0025") == 0


def test_a_code_that_is_nobodys_is_other(app: Flask, more: Callable[..., float]) -> None:
    """An app's own errors make no new labels."""
    for number in range(3):
        told(app, replace(FAILED, code=f"made-up-{number}"))
    assert more("outcomes_total", kind="failed", cause="", code="other", phase="body") == 3


def test_every_code_that_a_stream_fails_with_is_known() -> None:
    """Those that the rooms of streams and providers name; small questions are no streams."""
    folder = Path(chatstream.__file__).parent
    files = {folder / "errors.py", *folder.glob("stream/*.py"), *folder.glob("upstream/*.py")}
    files -= {folder / "upstream" / name for name in ("fetch.py", "models.py")}
    text = "".join(path.read_text() for path in files)
    named = set(re.findall(r'\bcode\s*=\s*"(\w+)"', text))
    refusals = {"bad_request", "conflict", "too_many_streams"}
    refusals |= {"unconfirmed", "bus_unavailable", "deadline", "error"}
    assert named - refusals <= CODES
    assert {"upstream_idle", "busy", "event_too_large"} <= named  # it sees them


def test_nothing_of_a_user_is_shown(app: Flask) -> None:
    """No label is a name, an owner or a model."""
    told(app, replace(COMPLETED, model="model-of-somebody", text="text of somebody"))
    cancel_answered.send(app, cancel=Cancelled("session-of-somebody", None, "somebody", "x", 0.1))
    response = app.test_client().get("/metrics")
    assert b"chatstream_outcomes_total" in response.data
    assert b"somebody" not in response.data


def test_the_first_alert_would_see_a_first_stop_that_is_not_confirmed(app: Flask) -> None:
    """The answers are there from the start: an increase needs something to begin at."""
    shown = app.test_client().get("/metrics").text
    for answer in ANSWERS:
        assert f'chatstream_cancels_total{{answer="{answer}"}}' in shown
    assert 0.1 in STOPS
    assert min(STOPS) == 0.0001
    assert max(STOPS) == 2.5


def test_the_route(app: Flask) -> None:
    """GET and HEAD; no cache keeps it; other methods are refused as elsewhere."""
    client = app.test_client()
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain; version=")
    assert response.headers["Cache-Control"] == "no-store"
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    other = client.get("/metrics", headers=accept)
    assert other.content_type.startswith("application/openmetrics-text")
    assert other.data.endswith(b"# EOF\n")
    assert client.head("/metrics").status_code == 200
    refused = client.post("/metrics")
    assert (refused.status_code, refused.json["reason"]) == (405, "method_not_allowed")  # type: ignore[index]
    assert refused.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert client.options("/metrics").status_code == 204


def test_an_apps_own_figures_are_shown_too(app: Flask) -> None:
    """In one process it is the library's own registry."""
    assert b"python_info" in app.test_client().get("/metrics").data


def test_a_real_stream_and_a_real_cancel(more: Callable[..., float]) -> None:
    """From a request to the figures, in one process: with the tokens that were reported."""
    with Provider(tokens=3, rate=1000) as provider:
        app = make(CHATSTREAM_UPSTREAM_URL=provider.url, CHATSTREAM_INCLUDE_USAGE="1")
        client = app.test_client()
        body = {"messages": [{"role": "user", "content": "hello"}]}
        with client.post("/api/chat/stream", json=body) as response:
            data = response.data
        assert client.post("/api/chat/cancel/nobody").status_code == 404
        app.extensions["chatstream"].stop()
    assert more("outcomes_total", kind="completed", cause="", code="", phase="body") == 1
    assert more("bytes_delivered_total") == len(data)
    assert more("events_delivered_total") == data.count(b"data: ")
    assert more("tokens_delivered_total", estimated="false") == 3
    assert more("cancels_total", answer="not_found") == 1
    assert more("slots_in_use") == more("live_streams") == 0
    assert more("first_event_seconds_count") == 1


def test_it_is_off_unless_it_is_asked_for(more: Callable[..., float]) -> None:
    """Then nobody listens: so no text is collected, and nothing counted."""
    app = Flask("off")
    ChatStream(app)
    assert app.test_client().get("/metrics").status_code == 404
    assert not stream_ended.has_receivers_for(app)
    assert app.extensions["chatstream"].registry.on_change is None
    told(app, COMPLETED)
    assert more("outcomes_total", kind="completed", cause="", code="", phase="body") == 0


def test_many_apps_in_one_process_are_summed(more: Callable[..., float]) -> None:
    """A factory of apps registers no figure twice; what is gone has no slots."""
    gc.collect()  # the apps of other tests
    figures().count_slots()
    before = value("slots")
    apps = [make(CHATSTREAM_MAX_STREAMS=7) for _ in range(3)]
    for app in apps:
        told(app, COMPLETED)
    assert more("outcomes_total", kind="completed", cause="", code="", phase="body") == 3
    assert value("slots") == before + 21
    del apps, app
    gc.collect()
    figures().count_slots()
    assert value("slots") == before


def test_slots_follow_the_registry(app: Flask, more: Callable[..., float]) -> None:
    """As they are taken and freed, not as streams begin and end: a hung call keeps one."""
    registry: Registry = app.extensions["chatstream"].registry
    registry.slots = Slots(5, 5)
    stream = Stream("s", "t")
    registry.add(stream)
    assert more("slots_in_use") == 1
    registry.enter(stream)
    registry.remove(stream)
    assert more("slots_in_use") == 1
    registry.leave(stream)
    assert more("slots_in_use") == 0


def test_a_file_that_a_worker_is_just_making(
    app: Flask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is empty for a moment: whoever asks then gets the figures of the others."""
    (tmp_path / "counter_4711.db").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    response = app.test_client().get("/metrics")
    assert (response.status_code, response.text) == (200, "")


def test_figures_that_cannot_be_written_hurt_no_stream(
    app: Flask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is logged; the registry goes on."""

    def fail(value: float) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(figures().slots, "set", fail)
    registry: Registry = app.extensions["chatstream"].registry
    stream = Stream("s", "t")
    registry.add(stream)
    registry.remove(stream)
    assert len(registry) == 0
    assert "the slots cannot be counted" in caplog.text


def test_text_is_not_collected_for_figures(app: Flask) -> None:
    """They say that they need none."""
    listeners = stream_ended.receivers_for(app)
    assert [needs_text(listener) for listener in listeners] == [False]


@pytest.mark.parametrize(
    ("prelude", "environ", "sentence"),
    [
        (
            "sys.modules['prometheus_client'] = None",
            {},
            r"CHATSTREAM_METRICS needs prometheus_client: pip install 'chatstream\[metrics\]'",
        ),
        ("", {"PROMETHEUS_MULTIPROC_DIR": "/nowhere/at/all"}, "PROMETHEUS_MULTIPROC_DIR must name"),
    ],
)
def test_what_is_missing_is_said_at_start(
    prelude: str, environ: dict[str, str], sentence: str
) -> None:
    """A ConfigError that says what to do."""
    script = f"""
import sys
{prelude}
from flask import Flask
from chatstream import ChatStream, ConfigError
app = Flask("a")
app.config["CHATSTREAM_METRICS"] = "/metrics"
try:
    ChatStream(app)
except ConfigError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=30
    )
    assert re.match(sentence, run.stdout), run.stderr


def test_a_place_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^CHATSTREAM_METRICS must be a path such as"):
        make(CHATSTREAM_METRICS="metrics")
