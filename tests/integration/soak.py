"""Chaos for as long as one asks: `make soak SECONDS=600 SEED=1`. Prints a table.

Rounds of streams, each with a seed of its own: the first one's is SEED, and the next one's is one
more. What is violated is printed at once, with its seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.rows import summary
from tests.integration.chaos.judge import Report, stalled_bytes
from tests.integration.chaos.plan import plan
from tests.integration.chaos.run import run
from tests.integration.chaos.stage import stage

WORKER_CLASSES = ("gthread", "gevent")


def main() -> int:
    """Reads the command line and runs; returns 1 if something was violated."""
    options = _options()
    print(f"soak: {options.seconds:g} s from seed {options.seed}", flush=True)
    reports = {}
    with tempfile.TemporaryDirectory(prefix="chatstream-soak-") as folder:
        seed = options.seed
        for worker_class in options.workers:
            end = time.monotonic() + options.seconds / len(options.workers)
            reports[worker_class] = Report()
            seed = _soak(Path(folder), worker_class, options.streams, seed, end, reports)
    for worker_class, report in reports.items():
        print(f"\n{worker_class}\n")
        print("\n".join(_table(report)))
    return int(any(report.violations for report in reports.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.integration.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="about (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument(
        "--streams", type=int, default=500, help="of a round (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", nargs="+", choices=WORKER_CLASSES, default=WORKER_CLASSES, metavar="CLASS"
    )
    return parser.parse_args()


def _soak(
    base: Path, worker_class: str, streams: int, seed: int, end: float, reports: dict[str, Report]
) -> int:
    """Rounds on one stage until `end`, one at least. Returns the next seed."""
    folder = base / worker_class
    folder.mkdir()
    with stage(worker_class, folder) as made:
        while True:
            began = time.monotonic()
            report = run(made, plan(seed, streams))
            took = time.monotonic() - began
            bad = len(report.violations)
            print(f"{worker_class} seed {seed}: {took:.0f} s, {bad} violations", flush=True)
            for violation in report.violations:
                print(violation, file=sys.stderr, flush=True)
            reports[worker_class].add(report)
            seed += 1
            if time.monotonic() + took / 2 > end:
                return seed


def _table(report: Report) -> Iterator[str]:
    """A report as Markdown that is also legible as text."""
    yield f"| {'what':<20} | {'which':<38} | {'count':>14} |"
    yield f"| {'-' * 20} | {'-' * 38} | {'-' * 14} |"
    for what, counts in (
        ("streams", report.streams),
        ("faults injected", report.faults),
        ("outcomes", report.outcomes),
        ("answers of cancels", report.answers),
    ):
        yield from _rows(what, counts)
    for what, values in (
        ("stop_ms of the log", report.stop_ms),
        ("ms to the provider", report.noticed_ms),
        ("ms after the answer", report.over_ms),
        ("worker late, ms", report.late_ms),
    ):
        for which, value in zip(("p50", "p99", "worst"), summary(values), strict=True):
            yield _row(what, which, f"{value:.2f}")
    for which, most in sorted(report.in_flight.items()):
        yield _row("generated, undeliv'd", f"worst, {which}", str(most))
    yield _row("", "what stalled bytes may be", str(stalled_bytes()))
    seeds = sorted({violation.seed for violation in report.violations})
    which = f"seeds {', '.join(map(str, seeds))}" if seeds else ""
    yield _row("violations", which, str(len(report.violations)))


def _rows(what: str, counts: Counter[str]) -> Iterator[str]:
    for which, count in sorted(counts.items()):
        yield _row(what, which, str(count))


def _row(what: str, which: str, value: str) -> str:
    return f"| {what:<20} | {which[:38]:<38} | {value:>14} |"


if __name__ == "__main__":
    sys.exit(main())
