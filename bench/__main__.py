"""The benchmark. Prints a table of figures beside their targets; asserts nothing."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from bench.measure import MEASUREMENTS
from bench.rows import Row, Sizes

RESULTS = Path(__file__).with_name("RESULTS.md")
QUICK = Sizes(stops=20, seconds=3, streams=300, firsts=50)
READING = """
Times run from just before the client's close or cancel to the provider's stamp, on one clock. The
stamp waits until the provider's process gets a core, so on a busy machine it may be later than the
cancel's 200 though the shutdown was before it, and "tokens after the 200" counts up to the stamp.
The rows without a relay show the stamp's own delay. The kernel's word, without that delay, is the
tracepoint sock:inet_sock_set_state (perf record -k mono): the provider's socket goes to CLOSE_WAIT.
"""
_COLUMNS = ("worker", "measured", "figure", "p50 ms", "p99 ms", "max ms", "target", "met", "note")


def main() -> None:
    """Reads the command line and runs."""
    options = _options()
    sizes = QUICK if options.quick else Sizes()
    if options.stops:
        sizes = replace(sizes, stops=options.stops)
    busy = [os.getloadavg()[0]]
    rows = []
    for worker in options.workers:
        for name in options.only:
            for row in MEASUREMENTS[name](worker, sizes):
                rows.append(row)
                print("  ".join(filter(None, _cells(row))), file=sys.stderr, flush=True)
    busy.append(os.getloadavg()[0])
    table = _table(rows)
    print(table)
    options.out.write_text(f"# Benchmark\n\n{_conditions(busy)}{READING}\n{table}\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    workers = ("gthread", "gevent")
    parser.add_argument("--stops", type=int, help="stops of each kind (default: 100)")
    parser.add_argument("--workers", type=_some(workers), default=workers, metavar="A,B")
    parser.add_argument("--only", type=_some(MEASUREMENTS), default=MEASUREMENTS, metavar="A,B")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter: rough figures")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args()


def _some(words: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of `words`, with commas between."""

    def chosen(text: str) -> list[str]:
        if not set(text.split(",")) <= set(words):
            raise argparse.ArgumentTypeError(f"choose from {','.join(words)}")
        return text.split(",")

    return chosen


def _cells(row: Row) -> list[str]:
    times = [f"{time:.2f}" for time in row.times] or ["", "", ""]
    met = {None: "", True: "yes", False: "no"}[row.met]
    return [row.worker, row.what, row.figure, *times, row.target, met, row.note]


def _table(rows: list[Row]) -> str:
    """The rows as Markdown that is also legible as text."""
    lines = [list(_COLUMNS), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _without_paths(words: list[str]) -> list[str]:
    """The command line as it can be typed anywhere."""
    return [word for word in words if "/" not in word and word != "--out"]


def _conditions(busy: list[float]) -> str:
    packages = ("flask", "requests", "urllib3", "gunicorn", "gevent")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    cores = len(os.sched_getaffinity(0))
    code = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    facts = {
        "Date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "Command": " ".join(["python -m bench", *_without_paths(sys.argv[1:])]),
        "Machine": f"{model or platform.machine()}, {cores} cores, Linux {platform.release()}",
        "Load average": f"{busy[0]:.1f} before, {busy[1]:.1f} after (the benchmark's own included)",
        "Code": f"{code or 'unknown'}, as it was at the end",
        "Versions": f"Python {platform.python_version()}, {versions}",
    }
    return "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


if __name__ == "__main__":
    main()
