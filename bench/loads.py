"""A load of streams on a place, held by a process of its own: see `bench.load`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.processes import cpu_seconds, machine_seconds, python
from bench.systems import Place, Refused

TALKING: dict[str, object] = {"tokens": 1_000_000, "rate": 20}


@dataclass(frozen=True)
class Stretch:
    """What a load saw in a stretch of time, and whose processor time it took, in seconds."""

    seconds: float
    events: int
    bytes: int
    delays: list[tuple[float, int]]  # ms from the provider's sending, and how many events
    system: float
    simulator: float
    client: float
    others: float

    @property
    def each(self) -> float:
        """The system's µs of processor time per event."""
        return self.system / self.events * 1e6 if self.events else float("nan")

    def shares(self) -> str:
        """Who was busy, in parts of a core."""
        whose = {
            "system": self.system,
            "simulator": self.simulator,
            "load client": self.client,
            "all else": self.others,
        }
        words = [f"{name} {100 * part / self.seconds:.0f} %" for name, part in whose.items()]
        return f"{self.events / self.seconds:.0f} events/s; {', '.join(words)} of a core"


class Load:
    """Streams that are held.

    Attributes:
        began: How many began.
        refusal: Why not all of them did.
    """

    def __init__(self, place: Place, process: subprocess.Popen[str]) -> None:
        self._place, self._process = place, process
        figures = self._answer()
        self.began: int = figures["held"]
        self.refusal = " ".join(" ".join(figures["ended"][:1]).split())[:160]

    def figures(self) -> dict[str, Any]:
        """What it has seen so far; its delays since it was asked last."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def check(self) -> None:
        """Fails if a stream that began has ended."""
        self._check(self.figures())

    def stretch(self, seconds: float) -> Stretch:
        """Looks on for so long. Fails if a stream ends."""
        pids = ([*self._place.pids], [self._place.simulator_pid], [self._process.pid])
        before = self.figures()
        cpus, machine = [cpu_seconds(each) for each in pids], machine_seconds()
        time.sleep(seconds)
        after = self.figures()
        system, simulator, client = (
            cpu_seconds(each) - was for each, was in zip(pids, cpus, strict=True)
        )
        self._check(after)
        return Stretch(
            (after["ns"] - before["ns"]) / 1e9,
            after["events"] - before["events"],
            after["bytes"] - before["bytes"],
            sorted((delay / 1e6, count) for delay, count in after["delays"]),
            system,
            simulator,
            client,
            machine_seconds() - machine - (system + simulator + client),
        )

    def _check(self, figures: dict[str, Any]) -> None:
        if figures["held"] < self.began:
            raise Refused(f"of {self.began} streams, {figures['held']} are left")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        figures: dict[str, Any] | None = json.loads(self._process.stdout.readline() or "null")
        if figures is None:
            raise Refused("the load client ended")
        return figures


@contextlib.contextmanager
def load(
    place: Place, streams: int, simulate: dict[str, object], *, ramp: bool = False, **order: object
) -> Iterator[Load]:
    """Holds `streams` streams open; begins when each has its first event.

    Args:
        place: What to load.
        streams: How many.
        simulate: How the provider is to behave.
        ramp: Fewer will do: none is begun after the first that did not.
        order: More of what `bench.load` reads.

    Raises:
        Refused: Not all of them began.
    """
    what = {"address": place.relay, "path": place.path, "streams": streams, "simulate": simulate}
    words = json.dumps({"patience": 10.0, "within": 60.0, **what, **order})
    with python(["bench.load", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        held = Load(place, process)
        if held.began < streams and not ramp:
            raise Refused(f"it holds {held.began} of {streams} streams: {held.refusal}")
        yield held
