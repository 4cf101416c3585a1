"""The invariants: what has to be true of every stream, whatever befell it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chatstream.sockets.client import UNSENT
from chatstream.upstream.dialling import UNREAD
from tests.conftest import PATIENCE
from tests.integration.chaos.evidence import Ending, Evidence
from tests.integration.chaos.plan import PAD, Script
from tests.integration.chaos.stage import SECOND, Stage
from tests.integration.chaos.visit import STALL_BUFFER, Press, Reader, Visit

LATENCY = 0.25
"""Seconds from a stop's instant to the provider's stamp of it, and for an event's way through the
relay, on a machine that is not late. What this process or a worker overslept meanwhile is added
twice: the stop and its stamp, or both ends of a way, each wait for a core."""

ON_THE_WAY = 3
"""Events of a client that reads which are no matter of time: the one that is being made counts as
generated, one may be in a buffer of either hop. All others are made within `LATENCY`: so with 20,
50 or 100 tokens a second 8, 16 or 28 in all, of an answer that would have 100 000."""

STANDSTILL = 2.0 * PATIENCE / 10
"""Seconds that a worker may stand still. Less is the machine's doing; more is a worker's own."""

_ANSWERS = {200: "True", 404: "not_found", 503: "bus_unavailable", 504: "unconfirmed"}
_REFUSALS = {400, 409, 429, 502, 503, 504}


def stalled_bytes() -> int:
    """What a client that does not read can have on the way: in the kernel, and in both programs.

    The provider's send buffer grows as it likes; the relay's two are bounded, and so is the
    client's, which the kernel doubles.
    """
    provider = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    own = 2 * (65_536 + PAD)  # the provider's write and the relay's, an event each
    return provider + UNREAD + UNSENT + 2 * STALL_BUFFER + own


@dataclass(frozen=True)
class Violation:
    """Something that must not be, and all that is known of it."""

    seed: int
    number: int | None
    what: str
    context: str = ""

    def __str__(self) -> str:
        stream = "" if self.number is None else f" stream {self.number}"
        return f"seed {self.seed}{stream}: {self.what}\n{self.context}".rstrip()


@dataclass
class Report:
    """A run in figures; several can be added up."""

    streams: Counter[str] = field(default_factory=Counter)  # all; those undisturbed by Redis
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    stop_ms: list[float] = field(default_factory=list)
    noticed_ms: list[float] = field(default_factory=list)  # from the act to the provider's stamp
    over_ms: list[float] = field(default_factory=list)  # from the instant that counts
    late_ms: list[float] = field(default_factory=list)  # workers that stood still
    in_flight: Counter[str] = field(default_factory=Counter)  # the worst
    violations: list[Violation] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for mine, theirs in (
            (self.streams, other.streams),
            (self.faults, other.faults),
            (self.outcomes, other.outcomes),
            (self.answers, other.answers),
        ):
            mine.update(theirs)
        self.stop_ms += other.stop_ms
        self.noticed_ms += other.noticed_ms
        self.over_ms += other.over_ms
        self.late_ms += other.late_ms
        self.in_flight |= other.in_flight
        self.violations += other.violations


class Judge:
    """Looks at a run that is over."""

    def __init__(self, stage: Stage, evidence: Evidence) -> None:
        self._stage = stage
        self._evidence = evidence
        self.report = Report()

    def look(self, visit: Visit) -> None:
        """At one visit."""
        script = visit.script
        self.report.faults[script.kind] += 1
        self.report.streams.update({"all": 1, "undisturbed": self._acted_in_calm(visit)})
        for press in visit.presses:
            self.report.answers[f"{press.status} {press.reason}"] += 1
        for what in self._faults(visit):
            context = self._context(visit)
            self.report.violations.append(Violation(script.seed, script.number, what, context))

    def look_at_all(self, seed: int) -> None:
        """At what belongs to no stream."""
        found = [f"a line of the log: {line}" for line in self._evidence.loud]
        for at, pid in self._evidence.aways:
            # What made it late may have been up to a connection's timeouts ago.
            begin = at - 2 * SECOND
            if not self._stage.shocks_between(begin, at, "redis") and not self._was_late(begin, at):
                found.append(f"worker {pid} lost Redis, which was there")
        for _, late, pid in self._evidence.lates:
            self.report.late_ms.append(late / 1e6)
            if late > STANDSTILL * SECOND:
                found.append(f"worker {pid} stood still for {late / SECOND:.1f} s")
        for name, figures in self._evidence.figures.items():
            found += [f"the provider generates for {name}" for figure in figures if figure["open"]]
        self.report.violations += [Violation(seed, None, what) for what in found]

    def _faults(self, visit: Visit) -> Iterator[str]:
        if visit.trouble:
            yield f"the driver: {visit.trouble}"
        for press in visit.presses:
            yield from self._wrong_answer(visit, press)
        if sum(press.status == 200 for press in visit.presses) > 1:
            yield "two cancels say that they stopped it"
        if visit.script.act == "raw":
            yield from self._wrong_refusal(visit)
            return
        for which, reader in enumerate(visit.readers):
            yield from self._of_stream(visit, which, reader)

    # Answers

    def _calm(self, begin_ns: int, end_ns: int) -> bool:
        """Whether Redis is there all the time."""
        return not self._stage.shocks_between(begin_ns, end_ns, "redis")

    def _acted_in_calm(self, visit: Visit) -> bool:
        """Whether Redis was there from the question until what the client did had its answer."""
        return self._calm(visit.begin_ns, (visit.acted_ns or visit.end_ns) + SECOND // 2)

    def _killed(self, visit: Visit) -> bool:
        """Whether a worker was killed that had a stream of this session."""
        names = map(visit.script.stream, (0, 1))
        pids = [pid for name in names for pid in self._evidence.started.get(name, [])]
        # It may have been killed when the stream had its name and had not said so yet.
        nameless = any(self._excused(visit, reader) for reader in visit.readers)
        return nameless or not self._stage.killed.isdisjoint(pids)

    def _was_late(self, begin_ns: int, end_ns: int) -> bool:
        """Whether the machine was so late that a reply may have come too late."""
        return self._late_ns(begin_ns, end_ns) > 0.15 * SECOND

    def _late_ns(self, begin_ns: int, end_ns: int) -> int:
        """The longest that this process or a worker stood still in this stretch."""
        found = [
            late for at, late, _ in self._evidence.lates if at > begin_ns and at - late < end_ns
        ]
        return max([self._stage.canary.late_ns(begin_ns, end_ns), *found])

    def _wrong_answer(self, visit: Visit, press: Press) -> Iterator[str]:
        begin, end = press.begin_ns, press.end_ns
        if press.status == 0:
            between = partial(self._stage.shocks_between, begin, end)
            if not between("kill") and not between("term"):
                yield f"a cancel got no answer: {press.reason}"
        elif _ANSWERS.get(press.status) != press.reason:
            yield f"a cancel got {press.status} {press.reason}"
        elif press.status in (503, 504) and self._calm(begin, end):
            hung = press.status == 504 and self._killed(visit)
            if not hung and not self._was_late(begin, end):
                yield f"a cancel got {press.status}, and all was well"

    def _wrong_refusal(self, visit: Visit) -> Iterator[str]:
        (reader,) = visit.readers
        expected = visit.script.raw[1]
        if expected != (0,) and reader.status not in expected and not self._excused(visit, reader):
            yield f"{visit.script.raw[0][:60]!r} got {reader.status}"

    def _excused(self, visit: Visit, reader: Reader) -> bool:
        """Whether there is no answer because its worker was killed, or ends."""
        between = partial(self._stage.shocks_between, visit.begin_ns, visit.end_ns)
        ends = reader.status == 503 and between("term")
        return bool(ends or (reader.status == 0 and (between("kill") or between("term"))))

    # Outcomes

    def _of_stream(self, visit: Visit, which: int, reader: Reader) -> Iterator[str]:
        name = visit.script.stream(which)
        pids = self._evidence.started.get(name, [])
        endings = self._evidence.endings.get(name, [])
        killed = bool(self._stage.killed.intersection(pids))
        if len(pids) > 1:
            yield f"{name} was started {len(pids)} times"
        if len(endings) > 1 or (len(endings) != len(pids) and not killed):
            yield f"{name} has {len(endings)} outcomes"
        if not pids:
            yield from self._not_started(visit, reader)
        self.report.outcomes[endings[0].word if endings else self._fate(killed, reader)] += 1
        if endings and not killed:
            yield from self._wrong_ending(visit, which, endings[0])
            yield from self._wrong_body(visit, which, reader, endings[0])
            yield from self._went_on(visit, which, reader, endings[0])
        if len(self._evidence.figures.get(name, [])) > 2:
            yield f"the provider was asked more than twice for {name}"

    def _fate(self, killed: bool, reader: Reader) -> str:
        return "(killed)" if killed else f"(not started, {reader.status or 'no answer'})"

    def _not_started(self, visit: Visit, reader: Reader) -> Iterator[str]:
        left = visit.script.act in ("fin", "rst", "half") and reader.status == 0
        refused = reader.status in (503, 504) and not self._calm(visit.begin_ns, visit.end_ns)
        if not left and not refused and not self._excused(visit, reader):
            yield f"never started, and the answer was {reader.status} {reader.reason()}"

    def _wrong_ending(self, visit: Visit, which: int, ending: Ending) -> Iterator[str]:
        expected = self._expected(visit, which)
        if ending.pid in self._stage.terminated:
            expected.add("aborted shutdown")
        if ending.word not in expected:
            yield f"{visit.script.stream(which)} is {ending.word!r}, not {sorted(expected)}"
        if any(press.status == 200 for press in visit.presses) and ending.word != "aborted cancel":
            yield f"a cancel said that it stopped it, but it is {ending.word!r}"
        if ending.word == "aborted client" and which == 0:
            for press in visit.presses:
                # Not one that came before the stream, or reached what it was too early for.
                if press.status == 404 and press.begin_ns > (visit.readers[0].began_ns or math.inf):
                    yield "a cancel was told that there is no such stream, and it went on"
        if ending.stop_ms is not None:
            self.report.stop_ms.append(ending.stop_ms)

    def _expected(self, visit: Visit, which: int) -> set[str]:
        script = visit.script
        calm = self._acted_in_calm(visit)
        if script.act == "supersede":
            expected = {"completed"} if which else {"aborted superseded"}
            # While they cannot know of each other both live; later one of the two is ended.
            return (
                expected
                if calm and not self._killed(visit)
                else {"completed", "aborted superseded", "aborted client"}
            )
        if script.act == "read":
            return _by_itself(script)
        expected = {_USUAL[script.act]}
        # Whoever got no answer had a worker that was killed: maybe before it read the cancel.
        unheard = {press.status for press in visit.presses} == {0}
        if script.act in ("cancel", "early") and (not calm or unheard):
            expected |= {"aborted client", *_gave_up(script)}
        return expected

    # The client's side

    def _wrong_body(
        self, visit: Visit, which: int, reader: Reader, ending: Ending
    ) -> Iterator[str]:
        if ending.word in ("aborted client", "aborted shutdown", "aborted stalled"):
            return  # nobody was there, or took it; or it was told, in whichever way
        name, blocks = visit.script.stream(which), reader.blocks
        if reader.end != "whole" and not visit.gave_up:
            yield f"the body of {name} is {reader.end}"
        elif ending.word == "completed":
            yield from _not_whole(visit.script, which, reader)
        elif ending.word.startswith("aborted") and (reader.status != 200 or blocks["done"]):
            yield f"{name} was stopped, and got {reader.status} {dict(blocks)}"
        elif ending.word.startswith("aborted") and blocks["error"]:
            yield f"{name} was stopped, and got an error"
        elif ending.word.startswith("failed") and reader.status not in {200, *_REFUSALS}:
            yield f"{name} failed with {reader.status}"
        elif ending.word.startswith("failed") and reader.status == 200:
            told = blocks["error"] + (visit.script.kind == "provider's error")
            if told != 1 or blocks["done"]:
                yield f"{name} failed, and got {dict(blocks)}"
        got = blocks["token"] + blocks["done"] + blocks["other"]
        if reader.end == "whole" and reader.status == 200 and got != ending.events:
            yield f"{name} got {got} events, and the log has {ending.events}"

    # The provider's side

    def _went_on(self, visit: Visit, which: int, reader: Reader, ending: Ending) -> Iterator[str]:
        """Whether it generated after the stop, or more than can have been on the way."""
        script = visit.script
        left = ending.word == "aborted client"
        stopped = visit.left_ns if left else visit.stopped_ns
        figures = self._evidence.figures.get(script.stream(which), [])
        calm = self._acted_in_calm(visit)
        if script.act == "early" and ending.word == "aborted cancel" and calm and figures:
            yield "it was cancelled before it began, and the provider was called"
        counts = left or (which == 0 and (calm or script.act != "supersede"))
        if stopped is None or not ending.word.startswith("aborted") or not counts:
            return
        for figure in figures:
            if figure["closed_ns"] is not None:
                yield from self._overrun(visit, reader, figure, stopped)

    def _overrun(
        self, visit: Visit, reader: Reader, figure: dict[str, Any], stopped: int
    ) -> Iterator[str]:
        # The question of a client that has left may lie about until a worker takes it.
        late = figure["closed_ns"] - max(stopped, figure["started_ns"])
        allowed = int(LATENCY * SECOND)
        allowed += 2 * self._late_ns(stopped - SECOND // 2, stopped + SECOND)
        self.report.over_ms.append(late / 1e6)
        acted = stopped if stopped == visit.left_ns else visit.pressed_ns or stopped
        self.report.noticed_ms.append((figure["closed_ns"] - acted) / 1e6)
        if late > allowed:
            yield f"the provider was closed {late / 1e6:.0f} ms after the stop"
        what, more, most = _in_flight(visit.script, reader, figure, stopped, allowed)
        self.report.in_flight |= Counter({what: more})
        if more > most:
            yield f"{more} {what} were generated and not delivered; at most {most} can be"

    def _context(self, visit: Visit) -> str:
        """What one needs to understand a violation."""
        script = visit.script
        lines = [f"  {script!r}"]
        for reader in visit.readers:
            lines.append(
                f"  got: {reader.status} {dict(reader.blocks)} {reader.end} from {reader.worker}"
                f" rest={reader.rest[-80:]!r} gave_up={visit.gave_up}"
            )
        base = visit.begin_ns
        lines += [
            f"  cancel at {(press.begin_ns - base) / SECOND:.3f} s: {press.status}"
            f" {press.reason} after {(press.end_ns - press.begin_ns) / SECOND:.3f} s"
            for press in visit.presses
        ]
        for window in self._stage.shocks_between(visit.begin_ns, visit.end_ns):
            begin, end = ((at - base) / SECOND for at in window[1:])
            lines.append(f"  {window.kind} at {begin:.3f} s, may be felt until {end:.3f} s")
        late = self._late_ns(visit.begin_ns, visit.end_ns) / 1e6
        lasted = (visit.end_ns - visit.begin_ns) / SECOND
        lines.append(f"  lasted {lasted:.3f} s; the machine was late by {late:.0f} ms")
        lines += [f"  {line}" for line in self._evidence.lines.get(script.session, [])]
        for which in (0, 1):
            for figure in self._evidence.figures.get(script.stream(which), []):
                keys = ("id", "generated", "delivered", "closed_by")
                told = {key: figure[key] for key in keys}
                closed = ((figure["closed_ns"] or 0) - base) / SECOND
                lines.append(f"  provider: {told} closed at {closed:.3f} s")
        return re.sub(r"(?m)^  \s+", "  ", "\n".join(lines))


_USUAL = {
    "read": "completed",
    "cancel": "aborted cancel",
    "early": "aborted cancel",
    "fin": "aborted client",
    "rst": "aborted client",
    "half": "aborted client",
    "stuck": "aborted stalled",
}


def _by_itself(script: Script) -> set[str]:
    if script.ends == "completed":
        return {"completed"}
    if script.kind == "reset":  # a RST takes what was not read along, the headers perhaps
        return {f"failed {script.ends}", "failed upstream_unreachable"}
    return {f"failed {script.ends}"}


def _gave_up(script: Script) -> set[str]:
    """How what no cancel has reached ends: a provider, or the client, is idle for too long."""
    if script.stalls:
        return {"aborted stalled"}
    if "headers_after" in script.simulate:
        return {"failed upstream_timeout"}
    return {"failed upstream_idle"} if "silent_after" in script.simulate else set()


def _not_whole(script: Script, which: int, reader: Reader) -> Iterator[str]:
    tokens = 20 if which else script.simulate["tokens"]
    done = 0 if script.simulate.get("no_done") else 1
    blocks = reader.blocks
    if (blocks["token"], blocks["done"], blocks["error"], reader.rest) != (tokens, done, 0, b""):
        yield f"completed, but of {tokens} tokens {dict(blocks)} came, and {reader.rest[-80:]!r}"


def _in_flight(
    script: Script, reader: Reader, figure: dict[str, Any], stopped: int, allowed_ns: int
) -> tuple[str, int, int]:
    """What was generated and not delivered: its kind, how much, and how much it may be."""
    if script.stalls:
        size = PAD + 150  # about
        return "stalled bytes", (figure["delivered"] - reader.tokens) * size, stalled_bytes()
    rate = script.simulate["rate"]
    most = ON_THE_WAY + math.ceil(rate * allowed_ns / SECOND)
    delivered = reader.tokens
    if "headers_after" in script.simulate or "silent_after" in script.simulate:
        # Meanwhile others are made, which the provider keeps to itself: from the stop on, then.
        delivered = max(0, (stopped - figure["started_ns"]) * rate // SECOND)
    return "events", figure["generated"] - delivered, most
