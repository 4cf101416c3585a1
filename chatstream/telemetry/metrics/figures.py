"""The figures themselves, and what they look like. The room of prometheus_client.

They are a process's, whatever apps it has: sums over all of them. No label is of a user's making.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from chatstream.stream.outcome import Cancelled, Outcome, Started
from chatstream.telemetry.metrics.master import FOLDER
from chatstream.telemetry.signals import cancel_answered, stream_ended, stream_started, usage_only

log = logging.getLogger("chatstream")

CODES = frozenset(
    {
        "answer_too_large",
        "busy",
        "event_too_large",
        "shutting_down",
        "upstream_auth",
        "upstream_connect",
        "upstream_error",
        "upstream_idle",
        "upstream_not_json",
        "upstream_not_stream",
        "upstream_rate_limited",
        "upstream_rejected",
        "upstream_timeout",
        "upstream_truncated",
        "upstream_unreachable",
    }
)
"""What a stream of ours fails with; another code, an app's, is counted as `other`."""

ANSWERS = ("stopped", "not_found", "unconfirmed", "bus_unavailable")
"""What a cancel is answered with; another is counted as `other`."""

STOPS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5),
)
"""Bounds of what a stop takes, seconds: 0.1 is where the alert is."""

WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
"""Bounds of what a provider takes, seconds: up to CHATSTREAM_UPSTREAM_HEADERS_TIMEOUT."""


class Slots(Protocol):
    """How many there are."""

    @property
    def all(self) -> int: ...


class Counted(Protocol):
    """What has slots: a `Registry`."""

    on_change: Callable[[], None] | None

    @property
    def slots(self) -> Slots: ...

    def __len__(self) -> int: ...


class Watched(Protocol):
    """What has a registry: an app's Service."""

    @property
    def registry(self) -> Counted: ...


class Figures:
    """All figures of one process. Safe from any thread."""

    def __init__(self) -> None:
        self._services: weakref.WeakSet[Watched] = weakref.WeakSet()
        self._lock = threading.Lock()  # guards the order in which the slots are written
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def _make_gauges(self) -> None:
        gauge = partial(Gauge, multiprocess_mode="livesum")  # of a process that died: nothing
        self.workers = gauge("chatstream_workers", "Processes that show figures.")
        self.live = gauge("chatstream_live_streams", "Streams that were started and are not over.")
        self.slots = gauge("chatstream_slots", "Stream slots there are.")
        self.in_use = gauge("chatstream_slots_in_use", "Stream slots that are taken.")

    def _make_counters(self) -> None:
        self.outcomes = Counter(
            "chatstream_outcomes_total",
            "Streams that are over, by how they ended.",
            ("kind", "cause", "code", "phase"),
        )
        self.tokens = Counter(
            "chatstream_tokens_delivered_total",
            "Tokens of answers: the provider's figure, or our estimate of what was sent.",
            ("estimated",),
        )
        self.events = Counter("chatstream_events_delivered_total", "Events sent to clients.")
        self.bytes = Counter("chatstream_bytes_delivered_total", "Bytes of events sent to clients.")
        self.cancels = Counter(
            "chatstream_cancels_total", "Cancels, by what they were answered with.", ("answer",)
        )
        # An increase is seen from something on, also the first one.
        for answer in ANSWERS:
            self.cancels.labels(answer)
        for estimated in ("false", "true"):
            self.tokens.labels(estimated)

    def _make_histograms(self) -> None:
        self.stops = Histogram(
            "chatstream_stop_seconds",
            "From noticing a stop to the shutdown of the provider's socket.",
            buckets=STOPS,
        )
        self.cancel_seconds = Histogram(
            "chatstream_cancel_seconds", "From a cancel to its answer.", buckets=STOPS
        )
        self.headers = Histogram(
            "chatstream_headers_seconds",
            "From a request to the provider's headers.",
            buckets=WAITS,
        )
        self.first_events = Histogram(
            "chatstream_first_event_seconds",
            "From a request to the answer's first event.",
            buckets=WAITS,
        )

    def add(self, service: Watched, *, serves: bool = False) -> None:
        """Counts the slots of `service` for as long as it lives.

        Args:
            service: Whose.
            serves: Whether this process is known to be a worker.
        """
        self._services.add(service)
        service.registry.on_change = self.count_slots
        # Not in a master that is to fork: what it said would be one worker's more.
        if FOLDER not in os.environ or serves:
            self.count_slots()

    def count_slots(self) -> None:
        """Writes down how many slots there are, and how many of them are taken."""
        try:
            with self._lock:
                registries = [service.registry for service in self._services]
                self.slots.set(sum(registry.slots.all for registry in registries))
                self.in_use.set(sum(map(len, registries)))
                self.workers.set(1)
        except Exception:  # the folder was removed, the disk is full: no stream's fault
            log.exception("[metrics] the slots cannot be counted")

    def started(self) -> None:
        """A stream begins."""
        self.live.inc()

    def ended(self, outcome: Outcome) -> None:
        """A stream is over."""
        self.live.dec()
        self.outcomes.labels(
            outcome.kind.value,
            outcome.cause.value if outcome.cause else "",
            _among(CODES, outcome.code) if outcome.code else "",
            outcome.phase.value,
        ).inc()
        self.events.inc(outcome.events)
        self.bytes.inc(outcome.bytes)
        if outcome.stop_ms is not None:
            self.stops.observe(outcome.stop_ms / 1000)
        if outcome.time_to_headers is not None:
            self.headers.observe(outcome.time_to_headers)
        if outcome.time_to_first_event is not None:
            self.first_events.observe(outcome.time_to_first_event)
        usage = outcome.usage
        if usage is not None and usage.completion_tokens is not None:
            estimated = "true" if usage.estimated else "false"
            self.tokens.labels(estimated).inc(usage.completion_tokens)

    def cancelled(self, cancel: Cancelled) -> None:
        """A cancel has its answer."""
        self.cancels.labels(_among(ANSWERS, cancel.answer)).inc()
        self.cancel_seconds.observe(cancel.seconds)


@functools.cache
def figures() -> Figures:
    """This process's: prometheus_client takes each name once."""
    return Figures()


def watch(app: object, service: Watched, *, serves: bool = False) -> None:
    """Counts what the app's streams do. Raises OSError if there is nowhere to write."""
    figures().add(service, serves=serves)
    stream_started.connect(_started, sender=app)
    stream_ended.connect(_ended, sender=app)
    cancel_answered.connect(_cancelled, sender=app)


def _started(app: object, started: Started) -> None:
    figures().started()


@usage_only
def _ended(app: object, outcome: Outcome) -> None:
    figures().ended(outcome)


def _cancelled(app: object, cancel: Cancelled) -> None:
    figures().cancelled(cancel)


def shown(accept: str) -> tuple[bytes, str]:
    """The figures of all processes, as text, and its content type."""
    encode, content_type = choose_encoder(accept)
    return encode(_registry()), content_type


def _registry() -> CollectorRegistry:
    if FOLDER not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    registry.register(_OfAll())
    return registry


class _OfAll(Collector):
    """Collects what all processes have written.

    But for files without a byte: one that a worker has just made is so for a moment, in which
    prometheus_client's own collector fails.
    """

    def collect(self) -> Iterable[Metric]:
        files = Path(os.environ[FOLDER]).glob("*.db")
        merged: Iterable[Metric] = MultiProcessCollector.merge(  # type: ignore[no-untyped-call]
            [str(file) for file in files if _has_bytes(file)]
        )
        return merged


def _has_bytes(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # a worker has died
        return False


def _among(known: frozenset[str] | tuple[str, ...], word: str) -> str:
    return word if word in known else "other"
