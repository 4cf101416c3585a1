"""A crowd of streams in one worker: what they, their stops and everybody else notice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.client import Address, Connection, request
from bench.compare import LATENCY
from bench.loads import TALKING, Load, load
from bench.processes import raise_file_limit
from bench.rows import Row, Sizes, spread, summary
from bench.stops import Stopping, stop_row
from bench.systems import (
    DESCRIPTORS,
    DETACHED,
    DIRECT,
    GEVENT,
    NGINX,
    OURS,
    Place,
    System,
    cancel,
    up,
)

_SPARE = 120  # streams that can begin beside them, at least
_WAIT = 0.01  # seconds between two questions
PAGE = "/api/chat/openapi.json"


def crowd(system: System, sizes: Sizes) -> Iterator[Row]:
    """Streams of one event a second each, as many as are to be held: 5,000."""
    if system.name not in (DIRECT, NGINX, DETACHED, GEVENT):
        return
    simulate = {**TALKING, "rate": 1, "stamp": True}
    streams = min(sizes.most, raise_file_limit() // DESCRIPTORS - _SPARE)
    with (
        up(system, streams + _SPARE) as place,
        load(place, streams, simulate, ramp=True) as held,
    ):
        whole = held.began == sizes.most
        for row in _crowded(system, place, held, sizes):
            note = f"{held.began} of {sizes.most} streams; {row.note}".removesuffix("; ")
            yield replace(row, note=note, whole=whole and row.whole)
        held.check()


def _crowded(system: System, place: Place, held: Load, sizes: Sizes) -> Iterator[Row]:
    held.stretch(1)
    seen = held.stretch(sizes.seconds)
    yield Row(system.name, f"crowd: {LATENCY}", "", spread(seen.delays), note=seen.shares())
    stopping = Stopping(place)
    for way in system.ways if system.name != DIRECT else ():
        stopped = stopping.run("chatty body", way, sizes.stops)
        yield stop_row(system.name, f"crowd: {way}", way, stopped)
    if system.name in OURS:
        yield _answers(system, "a cancel's", place.relay, cancel("nobody"), sizes)
        yield _answers(system, "a page's", place.relay, request("GET", PAGE), sizes)


def _answers(system: System, what: str, relay: Address, ask: bytes, sizes: Sizes) -> Row:
    """Whether and when the worker answers something else meanwhile, over fresh connections."""
    times = [_timed(lambda: _asked(relay, ask)) for _ in range(sizes.stops)]
    return Row(system.name, f"crowd: {what} answer", f"{len(times)} answers", summary(times))


def _asked(relay: Address, ask: bytes) -> None:
    with contextlib.closing(Connection(relay)) as connection:
        connection.ask(ask)


def _timed(call: Callable[[], None]) -> float:
    time.sleep(_WAIT)
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000
