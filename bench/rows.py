"""The rows of the table, and how much is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    stops: int = 100  # of each kind
    seconds: float = 10.0  # a measured stretch
    streams: int = 1000  # for the memory
    firsts: int = 300  # requests, for the first event


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    worker: str
    what: str
    figure: str
    times: tuple[float, ...] = ()  # p50, p99 and maximum in ms
    target: str = ""
    met: bool | None = None  # None without a target
    note: str = ""


def summary(values: list[float]) -> tuple[float, ...]:
    """p50, p99 (nearest rank) and maximum; NaN of nothing."""
    ordered = sorted(values) or [math.nan]
    return tuple(ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99, 1))
