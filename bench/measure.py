"""The measurements by name, and their turns: a measurement of all systems, then the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bench.buses import claims, hosts, workers
from bench.crowd import crowd
from bench.flow import cores, cpu, fast, first, held, memory
from bench.idle import idle
from bench.receiving import receiving
from bench.rows import FAILURES, Row, Sizes, failed
from bench.stops import stops
from bench.systems import HOOKS, SYSTEMS, System

Measurement = Callable[[System, Sizes], Iterator[Row]]

MEASUREMENTS: dict[str, Measurement] = {
    "cpu": cpu,
    "cores": cores,
    "fast": fast,
    "memory": memory,
    "first": first,
    "held": held,
    "stops": stops,
    "crowd": crowd,
    "workers": workers,
    "hosts": hosts,
    "claims": claims,
    "idle": idle,
    "receiving": receiving,
}


def run(
    names: Iterable[str],
    systems: Iterable[str],
    sizes: Sizes,
    *,
    measurements: dict[str, Measurement] = MEASUREMENTS,
    known: dict[str, System] = {**SYSTEMS, **HOOKS},  # noqa: B006
) -> Iterator[Row]:
    """Measures; what cannot be run, and what fails, is a row that says why.

    Systems are measured one right after the other, so that what else the machine does is much the
    same for all who are compared.
    """
    here: list[System] = []
    for system in (known[name] for name in systems):
        if why := system.lacks():
            yield Row(system.name, "everything", "skipped", note=why)
        else:
            here.append(system)
    for name in names:
        for system in here:
            try:
                yield from measurements[name](system, sizes)
            except FAILURES as error:
                yield failed(system.name, name, error)
