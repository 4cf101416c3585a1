"""What relaying costs and adds: processor time, latency, memory, the first event."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from bench.client import TOKEN, Connection, Figures, chat
from bench.compare import LATENCY
from bench.loads import TALKING, load
from bench.processes import memory_kb
from bench.rows import Row, Sizes, spread, summary
from bench.systems import DIRECT, NGINX, OURS, PROVIDER, Place, System, up

MANY = ((200, 20), (1000, 4))
"""Streams, and the events a second of each: 4,000 a second both times."""

_WARM = 20  # requests before the ones that are measured


def cpu(system: System, sizes: Sizes) -> Iterator[Row]:
    """The system's processor time for one event, the latency it adds, and who else was busy."""
    for streams, rate in MANY:
        yield from _flow(system, sizes, streams, rate, 1)


def cores(system: System, sizes: Sizes) -> Iterator[Row]:
    """The same with a worker for each core."""
    if system.name in (*OURS, NGINX):
        yield from _flow(system, sizes, *MANY[1], len(os.sched_getaffinity(0)))


def _flow(system: System, sizes: Sizes, streams: int, rate: int, workers: int) -> Iterator[Row]:
    what = f"{streams} x {rate}/s" + (f", {workers} workers" if workers > 1 else "")
    simulate = {**TALKING, "rate": rate, "stamp": True}
    with (
        up(system, streams, workers) as place,
        load(place, streams, simulate, ramp=True) as held,
    ):
        held.stretch(1)  # what the beginnings left to do
        seen = held.stretch(sizes.seconds)
        missing = f"{held.began} streams only: {held.refusal}; " if held.refusal else ""
    if system.name != DIRECT:
        figure = f"{seen.each:.1f} µs"
        yield Row(
            system.name,
            f"CPU per event, {what}",
            figure,
            value=seen.each,
            note=missing + seen.shares(),
            whole=not missing,
        )
    yield Row(system.name, f"{LATENCY}, {what}", "", spread(seen.delays), whole=not missing)


def memory(system: System, sizes: Sizes) -> Iterator[Row]:
    """What a stream adds to the system's memory."""
    if system.name == DIRECT:
        return
    slow = {**TALKING, "rate": 1}
    with up(system, sizes.streams) as place:
        with load(place, 20, slow):
            pass  # the first streams import and allocate what all share
        figures, deadline = Figures(place.simulator), time.monotonic() + 10
        while figures.get("/stats")["generating"] and time.monotonic() < deadline:
            time.sleep(0.05)
        before = memory_kb(place.pids)
        with load(place, sizes.streams, slow, patience=30) as held:
            held.stretch(sizes.seconds / 3)
            total = memory_kb(place.pids)
    each = (total - before) / sizes.streams
    yield Row(
        system.name,
        f"memory (PSS) per stream, {sizes.streams} streams",
        f"{each:.1f} KB",
        value=each,
        note=f"{before / 1024:.0f} MB before, {total / 1024:.0f} MB with them",
    )


def first(system: System, sizes: Sizes) -> Iterator[Row]:
    """What the relay adds to the time to the first event; nothing else runs."""
    if system.name == DIRECT:
        return
    with up(system, 64) as place:
        direct, relayed = _firsts(place, sizes.firsts)
    # One came right after the other.
    added = summary([there - here for there, here in zip(relayed, direct, strict=True)])
    note = "p50 and p99 relayed {:.2f} {:.2f}, direct {:.2f} {:.2f}"
    note = note.format(*summary(relayed)[:2], *summary(direct)[:2])
    yield Row(
        system.name, "added time to the first event", f"{sizes.firsts} requests", added, note=note
    )


def _firsts(place: Place, count: int) -> tuple[list[float], list[float]]:
    """ms to the first event, without the system and with it, in turns."""
    with (
        contextlib.closing(Connection(place.simulator)) as provider,
        contextlib.closing(Connection(place.relay)) as relay,
    ):
        direct, relayed = list[float](), list[float]()
        ways = ((provider, PROVIDER, direct), (relay, place.path, relayed))
        for number in range(count + _WARM):
            for connection, path, times in ways:
                asked = time.monotonic_ns()
                connection.send(chat(path, {"tokens": 3, "rate": 0, "stamp": True}))
                connection.read_until(TOKEN)
                took = (time.monotonic_ns() - asked) / 1e6
                connection.read_until(b"\r\n0\r\n\r\n")
                if number >= _WARM:
                    times.append(took)
        return direct, relayed


def fast(system: System, sizes: Sizes) -> Iterator[Row]:
    """One stream, as fast as the provider can send."""
    with up(system, 64) as place, load(place, 1, {**TALKING, "rate": 0}) as held:
        held.stretch(0.2)
        seen = held.stretch(min(sizes.seconds, 3) / 3)
    what = "one stream, as fast as it comes"
    rate = seen.events / seen.seconds
    if system.name != DIRECT:
        figure = f"{seen.each:.2f} µs"
        yield Row(
            system.name, f"CPU per event, {what}", figure, value=seen.each, note=seen.shares()
        )
    figure = f"{rate / 1000:.0f} k/s"
    note = f"{seen.bytes / seen.seconds / 1e6:.0f} MB/s"
    yield Row(system.name, f"events, {what}", figure, value=rate, note=note)


def held(system: System, sizes: Sizes) -> Iterator[Row]:
    """How many streams one worker holds, of those that are tried."""
    if system.name == DIRECT:
        return
    simulate = {**TALKING, "rate": 0.2}
    with (
        up(system, sizes.most) as place,
        load(place, sizes.most, simulate, ramp=True, pace=0.001) as ramped,
    ):
        ramped.check()
    yield Row(
        system.name,
        "most streams held, one worker",
        f"{ramped.began} of {sizes.most}",
        value=ramped.began,
        note=ramped.refusal,
    )
