"""One chat request and what became of it: its figures, and who waits to hear of them."""

from __future__ import annotations

import dataclasses
import math
import time
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatstream.simulator.connection import Connection


class Mark(Enum):
    """What has come true once the kernel has taken a step's last byte."""

    HEADERS = 1
    WHOLE = 2  # the client has every event, even if the body is held open
    END = 3
    RESET = 4


@dataclasses.dataclass(slots=True)
class Exchange:
    """One chat request and what became of it. Touched by the loop's thread only."""

    id: str
    attempt: int  # 1, or more when requests before bore the same id
    connection: int
    peer: int  # the client's port
    path: str
    headers: dict[str, str]
    body: dict[str, object]
    stream: bool
    tokens: int
    interval_ns: float  # between two tokens
    ending: str  # closed_by, if all goes as planned
    started_ns: int
    clock_ns: int  # when the first token is made
    delivered: int = 0
    finished: bool = False
    headers_ns: int | None = None
    first_token_ns: int | None = None
    closed_ns: int | None = None
    closed_by: str | None = None
    waits: list[Wait] = dataclasses.field(default_factory=list)

    def due_ns(self, token: int) -> int:
        """Returns when `token` (from 0) is made: counted from the start, so nothing drifts."""
        return self.clock_ns + math.ceil(token * self.interval_ns)

    def generated(self, now_ns: int) -> int:
        """Returns how many tokens a model would have made by now, taken or not."""
        if self.finished:
            return self.tokens
        elapsed_ns = (now_ns if self.closed_ns is None else self.closed_ns) - self.clock_ns
        if elapsed_ns <= 0:
            return 0
        made = int(elapsed_ns / self.interval_ns) if self.interval_ns else self.delivered
        return min(self.tokens, made + 1)

    def note(self, tokens: int, mark: Mark | None) -> None:
        """Takes down that the kernel has a step's bytes."""
        if tokens:
            self.delivered += tokens
            if self.first_token_ns is None:
                self.first_token_ns = time.monotonic_ns()
        if mark is None:
            return
        if mark is Mark.HEADERS:
            self.headers_ns = time.monotonic_ns()
        elif mark is Mark.WHOLE:
            self.finished = True

    def reached(self, wait: str, count: int) -> bool:
        """Tells whether the request has come as far as `wait`, or never will."""
        return (
            self.closed_ns is not None
            or wait == "started"
            or (wait == "headers" and self.headers_ns is not None)
            or (wait == "delivered" and self.delivered >= count)
        )

    def figure(self, now_ns: int) -> dict[str, object]:
        """Returns what ``GET /requests/ID`` tells.

        closed_by is "client" (FIN), "reset" (the client's RST), "finished", or the key of
        ``simulate`` that ended it.
        """
        figure = {key: getattr(self, key) for key in _FIGURE_KEYS}
        return {**figure, "generated": self.generated(now_ns), "open": self.closed_ns is None}


_HIDDEN_KEYS = ("clock_ns", "interval_ns", "ending", "waits")
_FIGURE_KEYS = [key for key in Exchange.__dataclass_fields__ if key not in _HIDDEN_KEYS]


@dataclasses.dataclass(slots=True, eq=False)
class Wait:
    """A connection that waits to hear about a request."""

    connection: Connection
    id: str
    wait: str
    count: int
    exchange: Exchange | None = None  # as soon as there is one
