"""500 streams through stops, resets, stalls, truncations, killed workers and restarts of Redis."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import require
from tests.integration.chaos.plan import plan
from tests.integration.chaos.run import run
from tests.integration.chaos.stage import stage

STREAMS = 500


@pytest.mark.timeout(240)
def test_the_invariants_hold_in_chaos(
    worker_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stream has one outcome and no other, a stop stops, and nothing is left behind.

    CHATSTREAM_CHAOS_SEED has the same again, as far as the plan goes: not the machine's timing.
    """
    require("redis-server")
    seed = int(os.environ.get("CHATSTREAM_CHAOS_SEED") or random.randrange(1_000_000))
    with capsys.disabled():
        print(f" CHATSTREAM_CHAOS_SEED={seed} ", end="", flush=True)
    with stage(worker_class, tmp_path) as made:
        report = run(made, plan(seed, STREAMS))
    # Else it proves nothing: every kind of outcome was there.
    words = Counter(word.split()[0] for word in report.outcomes.elements())
    assert min(words[word] for word in ("completed", "aborted", "failed")) > STREAMS / 20
    assert report.streams["undisturbed"] > STREAMS / 4
    assert not report.violations, "\n\n".join(map(str, report.violations))


def test_a_seed_is_a_plan() -> None:
    """The same one every time, and of each stream however many there are."""
    assert plan(7, 500) == plan(7, 500)
    assert plan(7, 500) != plan(8, 500)
    assert plan(7, 500).scripts[:100] == plan(7, 100).scripts
    kinds = Counter(script.kind for script in plan(7, 500).scripts)
    assert len(kinds) == 14
    assert min(kinds.values()) > 2
    shocks = Counter(shock.kind for shock in plan(7, 1000).shocks)
    redis = {"redis kill", "redis term", "redis pause", "redis freeze"}
    assert shocks.keys() == {"kill", "term", *redis}
