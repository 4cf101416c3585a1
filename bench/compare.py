"""What rows mean beside each other: latency added, ratios, targets. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.rows import Row
from bench.systems import DETACHED, DIRECT, GEVENT, ITERABLE, NGINX, NODE

LATENCY = "latency of an event"
AGAINST = (NGINX, NODE)
"""The systems that all others are compared with."""


@dataclass(frozen=True)
class Clause:
    """A bound of one figure.

    Attributes:
        stat: "value", "p50" or "p99".
        bound: What it may be at most, or with `least` has to be.
        against: The system whose figure is the unit; empty: ms, KB, or what the figure is in.
        least: Whether more is better.
    """

    stat: str
    bound: float
    against: str = ""
    least: bool = False

    def __str__(self) -> str:
        stat = "" if self.stat == "value" else f"{self.stat} "
        unit = f" x {self.against}" if self.against else ""
        return f"{stat}{'≥' if self.least else '≤'} {self.bound:g}{unit}"

    def met(self, row: Row, reference: Row | None) -> bool | None:
        """Whether a row is within the bound; None if that cannot be told."""
        figure, unit = _stat(row, self.stat), 1.0
        if self.against:
            unit = math.nan if reference is None else _stat(reference, self.stat)
        if math.isnan(figure) or math.isnan(unit):
            return None
        return figure >= self.bound * unit if self.least else figure <= self.bound * unit


def _stat(row: Row, stat: str) -> float:
    if stat == "value":
        return math.nan if row.compared is None else row.compared
    return row.times[("p50", "p99").index(stat)] if row.times else math.nan


_WITHIN = (Clause("p99", 10),)
_STOPS = {DETACHED: 0.5, GEVENT: 0.6, ITERABLE: 0.6}
_ALL = (DETACHED, GEVENT, ITERABLE)


def _stop(share: float) -> tuple[Clause, ...]:
    return (Clause("p50", share, NODE), Clause("p99", 1, NODE))


_PHASES = ("headers awaited", "chatty body", "silent body", "blocked")

TARGETS: dict[tuple[str, str], tuple[Clause, ...]] = {
    ("CPU per event, 200 x 20/s", DETACHED): (
        Clause("value", 1.3, NGINX),
        Clause("value", 0.45, NODE),
    ),
    ("CPU per event, 200 x 20/s", GEVENT): (
        Clause("value", 2.2, NGINX),
        Clause("value", 0.65, NODE),
    ),
    ("CPU per event, 200 x 20/s", ITERABLE): (
        Clause("value", 4, NGINX),
        Clause("value", 1, NODE),
    ),
    ("memory (PSS) per stream, 1000 streams", DETACHED): (Clause("value", 16),),
    ("memory (PSS) per stream, 1000 streams", GEVENT): (Clause("value", 50),),
    ("memory (PSS) per stream, 1000 streams", ITERABLE): (Clause("value", 90),),
    **{(f"close: {phase}, 200 others", name): _stop(_STOPS[name])
       for phase in _PHASES for name in _ALL},
    **{(f"cancel: {phase}, 200 others", name): _stop(1) for phase in _PHASES for name in _ALL},
    **{(f"{way}: {phase}, 1000 others", name): _WITHIN
       for way in ("close", "cancel") for phase in _PHASES for name in _ALL},
    **{("added time to the first event", name): (Clause("p50", 1.5),) for name in _ALL},
    ("events, one stream, as fast as it comes", DETACHED): (
        Clause("value", 0.7, NGINX, least=True),
    ),
    ("crowd: added latency of an event", DETACHED): (Clause("p99", 5),),
    **{(f"crowd: {what}", DETACHED): _WITHIN
       for what in ("close", "cancel", "a cancel's answer", "a page's answer")},
}  # fmt: skip
"""The issue's: of a measure, what a system of ours must reach."""


def added(rows: Iterable[Row]) -> list[Row]:
    """Makes what an event took into what the system added: less what it took directly."""
    rows = list(rows)
    base = {row.what: row.times for row in rows if row.system == DIRECT and LATENCY in row.what}
    return [_added(row, base.get(row.what)) for row in rows]


def _added(row: Row, base: tuple[float, ...] | None) -> Row:
    if base is None or row.system == DIRECT:
        return row
    what = row.what.replace(LATENCY, f"added {LATENCY}")
    times = tuple(there - here for there, here in zip(row.times, base, strict=True))
    notes = [f"in all {row.times[0]:.2f} and {row.times[1]:.2f}", row.note]
    return replace(row, what=what, times=times, note="; ".join(filter(None, notes)))


def ratio(row: Row, rows: Iterable[Row], against: str) -> float | None:
    """A row's figure over the same of another system, if both are there."""
    other = _of(rows, row.what, against)
    if other is None or row.system in (DIRECT, against) or not other.compared:
        return None
    return None if row.compared is None else row.compared / other.compared


def judged(rows: Iterable[Row]) -> list[Row]:
    """Gives rows their targets, and says whether they are met. None is without its whole."""
    rows = list(rows)
    return [_judged(row, rows) for row in rows]


def _judged(row: Row, rows: list[Row]) -> Row:
    clauses = TARGETS.get((row.what, row.system), ())
    if not clauses:
        return row
    results = [clause.met(row, _of(rows, row.what, clause.against)) for clause in clauses]
    known = [result for result in results if result is not None]
    met: bool | None = row.whole and all(known)
    return replace(
        row,
        target=", ".join(map(str, clauses)),
        met=met if known or not row.whole else None,
    )


def _of(rows: Iterable[Row], what: str, system: str) -> Row | None:
    return next((row for row in rows if (row.what, row.system) == (what, system)), None)
