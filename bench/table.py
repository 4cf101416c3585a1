"""Rows as one table, in Markdown that is also legible as text. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.compare import AGAINST, ratio
from bench.rows import Row
from bench.systems import OURS

COLUMNS = (
    "measured",
    "system",
    "figure",
    "p50 ms",
    "p99 ms",
    "max ms",
    *(f"x {name}" for name in AGAINST),
    "target",
    "met",
    "note",
)


def words(row: Row) -> str:
    """A row as a line of progress."""
    return "  ".join(filter(None, [row.system, row.what, row.figure, *_times(row), row.note]))


def table(rows: Sequence[Row]) -> str:
    """All rows; those that measure the same are together, in the order of their first."""
    order = list(dict.fromkeys(row.what for row in rows))
    rows = sorted(rows, key=lambda row: order.index(row.what))
    lines = [list(COLUMNS), *(_cells(row, rows) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def verdict(rows: Sequence[Row]) -> str:
    """How many targets are met, which are not, and what of ours could not be measured."""
    judged = [row for row in rows if row.met is not None]
    missed = [f"{row.system}, {row.what} ({row.target})" for row in judged if not row.met]
    head = f"{len(judged) - len(missed)} of {len(judged)} targets are met."
    failed = [f"{row.system}, {row.what}" for row in rows if row.failed and row.system in OURS]
    lines = [*(f"- not met: {one}" for one in missed), *(f"- failed: {one}" for one in failed)]
    return "\n".join([head, *lines])


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    times = _times(row) or ["", "", ""]
    ratios = [ratio(row, rows, name) for name in AGAINST]
    met = {None: "", True: "yes", False: "no"}[row.met]
    # A bar would end the cell.
    note = row.note.replace("|", "/").replace("\n", " ")
    cells = [row.what, row.system, row.figure, *times, *map(_factor, ratios)]
    return [*cells, row.target, met, note]


def _times(row: Row) -> list[str]:
    return ["-" if math.isnan(time) else f"{time:.2f}" for time in row.times]


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
