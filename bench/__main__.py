"""The comparison: the same load on each system in turn; one table of figures beside targets.

It asserts nothing. What is not installed is skipped, with a line.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from bench.compare import added, judged
from bench.measure import MEASUREMENTS, run
from bench.processes import ROOT, raise_file_limit
from bench.record import READING, conditions
from bench.rows import Row, Sizes
from bench.systems import HOOKS, SYSTEMS
from bench.table import table, verdict, words

RESULTS = Path(__file__).with_name("RESULTS.md")
CHARTS = ROOT / "docs" / "charts"
QUICK = Sizes(stops=20, seconds=3, streams=300, firsts=50, others=(0, 200), most=1000)


def main() -> None:
    """Reads the command line and runs."""
    options = _options()
    sizes = QUICK if options.quick else Sizes()
    if options.stops:
        sizes = replace(sizes, stops=options.stops)
    raise_file_limit()
    busy, rows = [os.getloadavg()[0]], list[Row]()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for row in run(options.only, options.systems, sizes):
            rows.append(row)
            print(words(row), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept", file=sys.stderr)
    busy.append(os.getloadavg()[0])
    rows = judged(added(rows))
    text = f"{table(rows)}\n\n{verdict(rows)}"
    print(text)
    options.out.write_text(f"# Benchmark\n\n{conditions(busy)}{READING}\n{text}\n")
    if options.charts is not None:
        _draw(rows, options.charts)


def _draw(rows: list[Row], folder: Path) -> None:
    try:
        from bench.charts import draw
    except ImportError as error:  # an extra's
        print(f"no charts: {error}", file=sys.stderr)
        return
    for path in draw(rows, folder):
        print(f"drawn: {path.name}", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--systems", type=some([*SYSTEMS, *HOOKS]), default=list(SYSTEMS), metavar="A,B",
        help=f"of {', '.join(SYSTEMS)} (default: all); {', '.join(HOOKS)}")  # fmt: skip
    add("--only", type=some(MEASUREMENTS), default=list(MEASUREMENTS), metavar="A,B",
        help=f"of {', '.join(MEASUREMENTS)} (default: all)")  # fmt: skip
    add("--stops", type=int, help="stops of each kind (default: 100)")
    add("--quick", action="store_true", help="fewer and shorter: rough figures")
    add("--out", type=Path, default=RESULTS, help="the results (default: bench/RESULTS.md)")
    add(
        "--charts", type=Path, help="the charts' folder (default: docs/charts with --out's default)"
    )
    options = parser.parse_args()
    if options.charts is None and options.out == RESULTS:
        options.charts = CHARTS
    return options


def some(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the words that are known, with commas between."""

    def chosen(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is not known; choose from {', '.join(known)}"
            )
        return words

    return chosen


if __name__ == "__main__":
    main()
