"""How often a worker wakes for streams on which nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.loads import TALKING, load
from bench.processes import context_switches
from bench.rows import Row, Sizes
from bench.systems import OURS, System, up

_OTHERS = 200
_TARGET = 5.0
"""Wake-ups a second: the issue's."""


def idle(system: System, sizes: Sizes) -> Iterator[Row]:
    """Context switches of the worker beside silent streams."""
    if system.name not in OURS:
        return
    silent = {**TALKING, "silent_after": 1}
    with (
        up(system, _OTHERS, settings={"CHATSTREAM_PING_INTERVAL": "3600"}) as place,
        load(place, _OTHERS, silent) as held,
    ):
        time.sleep(1)
        began, before = time.monotonic(), context_switches(place.worker_pid)
        time.sleep(sizes.seconds)
        after = context_switches(place.worker_pid)
        switches = sum(count - before.get(tid, 0) for tid, count in after.items())
        rate = switches / (time.monotonic() - began)
        held.check()
    yield Row(
        system.name,
        f"context switches, {_OTHERS} silent streams",
        f"{rate:.1f} /s",
        target=f"< {_TARGET:g} /s",
        met=rate < _TARGET,
        note="pings put off; gunicorn's own life signs included",
        value=rate,
    )
