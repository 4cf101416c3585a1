"""What a stop costs that crosses workers and hosts, and what a stream costs on the bus."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator

from bench.client import Address, Connection, Figures, chat
from bench.joined import join
from bench.processes import python, redis_server
from bench.rows import Row, Sizes, summary
from bench.systems import DETACHED, OURS, STREAM, System, cancel, up
from chatstream.bus.messages import Claim, Name

SILENT: dict[str, object] = {"tokens": 1_000_000, "rate": 20, "silent_after": 2}
_BATCH = 20  # streams that are made ready together

# The targets are the issue's: p50 of a cancel beyond the same worker's, p99 of a 404, in ms.
WORKERS, HOSTS, UNKNOWN = 1.5, 3.0, 10.0


class _Cancels:
    """Streams at one address, cancelled at another, over fresh connections."""

    def __init__(self, simulator: Address, streams: Address, cancels: Address) -> None:
        self._figures = Figures(simulator)
        self._streams, self._cancels = streams, cancels
        self._number = 0

    def run(self, count: int) -> tuple[list[float], int]:
        """Times from connecting to the 200, in ms; and how many streams the provider saw closed."""
        times: list[float] = []
        stopped = 0
        while len(times) < count:
            victims = [self._open() for _ in range(min(_BATCH, count - len(times)))]
            for name, client in victims:
                client.read_until(b"data: ", 2)
                status, took = self.cancel(name)
                times.append(took)
                figure = self._figures.get(f"/requests/{name}?wait=closed&timeout=5")
                stopped += status == 200 and figure["closed_ns"] is not None
                client.close()
        return times, stopped

    def unknown(self, count: int) -> tuple[list[float], int]:
        """Times to the 404 of a session that nobody has, and how many there were."""
        answers = [self.cancel(f"nobody-{number}") for number in range(count)]
        return [took for _, took in answers], sum(status == 404 for status, _ in answers)

    def cancel(self, name: str) -> tuple[int, float]:
        asked = time.perf_counter()
        with contextlib.closing(Connection(self._cancels)) as connection:
            status, _ = connection.ask(cancel(name))
            return status, (time.perf_counter() - asked) * 1000

    def _open(self) -> tuple[str, Connection]:
        self._number += 1
        name = f"victim-{id(self)}-{self._number}"
        client = Connection(self._streams)
        client.send(chat(STREAM, {**SILENT, "id": name}, sessionId=name))
        return name, client


def workers(system: System, sizes: Sizes) -> Iterator[Row]:
    """A cancel that reaches any of four workers, beside one worker's own."""
    if system.name not in OURS:
        return
    worker = system.name
    with up(system, 64) as one, up(system, 64, 4) as four:
        own = _Cancels(one.simulator, one.relay, one.relay)
        any_worker = _Cancels(four.simulator, four.relay, four.relay)
        for cancels in (own, any_worker):
            cancels.run(_BATCH)  # every worker has joined
        base, row = _own_row(worker, own, sizes)
        yield row
        yield _row(worker, "cancel, any of 4 workers", any_worker, sizes, base, WORKERS)
        times, count = any_worker.unknown(sizes.firsts)
        p50, p99, most = summary(times)
        yield Row(
            worker,
            "cancel of an unknown session, any of 4 workers",
            f"{count} of {len(times)} are 404",
            (p50, p99, most),
            f"p99 ≤ {UNKNOWN:g}",
            count == len(times) and p99 <= UNKNOWN,
        )


def hosts(system: System, sizes: Sizes) -> Iterator[Row]:
    """A cancel at another gunicorn, joined by Redis."""
    if system.name not in OURS:
        return
    worker = system.name
    with redis_server() as url:
        if url is None:
            yield Row(worker, "cancel, another host", "not measured", note="no redis-server here")
            return
        with (
            up(system, 64, settings={"CHATSTREAM_BUS": url}) as here,
            up(system, 64, settings={"CHATSTREAM_BUS": url}) as there,
        ):
            own = _Cancels(here.simulator, here.relay, here.relay)
            other = _Cancels(here.simulator, here.relay, there.relay)
            for cancels in (own, other):
                cancels.run(_BATCH)
            base, row = _own_row(worker, own, sizes)
            yield row
            yield _row(worker, "cancel, another host, Redis", other, sizes, base, HOSTS)


def _own_row(worker: str, cancels: _Cancels, sizes: Sizes) -> tuple[float, Row]:
    times, stopped = cancels.run(sizes.stops)
    spread = summary(times)
    figure = f"{stopped} of {len(times)}"
    return spread[0], Row(worker, "cancel, the same worker", figure, spread, note="to the 200")


def _row(worker: str, what: str, cancels: _Cancels, sizes: Sizes, base: float, more: float) -> Row:
    times, stopped = cancels.run(sizes.stops)
    spread = summary(times)
    return Row(
        worker,
        what,
        f"{stopped} of {len(times)}",
        spread,
        f"p50 ≤ same + {more:g}",
        stopped == len(times) and spread[0] <= base + more,
        f"p50 is {spread[0] - base:+.2f} ms to the same worker's",
    )


def claims(system: System, sizes: Sizes) -> Iterator[Row]:
    """What a stream's claim and release cost with 2 and with 32 workers on the bus."""
    if system.name != DETACHED:
        return  # no server is in it: once
    with tempfile.TemporaryDirectory() as folder, redis_server() as redis_url:
        for name, url in (("unix", f"unix://{folder}"), ("redis", redis_url)):
            if url is None:
                yield Row(
                    "bus", f"a stream on the bus, {name}", "not measured", note="no redis-server"
                )
                continue
            each = {count: _claim_cost(url, count, sizes.firsts * 5) for count in (2, 32)}
            for count, times in each.items():
                yield Row(
                    "bus",
                    f"a stream on the bus, {name}, {count} workers",
                    f"{summary(times)[0] * 1000:.0f} µs",
                    summary(times),
                    "constant",
                    summary(times)[0] <= 1.5 * summary(each[2])[0],
                    "claim and release",
                )


def _claim_cost(url: str, count: int, streams: int) -> list[float]:
    times = []
    with joined(url, count - 1):
        bus, loop = join(url)
        for number in range(streams):
            claim = Claim(Name("", f"session-{number}", f"stream-{number}"), number)
            began = time.perf_counter()
            bus.claim(claim, reject=False)
            bus.release(claim)
            times.append((time.perf_counter() - began) * 1000)
        bus.close()
        loop.stop()
    return times


@contextlib.contextmanager
def joined(bus: str, workers: int) -> Iterator[None]:
    """Has `workers` processes join a bus, each with some streams."""
    if not workers:
        yield
        return
    command = ["bench.joined", bus, str(workers)]
    with python(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if not process.stdout.readline():
            raise RuntimeError("the other workers did not join")
        yield
