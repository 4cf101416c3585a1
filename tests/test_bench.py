"""The comparison's own arithmetic: ratios, targets, tables, what is skipped."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench.__main__ import some
from bench.compare import TARGETS, Clause, added, judged, ratio
from bench.measure import MEASUREMENTS, run
from bench.record import without_paths
from bench.rows import Row, Sizes, failed, spread, summary
from bench.stops import Stop, stop_row
from bench.systems import DETACHED, DIRECT, ITERABLE, NGINX, NODE, OURS, SYSTEMS, Launch, System
from bench.table import COLUMNS, table, verdict

CPU = "CPU per event, 200 x 20/s"
CLOSE = "close: silent body, 200 others"
LATENCY = "latency of an event, 200 x 20/s"


def cpu(system: str, value: float) -> Row:
    return Row(system, CPU, f"{value} µs", value=value)


def close(system: str, p50: float, p99: float, *, whole: bool = True) -> Row:
    return Row(system, CLOSE, "", (p50, p99, p99), whole=whole)


def met(system: str, rows: list[Row]) -> bool | None:
    """What is said of a system's row."""
    [row] = [row for row in judged(rows) if row.system == system]
    return row.met


# ---- figures


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3, 3, 3)),
        ([4.0, 1.0, 3.0, 2.0], (2, 4, 4)),
        ([float(n) for n in range(1, 201)], (100, 198, 200)),
    ],
)
def test_p50_p99_and_maximum(values: list[float], expected: tuple[float, ...]) -> None:
    """The nearest rank, in whatever order the values come."""
    assert summary(values) == expected


def test_a_spread_of_nothing() -> None:
    """It is no number, and no exception."""
    assert all(map(math.isnan, summary([])))


def test_counted_values() -> None:
    """A value that came often counts as often."""
    assert spread([(1.0, 98), (5.0, 1), (9.0, 1)]) == (1, 5, 9)


# ---- comparing


def test_a_ratio_is_to_the_same_measure() -> None:
    """Of another system; none without it, of itself, or of `direct`."""
    rows = [cpu(NGINX, 10), cpu(DETACHED, 15), replace(cpu(NODE, 1), what="something else")]
    assert ratio(rows[1], rows, NGINX) == 1.5
    assert ratio(rows[1], rows, NODE) is None
    assert ratio(rows[0], rows, NGINX) is None
    assert ratio(cpu(DIRECT, 3), rows, NGINX) is None


def test_a_ratio_of_times_is_their_p50s() -> None:
    """What was never stopped has none, on either side."""
    never = close("naive flask", math.nan, math.nan, whole=False)
    rows = [close(NODE, 2, 9), close(DETACHED, 0.5, 1), never]
    assert ratio(rows[1], rows, NODE) == 0.25
    assert ratio(never, rows, NODE) is None
    assert ratio(rows[1], [never, replace(never, system=NODE)], NODE) is None


def test_latency_added_is_what_it_takes_directly_less() -> None:
    """Percentile by percentile; the direct one stays, others are left alone."""
    direct = Row(DIRECT, LATENCY, "", (1.0, 2.0, 3.0))
    relayed = Row(DETACHED, LATENCY, "", (1.5, 4.0, 9.0))
    one, two, three = added([direct, relayed, cpu(NODE, 3)])
    assert (one, three) == (direct, cpu(NODE, 3))
    assert (two.what, two.times) == (f"added {LATENCY}", (0.5, 2.0, 6.0))
    assert added([relayed]) == [relayed]


@pytest.mark.parametrize(
    ("nginx", "node", "ours", "expected"),
    [
        (10, 30, 13, True),
        (10, 30, 13.1, False),  # against nginx
        (10, 20, 13, False),  # against Node
        (None, 30, 13, True),
        (None, 20, 13, False),
        (None, None, 13, None),
    ],
)
def test_a_target_of_ratios(
    nginx: float | None, node: float | None, ours: float, expected: bool | None
) -> None:
    """All that can be told has to be met; without any reference nothing is said."""
    others = [cpu(name, value) for name, value in ((NGINX, nginx), (NODE, node)) if value]
    assert met(DETACHED, [*others, cpu(DETACHED, ours)]) is expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (close(DETACHED, 1.0, 9), True),
        (close(DETACHED, 1.1, 9), False),  # half of Node's p50
        (close(DETACHED, 0.1, 9.1), False),  # never above Node's p99
        (close(DETACHED, 0.1, 0.2, whole=False), False),  # one of them was not stopped
        (close(ITERABLE, 1.2, 9), True),
        (close(NGINX, 50, 90), None),  # a peer has no target
    ],
)
def test_a_target_of_stops(row: Row, expected: bool | None) -> None:
    """The p50, the p99, and that all of them were stopped."""
    assert met(row.system, [close(NODE, 2, 9), row]) is expected


def test_a_failure_misses_its_target() -> None:
    """What could not be measured of ours was not reached, reference or not."""
    never = close(DETACHED, math.nan, math.nan, whole=False)
    assert met(DETACHED, [never]) is False


def test_more_may_be_better() -> None:
    """A clause can be a lower bound."""
    clause, nginx = Clause("value", 0.7, NGINX, least=True), cpu(NGINX, 100)
    assert str(clause) == "≥ 0.7 x nginx"
    assert clause.met(cpu(DETACHED, 70), nginx) is True
    assert clause.met(cpu(DETACHED, 69), nginx) is False
    assert clause.met(cpu(DETACHED, 69), None) is None


def test_targets_are_ours() -> None:
    """Every target names a system of ours."""
    assert {system for _, system in TARGETS} == set(OURS)


# ---- the table


def test_the_table_puts_together_what_is_compared() -> None:
    """Measures in the order of their first row, ratios beside, all lines of one width."""
    rows = [cpu(NGINX, 10), close(NGINX, 1, 2), cpu(NODE, 40), cpu(DETACHED, 12)]
    lines = table(judged(rows)).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(COLUMNS)
    assert [line[1] for line in cells[2:]] == [NGINX, NODE, DETACHED, NGINX]
    ours = dict(zip(COLUMNS, cells[4], strict=True))
    assert (ours["x nginx"], ours["x node"], ours["met"]) == ("1.20", "0.30", "yes")


def test_a_note_cannot_break_the_table() -> None:
    """Bars and new lines of a message stay out of the cells."""
    line = table([Row("s", "what", "failed", note="a | b\nc")]).splitlines()[2]
    assert line.count("|") == len(COLUMNS) + 1


def test_the_verdict_names_what_is_missed() -> None:
    """And counts the rest."""
    text = verdict(judged([cpu(NGINX, 10), cpu(NODE, 40), cpu(DETACHED, 12), cpu(ITERABLE, 90)]))
    assert text.startswith("1 of 2 targets are met.")
    assert ITERABLE in text
    assert DETACHED not in text


def test_the_verdict_names_what_of_ours_failed() -> None:
    """It has no figure to judge, and is no target met. A peer's failure is the peer's."""
    rows = [failed(name, "held", EOFError()) for name in (DETACHED, NODE)]
    assert verdict(judged(rows)).splitlines()[1:] == [f"- failed: {DETACHED}, held"]


# ---- stops


def test_stops_are_counted_and_timed() -> None:
    """One that was not stopped counts, and has no time."""
    stops = [Stop(0, 3_000_000, 2_000_000, 0), Stop(0, 3_000_000, None, 40)]
    row = stop_row(NODE, "cancel: silent body, 0 others", "cancel", stops)
    assert (row.figure, row.times, row.whole) == ("1 of 2", (2, 2, 2), False)
    assert "40 tokens after the 200" in row.note


def test_what_buffers_all_is_never_blocked() -> None:
    """The row says that the phase was not reached."""
    row = stop_row(NODE, "close: blocked, 0 others", "close", [Stop(0, 1, 1, 0, blocked=False)])
    assert "never blocked" in row.note


# ---- running


def absent(name: str, why: str = "") -> System:
    return System(name, lambda *given: Launch([]), lambda: why)


def measured(system: System, sizes: Sizes) -> Iterator[Row]:
    if system.name == "broken":
        raise EOFError("it\nclosed")
    yield Row(system.name, "measured", "1")


def test_what_is_not_installed_is_skipped_with_a_line() -> None:
    """And the others are measured."""
    known = {"here": absent("here"), "away": absent("away", "no away here")}
    measurements = {"one": measured}
    rows = list(run(["one"], known, Sizes(), measurements=measurements, known=known))
    assert [(row.system, row.figure, row.note) for row in rows] == [
        ("away", "skipped", "no away here"),
        ("here", "1", ""),
    ]


def test_a_failure_is_a_row() -> None:
    """It costs that system's measurement and no other."""
    known = {name: absent(name) for name in ("broken", "here")}
    rows = list(run(["one"], known, Sizes(), measurements={"one": measured}, known=known))
    assert [(row.system, row.figure, row.note, row.whole) for row in rows] == [
        ("broken", "failed", "it closed", False),
        ("here", "1", "", True),
    ]


def test_a_measurement_of_all_before_the_next() -> None:
    """Those that are compared follow each other."""
    known = {name: absent(name) for name in "ab"}
    measurements = {"one": measured, "two": measured}
    rows = list(run(["one", "two"], known, Sizes(), measurements=measurements, known=known))
    assert "".join(row.system for row in rows) == "abab"


def test_each_system_knows_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without programs on the path the peers made of them cannot be run, and say so."""
    monkeypatch.setenv("PATH", "")
    assert SYSTEMS[NODE].lacks() == "no node here"
    assert SYSTEMS[NGINX].lacks() == "no nginx here"
    assert SYSTEMS[DETACHED].lacks() == SYSTEMS[DIRECT].lacks() == ""


def test_options_name_what_there_is() -> None:
    """With commas between; a word that is not known is named in the refusal."""
    assert some(SYSTEMS)("nginx, gthread iterable") == [NGINX, ITERABLE]
    with pytest.raises(argparse.ArgumentTypeError, match="'flask' is not known"):
        some(SYSTEMS)("nginx,flask")
    assert some(MEASUREMENTS)("cpu,idle") == ["cpu", "idle"]


def test_the_command_is_told_without_paths() -> None:
    """As it can be typed on another machine."""
    typed = ["--only", "cpu", "--out", "/a/b.md", "--charts", "/c", "--systems", "gthread iterable"]
    assert without_paths(typed) == ["--only", "cpu", "--systems", '"gthread iterable"']
