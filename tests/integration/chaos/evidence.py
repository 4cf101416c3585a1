"""What the logs and the provider say of a run."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.integration.chaos.stage import SECOND, Stage

_LINE = re.compile(r"^([\d.]+) [A-Z]+ \[(\d+)\] \[SSE\] (\S+) (.*)$", re.MULTILINE)
_STARTED = re.compile(r"started stream=(\S+)")
_ENDED = re.compile(
    r"(completed|aborted by \S+ cause=|failed: )(\w*) phase=\w+ stream=(\S+) events=(\d+) "
    r".*?(?:stop_ms=([\d.]+))?$"
)

_HARMLESS = re.compile(
    r"\[bus\] redis (?:is (?:away|back)|cannot be reached yet)|\[bus\] redis: the worker of "
    r"|\[SSE\] \S+ failed: "
    r"|Invalid request from ip="
    r"|Worker \(pid:\d+\) was sent SIG(KILL|TERM)!"
)
_LOUD = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Traceback")


class Ending(NamedTuple):
    """A terminal line."""

    pid: int
    word: str  # "completed", "aborted <cause>", "failed <code>"
    events: int
    stop_ms: float | None


@dataclass
class Evidence:
    """By stream id: who began it, how it ended, what the provider has of it; the rest of the logs.

    Attributes:
        lates: When a worker had stood still, in ns of the monotonic clock, for how long, and which.
        aways: When a worker said that Redis was away, in ns of the monotonic clock, and which.
        loud: Lines that should not be there.
    """

    started: dict[str, list[int]]
    endings: dict[str, list[Ending]]
    lines: dict[str, list[str]]
    figures: dict[str, list[dict[str, Any]]]
    lates: list[tuple[int, int, int]]
    aways: list[tuple[int, int]]
    loud: list[str]

    def unended(self, but: set[int]) -> list[str]:
        """Streams without an ending whose worker is none of `but`."""
        return [
            name
            for name, pids in self.started.items()
            if name not in self.endings and not but.intersection(pids)
        ]


def gather(stage: Stage, clock_ns: int) -> Evidence:
    """All there is by now.

    Args:
        stage: Where the run was.
        clock_ns: What `time.time_ns` has more than `time.monotonic_ns`.
    """
    log = stage.log()
    found = Evidence(defaultdict(list), {}, defaultdict(list), defaultdict(list), [], [], [])
    for match in _LINE.finditer(log):
        _take(found, match)
    for match in re.finditer(r"^([\d.]+) INFO \[(\d+)\] \[late\] ([\d.]+)$", log, re.M):
        at, late = (int(float(number) * SECOND) for number in match.group(1, 3))
        found.lates.append((at - clock_ns, late, int(match[2])))
    for match in re.finditer(r"^([\d.]+) WARNING \[(\d+)\] \[bus\] redis is away", log, re.M):
        found.aways.append((int(float(match[1]) * SECOND) - clock_ns, int(match[2])))
    found.loud = [
        line for line in log.splitlines() if _LOUD.search(line) and not _HARMLESS.search(line)
    ]
    for figure in stage.provider.get("/requests"):
        found.figures[figure["id"]].append(figure)
    return found


def _take(found: Evidence, match: re.Match[str]) -> None:
    _, pid, session, said = match.groups()
    found.lines[session].append(match[0])
    if started := _STARTED.match(said):
        found.started[started[1]].append(int(pid))
    elif ended := _ENDED.match(said):
        what, which, stream, events, stop_ms = ended.groups()
        word = f"{what.split()[0].rstrip(':')} {which}".strip()
        ending = Ending(int(pid), word, int(events), float(stop_ms) if stop_ms else None)
        found.endings.setdefault(stream, []).append(ending)
