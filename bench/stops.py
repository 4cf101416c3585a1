"""From the client's close or cancel to the provider's seeing it, in every phase."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench.client import TOKEN, Connection, Figures, chat
from bench.loads import TALKING, load
from bench.rows import FAILURES, Row, Sizes, failed, summary
from bench.systems import DIRECT, OURS, Place, Refused, System, cancel, up

RATES = {200: 20, 1000: 4}
"""The events a second of each of so many other streams."""

BOUND = 2.0
"""Seconds after which a provider that still generates was not stopped."""

_BATCH = 10  # streams that are made ready together
_HOPELESS = 5  # this many not stopped, and none stopped: no more are tried
_READY = 10.0  # seconds to become blocked: a relay that buffers all never is


@dataclass(frozen=True)
class _Phase:
    """What a stream is doing when it is stopped."""

    rate: int  # tokens that the model makes in a second
    simulate: dict[str, object]
    taken: int = 0  # events the client takes before the stop
    blocked: bool = False  # the client takes nothing, until the relay waits for it


_PHASES = {
    "headers awaited": _Phase(20, {"headers_after": 600}),
    "chatty body": _Phase(100, {}, taken=3),
    "silent body": _Phase(20, {"silent_after": 3}, taken=3),
    "blocked": _Phase(50, {"pad": 400_000}, blocked=True),
}


@dataclass(frozen=True)
class Stop:
    """One stop; instants in ns on the clock that simulator and benchmark share."""

    asked: int  # just before the close, the cancel, or the fresh connection's connect
    answered: int  # the cancel's 200 had been read
    closed: int | None  # the provider saw it; None if it did not, or before `asked`
    late: int  # tokens made after it: after the close, or the cancel's 200
    blocked: bool = True  # the relay waited for the client; False if it buffers all


def stops(system: System, sizes: Sizes) -> Iterator[Row]:
    """Stops of every kind, beside no other streams and beside many."""
    for others in sizes.others:
        try:
            yield from _beside(system, others, sizes)
        except FAILURES as error:
            yield failed(system.name, f"stops, {others} others", error)


def _beside(system: System, others: int, sizes: Sizes) -> Iterator[Row]:
    talking = {**TALKING, "rate": RATES.get(others, 4)}
    with up(system, others + 64) as place, load(place, others, talking, ramp=True) as held:
        stopping = Stopping(place)
        for name in _PHASES:
            for way in _ways(system):
                stopped = stopping.run(name, way, sizes.stops)
                row = stop_row(system.name, f"{way}: {name}, {others} others", way, stopped)
                yield (
                    row
                    if not held.refusal
                    else replace(row, whole=False, note=f"{held.began} others only; {row.note}")
                )
                held.check()  # fails if one of them was stopped


def _ways(system: System) -> tuple[str, ...]:
    fresh = ("cancel, fresh connection",) if system.name in OURS else ()
    return (*system.ways, *fresh)


def stop_row(system: str, what: str, way: str, stopped: list[Stop]) -> Row:
    """What became of stops of one kind."""
    seen = [(stop, stop.closed) for stop in stopped if stop.closed is not None]
    times = summary([(closed - stop.asked) / 1e6 for stop, closed in seen])
    figure = f"{len(seen)} of {len(stopped)}"
    tokens = sum(stop.late for stop in stopped)
    notes = [f"{tokens} tokens after the {'close' if way == 'close' else '200'}"]
    late = [(closed - stop.answered) / 1e6 for stop, closed in seen if closed > stop.answered]
    if way != "close" and late:
        notes.append(f"{len(late)} seen later than it, by up to {max(late):.2f} ms")
    if not all(stop.blocked for stop in stopped):
        notes.append("never blocked: it buffers what the client does not take")
    if system == DIRECT:
        notes = ["the bench's and the provider's own share"]
    return Row(system, what, figure, times, note="; ".join(notes), whole=len(seen) == len(stopped))


class Stopping:
    """Makes streams ready in batches and stops them one after the other."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._figures = Figures(place.simulator)
        self._number = 0

    def run(self, name: str, way: str, count: int) -> list[Stop]:
        """`count` stops of one kind; fewer if it is hopeless."""
        phase, stopped = _PHASES[name], list[Stop]()
        while len(stopped) < count and not _hopeless(stopped):
            victims = [self._open(phase) for _ in range(min(_BATCH, count - len(stopped)))]
            blocked = [self._until_ready(*victim, phase) for victim in victims]
            for (session, client), was_blocked in zip(victims, blocked, strict=True):
                if not _hopeless(stopped):
                    stop = self._stop(session, client, phase, way)
                    stopped.append(replace(stop, blocked=was_blocked))
                client.close()
        return stopped

    def _kept_alive(self) -> Connection:
        """A connection that has just carried a request: gunicorn's own keep one for 2 s only."""
        cancels = Connection(self._place.relay)
        cancels.ask(cancel("nobody"))
        return cancels

    def _open(self, phase: _Phase) -> tuple[str, Connection]:
        self._number += 1
        session = f"victim-{self._number}"
        simulate = {**TALKING, "id": session, "rate": phase.rate, "stamp": True, **phase.simulate}
        client = Connection(self._place.relay, receive_buffer=4096 if phase.blocked else 0)
        client.send(chat(self._place.path, simulate, sessionId=session))
        return session, client

    def _until_ready(self, session: str, client: Connection, phase: _Phase) -> bool:
        """Waits until the stream is in its phase. False if it cannot be blocked."""
        if phase.taken:
            client.read_until(TOKEN, phase.taken)
        deadline = time.monotonic() + _READY
        figure, before = self._figure(f"{session}?wait=started&timeout=5"), -1
        # Blocked: the provider has tokens to send and its kernel takes none, so the relay reads
        # none: it waits for us.
        while phase.blocked and (
            figure["delivered"] != before or figure["generated"] - before < 10
        ):
            if time.monotonic() > deadline:
                return False
            before = figure["delivered"]
            time.sleep(0.2)
            figure = self._figure(session)
        return True

    def _figure(self, query: str) -> dict[str, Any]:
        figure = self._figures.get(f"/requests/{query}")
        if "started_ns" not in figure:
            raise Refused(f"the provider was not asked: {figure}")
        return figure

    def _stop(self, session: str, client: Connection, phase: _Phase, way: str) -> Stop:
        cancels = self._kept_alive() if way == "cancel" else None
        time.sleep(random.uniform(0.004, 0.014))  # in no step with the others' events
        if not phase.blocked:
            client.discard()
        status, ask = 200, cancel(session)
        asked = time.monotonic_ns()
        if way == "close":
            client.close()
        else:
            cancels = cancels or Connection(self._place.relay)
            status, _ = cancels.ask(ask)
        answered = time.monotonic_ns()
        if cancels is not None:
            cancels.close()
        figure = self._figure(f"{session}?wait=closed&timeout={BOUND:g}")
        closed: int | None = figure["closed_ns"]
        end = closed or time.monotonic_ns()
        made = [
            (instant - figure["started_ns"]) * phase.rate // 10**9 for instant in (answered, end)
        ]
        late = max(0, made[1] - made[0])
        if closed is None or closed < asked or status != 200:
            closed = None  # still open, or something else ended it
        return Stop(asked, answered, closed, late)


def _hopeless(stopped: list[Stop]) -> bool:
    return len(stopped) >= _HOPELESS and all(stop.closed is None for stop in stopped)
