"""The rows of the table, and how much is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

_FAILED = "failed"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    stops: int = 100  # of each kind
    seconds: float = 10.0  # a measured stretch
    streams: int = 1000  # for the memory
    firsts: int = 300  # requests, for the first event
    others: tuple[int, ...] = (0, 200, 1000)  # streams beside the ones that are stopped
    most: int = 5000  # streams to try to hold


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        system: Whose figure it is.
        what: What is measured. Rows that are to be compared say the same.
        figure: In words.
        times: p50, p99 and maximum in ms, where it is times.
        value: What ratios are made of; None: the p50, if there is one.
        whole: Whether all of what was tried came true.
        target: What it must reach.
        met: Whether it does; None without a target.
        note: What else to know.
    """

    system: str
    what: str
    figure: str
    times: tuple[float, ...] = ()
    target: str = ""
    met: bool | None = None
    note: str = ""
    value: float | None = None
    whole: bool = True

    @property
    def failed(self) -> bool:
        """Whether it says that something could not be measured."""
        return self.figure == _FAILED

    @property
    def compared(self) -> float | None:
        """What a ratio is made of."""
        value = self.times[0] if self.value is None and self.times else self.value
        return None if value is None or math.isnan(value) else value


FAILURES = (RuntimeError, OSError, EOFError, ValueError)
"""What a system may raise that does not do what it should."""


def failed(system: str, what: str, error: Exception) -> Row:
    """A row that says what could not be measured, and why."""
    why = " ".join(str(error).split())[:160] or type(error).__name__
    return Row(system, what, _FAILED, note=why, whole=False)


def summary(values: list[float]) -> tuple[float, ...]:
    """p50, p99 (nearest rank) and maximum; NaN of nothing."""
    return spread([(value, 1) for value in sorted(values)])


def spread(counted: list[tuple[float, int]]) -> tuple[float, ...]:
    """p50, p99 (nearest rank) and maximum of ordered values, each with its number."""
    total = sum(count for _, count in counted)
    return tuple(_rank(counted, math.ceil(share * total)) for share in (0.5, 0.99, 1))


def _rank(counted: list[tuple[float, int]], rank: int) -> float:
    for value, count in counted:
        rank -= count
        if rank <= 0:
            return value
    return math.nan
