"""The figures as charts: one SVG for each family of measures. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rows import Row
from bench.systems import DIRECT, OURS

mpl.use("svg")
_OURS, _OTHERS, _TEXT = "#0b6e4f", "#b8bec7", "#24292f"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "svg.hashsalt": "chatstream",  # else each run gives other ids
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "figure.facecolor": "white",
}
_WIDTH = 8.4  # inches: as wide as a README's column

BARS = {
    "cpu": ("CPU per event, 200 x 20/s", "µs of CPU for an event: 200 streams, 20 events/s each"),
    "memory": ("memory (PSS) per stream, 1000 streams", "KB of memory for a stream, of 1,000"),
    "first": ("added time to the first event", "ms added to the first event, p50"),
    "fast": ("events, one stream, as fast as it comes", "events/s of one stream, unthrottled"),
    "held": ("most streams held, one worker", "streams held by one worker"),
    "latency": ("added latency of an event, 200 x 20/s", "ms added to each event, p99"),
}
STOPS = {
    "close": "ms from the close to the provider's end, 200 others: p50 to p99, logarithmic",
    "cancel": "ms from a cancel to the provider's end, 200 others: p50 to p99, logarithmic",
}
_P99 = ("latency",)


def draw(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Writes what there are figures for."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, (what, title) in BARS.items():
            bars = _bars(rows, what, p99=name in _P99)
            if len(bars) > 1:
                yield _bar_chart(bars, title, folder / f"{name}.svg")
        for way, title in STOPS.items():
            panels = _panels(rows, way)
            if panels:
                yield _stop_chart(panels, title, folder / f"{way}.svg")


def _bars(rows: Iterable[Row], what: str, *, p99: bool) -> list[tuple[str, float]]:
    pairs = [(row, row.times[1] if p99 and row.times else row.compared) for row in rows]
    return [
        (row.system, value)
        for row, value in pairs
        if row.what == what and row.system != DIRECT and value is not None and row.whole
    ]


def _bar_chart(bars: list[tuple[str, float]], title: str, path: Path) -> Path:
    names, values = zip(*reversed(bars), strict=True)
    figure, axes = plt.subplots(figsize=(_WIDTH, 0.9 + 0.34 * len(bars)), layout="constrained")
    drawn = axes.barh(names, values, height=0.68, color=[_colour(name) for name in names])
    axes.bar_label(drawn, labels=[_number(value) for value in values], padding=5)
    _finish(axes, title)
    axes.set_xlim(min(0, *values), max(values) * 1.12)
    return _save(figure, path)


def _panels(rows: Iterable[Row], way: str) -> dict[str, list[Row]]:
    """Of each phase its rows, beside 200 others."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        kind, _, rest = row.what.partition(": ")
        phase, _, others = rest.partition(", ")
        if (kind, others) == (way, "200 others") and row.system != DIRECT:
            panels.setdefault(phase, []).append(row)
    return panels


def _stop_chart(panels: dict[str, list[Row]], title: str, path: Path) -> Path:
    height = 0.9 + 0.3 * max(map(len, panels.values()))
    figure, grid = plt.subplots(
        math.ceil(len(panels) / 2),
        2,
        figsize=(_WIDTH, height * math.ceil(len(panels) / 2)),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for axes, (phase, rows) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, phase, rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return _save(figure, path)


def _panel(axes: Axes, phase: str, rows: list[Row]) -> None:
    """A line from p50 to p99 for each system; in words what was not stopped."""
    axes.set_xscale("log")
    for place, row in enumerate(reversed(rows)):
        colour = _colour(row.system)
        if math.isnan(row.times[0]):
            axes.annotate("never", (0.02, place), xycoords=("axes fraction", "data"), va="center")
            axes.plot([], [])
            continue
        p50, p99 = row.times[:2]
        axes.plot([p50, p99], [place, place], color=colour, linewidth=4, solid_capstyle="round")
        axes.plot(p50, place, "o", color=colour, markersize=8)
        label = f"  {_number(p50)} - {_number(p99)}" + ("" if row.whole else f", {row.figure}")
        axes.annotate(label, (p99, place), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.system for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.margins(x=0.35)
    _finish(axes, phase)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xticks([])
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        if label.get_text() in OURS:
            label.set_fontweight("bold")


def _colour(system: str) -> str:
    return _OURS if system in OURS else _OTHERS


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
    return path
