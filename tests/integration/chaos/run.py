"""A run: the plan's streams, forty at a time, and its shocks; then the judgement."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import eventually
from tests.integration.chaos.evidence import Evidence, gather
from tests.integration.chaos.judge import Judge, Report, Violation
from tests.integration.chaos.plan import Plan, Script, Shock
from tests.integration.chaos.stage import Stage
from tests.integration.chaos.visit import Visit, visit

AT_ONCE = 40


def run(stage: Stage, plan: Plan) -> Report:
    """Carries the plan out, and judges what came of it.

    The stage is left at rest, or there is a violation that says why not.
    """
    stage.ready()
    clock_ns = time.time_ns() - time.monotonic_ns()
    with _befalling(stage) as befall:
        visits = _carry_out(stage, plan, befall)
    faults: list[Violation] = []
    try:
        stage.check_rest()
    except (AssertionError, pytest.fail.Exception) as error:
        faults.append(Violation(plan.seed, None, f"not at rest: {error}"))
    judge = Judge(stage, _settled(stage, clock_ns))
    for each in visits:
        judge.look(each)
    judge.look_at_all(plan.seed)
    judge.report.violations += faults
    judge.report.faults.update(shock.kind for shock in plan.shocks)
    return judge.report


def _settled(stage: Stage, clock_ns: int) -> Evidence:
    """The evidence; a stream's last line comes after all that it had was given back."""

    def settled() -> bool:
        return not gather(stage, clock_ns).unended(stage.killed)

    with contextlib.suppress(pytest.fail.Exception):  # the judge will say which
        eventually(settled, "every stream's outcome", 5)
    return gather(stage, clock_ns)


def _carry_out(stage: Stage, plan: Plan, befall: queue.SimpleQueue[Shock | None]) -> list[Visit]:
    shocks: dict[int, list[Shock]] = {}
    for shock in plan.shocks:
        shocks.setdefault(shock.at, []).append(shock)

    def begin(script: Script) -> Visit:
        for shock in shocks.get(script.number, []):
            befall.put(shock)
        return visit(script, stage)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(begin, plan.scripts))


@contextlib.contextmanager
def _befalling(stage: Stage) -> Iterator[queue.SimpleQueue[Shock | None]]:
    """A thread that does what is put into the queue, one shock after the other."""
    shocks: queue.SimpleQueue[Shock | None] = queue.SimpleQueue()
    failed: list[Exception] = []

    def work() -> None:
        while (shock := shocks.get()) is not None:
            try:
                stage.befall(shock)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=work, name="shocks")
    thread.start()
    try:
        yield shocks
    finally:
        shocks.put(None)
        thread.join()
    if failed:
        raise failed[0]
