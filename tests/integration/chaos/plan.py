"""What a run does: decided by its seed and by nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STREAMS_PER_KILL = 100
STREAMS_PER_REDIS_SHOCK = 125  # of the second half
RATES = (20, 50, 100)  # tokens per second
ENDLESS = 100_000  # tokens: an answer that only a stop ends
PAD = 16_384  # bytes of a stalled stream's event
SEND_TIMEOUT = 3.0  # seconds that a client may take nothing
STALL_TOKENS = 400  # of one that goes on: 6.5 MB, more than the buffers begin with


@dataclass(frozen=True)
class Script:
    """What one client does, and what the provider does to it.

    Attributes:
        kind: Its row in the table.
        hosts: Where it asks, and where its cancel or its second question goes.
        simulate: The provider's part, as `chatstream.simulator.Plan` has it.
        act: "read", "early", "cancel", "fin", "rst", "half", "stuck", "supersede", "raw".
        tokens: Acts when it has so many of them, ...
        after: ... and so many seconds have passed since.
        stalls: Whether it reads nothing in these seconds.
        named: Whether its cancel names the stream, not only the session.
        presses: How often it cancels.
        ends: How the stream ends if nothing else ends it: "completed", or the code of its failure.
        raw: What is sent in place of a chat, and the statuses it may get; 0 is none.
    """

    seed: int
    number: int
    kind: str
    hosts: tuple[int, int] = (0, 0)
    simulate: dict[str, Any] = field(default_factory=dict)
    act: str = "read"
    tokens: int = 0
    after: float = 0.0
    stalls: bool = False
    named: bool = True
    presses: int = 1
    ends: str = "completed"
    raw: tuple[str, tuple[int, ...]] = ("", ())

    @property
    def session(self) -> str:
        return f"{self.seed}.{self.number}"

    def stream(self, which: int = 0) -> str:
        """The name of its stream; 1 for the one that supersedes."""
        return f"{self.session}.{'ab'[which]}"


@dataclass(frozen=True)
class Shock:
    """Something that befalls a worker or Redis when stream `at` begins.

    Attributes:
        kind: "kill" or "term" of a worker; "redis kill", "redis term", "redis pause" and
            "redis freeze".
        pick: Chooses the host and the worker.
        seconds: How long Redis is away.
    """

    at: int
    kind: str
    pick: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A run: `plan(seed, n)` is the same whenever it is made."""

    seed: int
    scripts: tuple[Script, ...]
    shocks: tuple[Shock, ...]


def plan(seed: int, n: int) -> Plan:
    """The run of `n` streams that `seed` stands for. Pure; stream k does not depend on `n`."""
    scripts = tuple(_script(seed, number) for number in range(n))
    chance = random.Random(f"{seed}/shocks")
    redis = ["redis kill", "redis term", "redis pause", "redis freeze"]
    chance.shuffle(redis)
    # Redis is left alone in the first half: what may be while it is away is too much to be strict.
    shocks = [
        *_shocks(chance, range(n), STREAMS_PER_KILL, ["kill", "term"]),
        *_shocks(chance, range(n // 2, n), STREAMS_PER_REDIS_SHOCK, redis),
    ]
    return Plan(seed, scripts, tuple(sorted(shocks, key=lambda shock: shock.at)))


def _shocks(chance: random.Random, streams: range, every: int, kinds: list[str]) -> list[Shock]:
    """One in each stretch of `every` streams, the kinds in turn."""
    return [
        Shock(
            at=chance.choice(streams[start : start + every]),
            kind=kinds[index % len(kinds)],
            pick=chance.randrange(1 << 16),
            seconds=round(chance.uniform(0.3, 1.5), 3),
        )
        for index, start in enumerate(range(0, len(streams), every))
    ]


def _script(seed: int, number: int) -> Script:
    chance = random.Random(f"{seed}/{number}")
    (kind,) = chance.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])
    more = _KINDS[kind][1](chance)
    hosts = chance.randrange(2), chance.randrange(2)
    return Script(seed=seed, number=number, kind=kind, hosts=hosts, **more)


# The kinds


def _answer(chance: random.Random, **more: Any) -> dict[str, Any]:
    """A whole answer of up to two seconds."""
    rate = chance.choice(RATES)
    return {"rate": rate, "tokens": chance.randrange(1, 2 * rate), **more}


def _endless(chance: random.Random, **more: Any) -> dict[str, Any]:
    return {"rate": chance.choice(RATES), "tokens": ENDLESS, **more}


def _whole(chance: random.Random) -> dict[str, Any]:
    extra = chance.choice(
        [
            {},
            {"headers_after": 0.5},
            {"silent_after": 1, "silent_for": 0.8},
            {"reasoning": 5},
            {"queue": 0.5, "queue_interval": 0.1},
            {"chunked": False},
            {"no_done": True},
            {"hold_open": 0.3},
        ]
    )
    return {"simulate": _answer(chance, **extra)}


def _moment(chance: random.Random) -> dict[str, Any]:
    """The phase in which a client acts: at once, before the headers, in a silence, amidst."""
    tokens, after = chance.randrange(1, 30), round(chance.uniform(0, 0.5), 3)
    return chance.choice(
        [
            {"simulate": _endless(chance), "after": chance.choice([0.0, 0.002, 0.01])},
            {"simulate": _endless(chance, headers_after=60), "after": after},
            {"simulate": _endless(chance, silent_after=2), "tokens": 2, "after": after},
            {"simulate": _endless(chance), "tokens": tokens},
            {"simulate": _endless(chance), "tokens": tokens},
        ]
    )


def _cancel(chance: random.Random) -> dict[str, Any]:
    named, presses = chance.random() < 0.6, chance.choice([1, 1, 2, 3])
    return {"act": "cancel", "named": named, "presses": presses, **_moment(chance)}


def _stall(chance: random.Random) -> dict[str, Any]:
    act = chance.choice(["read", "cancel", "fin", "rst"])
    tokens = STALL_TOKENS if act == "read" else ENDLESS
    # As fast as it is taken, unless somebody may have to go on taking it until a stop comes.
    rate = 400 if act == "cancel" else 0
    return {
        "act": act,
        "simulate": {"rate": rate, "pad": PAD, "tokens": tokens},
        "tokens": 1,
        "after": round(chance.uniform(0.2, 1.2), 3),
        "stalls": True,
    }


def _stuck(chance: random.Random) -> dict[str, Any]:
    after = 1.25 * SEND_TIMEOUT + round(chance.uniform(0.5, 1.5), 3)  # as late as it may be noticed
    simulate = {"rate": 0, "pad": PAD, "tokens": ENDLESS}
    return {"act": "stuck", "simulate": simulate, "tokens": 1, "after": after, "stalls": True}


def _cut(key: str, code: str) -> Callable[[random.Random], dict[str, Any]]:
    def make(chance: random.Random) -> dict[str, Any]:
        return {"simulate": _endless(chance, **{key: chance.randrange(1, 40)}), "ends": code}

    return make


def _refused(chance: random.Random) -> dict[str, Any]:
    plan, code = chance.choice(
        [
            ({"status": 429, "retry_after": 1}, "upstream_rate_limited"),
            ({"status": 500}, "upstream_error"),
            ({"status": 503}, "upstream_error"),
            ({"status": 401}, "upstream_auth"),
            ({"status": 404}, "upstream_rejected"),
            ({"content_type": "text/html"}, "upstream_not_stream"),
            ({"reset_after": 0}, "upstream_unreachable"),
        ]
    )
    return {"simulate": {"tokens": 5, **plan}, "ends": code}


def _silent(chance: random.Random) -> dict[str, Any]:
    return {"simulate": _endless(chance, silent_after=chance.randrange(5)), "ends": "upstream_idle"}


def _late(chance: random.Random) -> dict[str, Any]:
    return {"simulate": _endless(chance, headers_after=60), "ends": "upstream_timeout"}


def _supersede(chance: random.Random) -> dict[str, Any]:
    return {"act": "supersede", "simulate": _endless(chance), "tokens": chance.randrange(15)}


def _leave(chance: random.Random) -> dict[str, Any]:
    return {"act": chance.choice(["fin", "rst", "half"]), **_moment(chance)}


def _early(chance: random.Random) -> dict[str, Any]:
    return {"act": "early", "simulate": _endless(chance)}


def _request(body: str, method: str = "POST", path: str = "stream", **headers: str) -> str:
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = [f"{key}: {value}" for key, value in fields.items()]
    head = [f"{method} /api/chat/{path} HTTP/1.1", "Host: localhost", *lines, "", ""]
    return "\r\n".join(head) + body


_BAD_ID = {"messages": [{"role": "user", "content": "x"}], "sessionId": "a b"}
_MALFORMED: tuple[tuple[str, tuple[int, ...]], ...] = (
    (_request("{"), (400,)),
    (_request("[]"), (400,)),
    (_request("{}"), (400,)),
    (_request('{"messages": []}'), (400,)),
    (_request(json.dumps(_BAD_ID)), (400,)),
    (_request("messages=1", Content_Type="application/x-www-form-urlencoded"), (415,)),
    (_request("", method="GET"), (405,)),
    (_request("", method="DELETE", path="cancel/x"), (405,)),
    (_request("", path="cancel/%00"), (404,)),
    (_request("", path="cancel/x?streamId=a%20b"), (404,)),
    (_request("", path="nothing"), (404,)),
    (_request("", Content_Length="2000000"), (413,)),
    ("\x00\x01 what\r\n\r\n", (400, 0)),
    (_request("{}", Content_Length="200"), (0,)),  # it leaves before the rest
    ("POST /api/chat/stream HTT", (0,)),
)


def _malformed(chance: random.Random) -> dict[str, Any]:
    return {"act": "raw", "raw": chance.choice(_MALFORMED)}


_KINDS: dict[str, tuple[int, Callable[[random.Random], dict[str, Any]]]] = {
    "whole": (20, _whole),
    "cancel": (22, _cancel),
    "cancel before": (6, _early),
    "leave": (16, _leave),
    "stall": (4, _stall),
    "stuck": (2, _stuck),
    "truncated": (4, _cut("truncate_after", "upstream_truncated")),
    "reset": (4, _cut("reset_after", "upstream_truncated")),
    "provider's error": (3, _cut("error_after", "upstream_error")),
    "refused": (6, _refused),
    "silent": (2, _silent),
    "no headers": (2, _late),
    "superseded": (8, _supersede),
    "malformed": (5, _malformed),
}
"""Of a hundred streams, so many; and what makes one."""
