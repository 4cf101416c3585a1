"""The measurements. Each yields the rows of the table as it gets them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.buses import claims, hosts, workers
from bench.client import Connection, Figures, chat, request
from bench.receiving import receiving
from bench.rows import Row, Sizes, summary
from bench.servers import (
    Stand,
    context_switches,
    cpu_seconds,
    load,
    machine_seconds,
    memory_kb,
    stand,
)

OTHERS = 200  # streams that run beside what is measured
TALKING: dict[str, object] = {"tokens": 1_000_000, "rate": 20}
STREAM = "/api/chat/stream"
DIRECT = "/v1/chat/completions"
_BATCH = 10  # streams that are made ready together

# The targets are the issue's. A latency's are p50 and p99 in ms.
CLOSE, CANCEL = (1.0, 10.0), (2.5, 10.0)
CPU = {"gthread": 60.0, "gevent": 45.0}
MEMORY, IDLE = 90.0, 5.0


# Stop latency


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
class _Stop:
    """One stop; instants in ns on the clock that simulator and benchmark share."""

    asked: int  # just before the close, the cancel, or the fresh connection's connect
    answered: int  # the cancel's 200 had been read
    closed: int | None  # the provider saw it; None if it did not, or before `asked`
    late_tokens: int  # made between `answered` and `closed`


def latency(worker: str, sizes: Sizes) -> Iterator[Row]:
    """From the client's close or cancel to the provider's seeing it, in every phase."""
    with stand(worker, 256) as place, load(place.relay, OTHERS, TALKING) as (_, events):
        stops = _Stops(place)
        for name, phase in _PHASES.items():
            for way in ("close, no relay between", "close", "cancel", "cancel, fresh connection"):
                yield _stop_row(worker, way, name, stops.run(phase, way, sizes.stops))
                events()  # fails if one of them was stopped


def _stop_row(worker: str, way: str, phase: str, stops: list[_Stop]) -> Row:
    seen = [(stop, stop.closed) for stop in stops if stop.closed is not None]
    times = summary([(closed - stop.asked) / 1e6 for stop, closed in seen])
    what, figure = f"{way}: {phase}", f"{len(seen)} of {len(stops)}"
    if "no relay" in way:
        return Row(worker, what, figure, times, note="the bench's and the provider's own share")
    p50, p99 = CLOSE if way == "close" else CANCEL
    target = f"p50 ≤ {p50:g}, p99 ≤ {p99:g}"
    met = len(seen) == len(stops) and times[0] <= p50 and times[1] <= p99
    if way == "close":
        return Row(worker, what, figure, times, target, met)
    late = [(closed - stop.answered) / 1e6 for stop, closed in seen if closed > stop.answered]
    tokens = sum(stop.late_tokens for stop in stops)
    note = f"{tokens} tokens after the 200; {len(late)} seen later than it"
    note += f", by up to {max(late):.2f} ms" if late else ""
    return Row(worker, what, figure, times, target, met and not tokens, note)


class _Stops:
    """Makes streams ready in batches and stops them one after the other."""

    def __init__(self, place: Stand) -> None:
        self._place = place
        self._figures = Figures(place.simulator)
        self._number = 0

    def run(self, phase: _Phase, way: str, count: int) -> list[_Stop]:
        """`count` stops of one kind."""
        stops: list[_Stop] = []
        while len(stops) < count:
            victims = [self._open(phase, way) for _ in range(min(_BATCH, count - len(stops)))]
            for name, client in victims:
                self._until_ready(name, client, phase)
            # One that has carried a request, so that the server knows it as kept alive.
            cancels = Connection(self._place.relay)
            cancels.ask(request("POST", "/api/chat/cancel/nobody"))
            for name, client in victims:
                time.sleep(random.uniform(0.004, 0.014))  # in no step with the others' events
                if not phase.blocked:
                    client.discard()
                stops.append(self._stop(name, client, phase, way, cancels))
                client.close()
            cancels.close()
        return stops

    def _open(self, phase: _Phase, way: str) -> tuple[str, Connection]:
        self._number += 1
        name = f"victim-{self._number}"
        simulate = {**TALKING, "id": name, "rate": phase.rate, **phase.simulate}
        address, path = self._place.relay, STREAM
        if "no relay" in way:
            address, path = self._place.simulator, DIRECT
        client = Connection(address, receive_buffer=4096 if phase.blocked else 0)
        client.send(chat(path, simulate, sessionId=name))
        return name, client

    def _until_ready(self, name: str, client: Connection, phase: _Phase) -> None:
        if phase.taken:
            client.read_until(b"data: ", phase.taken)
        figure, before = self._figures.get(f"/requests/{name}?wait=started&timeout=5"), -1
        # Blocked: the provider has tokens to send and its kernel takes none, so the relay reads
        # none: it waits for us.
        while phase.blocked and (
            figure["delivered"] != before or figure["generated"] - before < 10
        ):
            before = figure["delivered"]
            time.sleep(0.2)
            figure = self._figures.get(f"/requests/{name}")

    def _stop(
        self, name: str, client: Connection, phase: _Phase, way: str, cancels: Connection
    ) -> _Stop:
        cancel, status = request("POST", f"/api/chat/cancel/{name}"), 200
        asked = time.monotonic_ns()
        if way.startswith("close"):
            client.close()
        else:
            if way.endswith("fresh connection"):
                cancels = Connection(self._place.relay)
            status, _ = cancels.ask(cancel)
        answered = time.monotonic_ns()
        figure = self._figures.get(f"/requests/{name}?wait=closed&timeout=5")
        if way.endswith("fresh connection"):
            cancels.close()
        closed = figure["closed_ns"]
        if closed is None or closed < asked or status != 200:
            return _Stop(asked, answered, None, 0)  # still open, or something else ended it
        made = [
            (instant - figure["started_ns"]) * phase.rate // 10**9 for instant in (answered, closed)
        ]
        return _Stop(asked, answered, closed, max(0, made[1] - made[0]))


# The rest


def cpu(worker: str, sizes: Sizes) -> Iterator[Row]:
    """The worker's processor time for one event, and who else was busy."""
    with stand(worker, 256) as place, load(place.relay, OTHERS, TALKING) as (pid, events):
        pids = (place.worker_pid, place.simulator_pid, pid)
        time.sleep(1)  # what the beginnings left to do
        began, count = time.monotonic(), events()
        before, machine = [cpu_seconds(pid) for pid in pids], machine_seconds()
        time.sleep(sizes.seconds)
        used = [cpu_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
        machine, count = machine_seconds() - machine, events() - count
        seconds = time.monotonic() - began
    shares = [f"{100 * share / seconds:.0f} %" for share in (*used, machine - sum(used))]
    each = used[0] / count * 1e6
    words = "worker {}, simulator {}, load client {}, all else {} of a core".format(*shares)
    yield Row(
        worker,
        f"CPU per relayed event, {OTHERS} streams",
        f"{each:.1f} µs",
        target=f"≤ {CPU[worker]:g} µs",
        met=each <= CPU[worker],
        note=f"{count / seconds:.0f} events/s; {words}",
    )


def memory(worker: str, sizes: Sizes) -> Iterator[Row]:
    """What a stream adds to the worker's memory."""
    slow: dict[str, object] = {**TALKING, "rate": 1}
    with stand(worker, 1150) as place:
        with load(place.relay, 20, slow):
            pass  # the first streams import and allocate what all share
        figures = Figures(place.simulator)
        while figures.get("/stats")["connections_open"]:
            time.sleep(0.05)
        before = memory_kb(place.worker_pid)
        with load(place.relay, sizes.streams, slow) as (_, events):
            time.sleep(sizes.seconds / 3)
            events()
            total = memory_kb(place.worker_pid)
    each = (total - before) / sizes.streams
    yield Row(
        worker,
        f"memory (PSS) per stream, {sizes.streams} streams",
        f"{each:.1f} KB",
        target=f"≤ {MEMORY:g} KB",
        met=each <= MEMORY,
        note=f"{before / 1024:.0f} MB before, {total / 1024:.0f} MB with them",
    )


def first(worker: str, sizes: Sizes) -> Iterator[Row]:
    """What the relay adds to the time to the first event; nothing else runs."""
    times: dict[str, list[float]] = {DIRECT: [], STREAM: []}
    with stand(worker, 64) as place:
        ways = {DIRECT: Connection(place.simulator), STREAM: Connection(place.relay)}
        for number in range(sizes.firsts + 20):
            for path, connection in ways.items():
                asked = time.monotonic_ns()
                connection.send(chat(path, {"tokens": 3, "rate": 0}))
                connection.read_until(b"data: ")
                took = (time.monotonic_ns() - asked) / 1e6
                connection.read_until(b"\r\n0\r\n\r\n")
                if number >= 20:  # those before warm up
                    times[path].append(took)
        for connection in ways.values():
            connection.close()
    direct, relayed = summary(times[DIRECT]), summary(times[STREAM])
    pairs = zip(times[STREAM], times[DIRECT], strict=True)  # one right after the other
    added = summary([there - here for there, here in pairs])
    note = "p50 and p99 relayed {:.2f} {:.2f}, direct {:.2f} {:.2f}"
    note = note.format(*relayed[:2], *direct[:2])
    yield Row(worker, "added time to the first event", f"{sizes.firsts} requests", added, note=note)


def idle(worker: str, sizes: Sizes) -> Iterator[Row]:
    """How often the worker wakes for streams on which nothing happens."""
    silent: dict[str, object] = {**TALKING, "silent_after": 1}
    with (
        stand(worker, 256, CHATSTREAM_PING_INTERVAL="3600") as place,
        load(place.relay, OTHERS, silent) as (_, events),
    ):
        time.sleep(1)
        began, before = time.monotonic(), context_switches(place.worker_pid)
        time.sleep(sizes.seconds)
        after = context_switches(place.worker_pid)
        switches = sum(count - before.get(tid, 0) for tid, count in after.items())
        rate = switches / (time.monotonic() - began)
        events()
    yield Row(
        worker,
        f"context switches, {OTHERS} silent streams",
        f"{rate:.1f} /s",
        target=f"< {IDLE:g} /s",
        met=rate < IDLE,
        note="pings put off; gunicorn's own life signs included",
    )


MEASUREMENTS: dict[str, Callable[[str, Sizes], Iterator[Row]]] = {
    "latency": latency,
    "cpu": cpu,
    "memory": memory,
    "first": first,
    "idle": idle,
    "workers": workers,
    "hosts": hosts,
    "claims": claims,
    "receiving": receiving,
}
