"""What the doctor found, by name."""

from __future__ import annotations

from collections.abc import Iterable

from chatstream.cli.doctor.check import Check

KEY = "sk-very-secret"
OURS = "chatstream.workers.gthread.ThreadWorker"


def states(checks: Iterable[Check]) -> dict[str, str]:
    return {check.name: check.state.value for check in checks}


def only(checks: Iterable[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check
