"""The figures: every request that came, and the totals."""

from __future__ import annotations

import time
from collections.abc import Callable

from chatstream.simulator.connection import Phase
from chatstream.simulator.exchange import Exchange, Wait
from chatstream.simulator.plan import SECOND
from chatstream.simulator.wire import BadRequest

_KEPT = 20_000  # requests remembered; beyond it the oldest goes if it is closed


class Ledger:
    """Every request that came and what became of it. Touched by the loop's thread only.

    Args:
        say: Takes one line of text when a request has ended; must not block.
    """

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self.requests = 0  # ever
        self._say = say
        self._exchanges: dict[int, Exchange] = {}  # by running number, oldest first
        self._newest: dict[str, Exchange] = {}  # by id
        self._open: dict[int, Exchange] = {}  # by id()
        self._early: dict[str, list[Wait]] = {}  # for requests that have not come yet
        self._closed_generated = 0
        self._closed_delivered = 0

    def add(self, exchange: Exchange) -> None:
        """Takes down a new request."""
        self.requests += 1
        self._exchanges[self.requests] = exchange
        self._newest[exchange.id] = exchange
        self._open[id(exchange)] = exchange
        for wait in self._early.pop(exchange.id, []):
            self._attach(wait, exchange)
        oldest = next(iter(self._exchanges))
        if len(self._exchanges) > _KEPT and self._exchanges[oldest].closed_ns is not None:
            self._drop(oldest)
        self.tell(exchange)

    def attempts(self, name: str) -> int:
        """Returns how many requests of that id are known."""
        return self._newest[name].attempt if name in self._newest else 0

    def close(self, exchange: Exchange, now_ns: int, by: str) -> None:
        """Takes down that a request has ended, which stops its clock."""
        exchange.closed_ns, exchange.closed_by = now_ns, by
        del self._open[id(exchange)]
        made = exchange.generated(now_ns)
        self._closed_generated += made
        self._closed_delivered += exchange.delivered
        self.tell(exchange)
        if self._say is not None:
            seconds = (now_ns - exchange.started_ns) / SECOND
            tokens = f"{made} of {exchange.tokens} tokens generated"
            self._say(f"{exchange.id}: {by} after {seconds:.2f} s, {tokens}")

    def forget(self) -> int:
        """Drops the closed requests; returns how many."""
        closed = [number for number, one in self._exchanges.items() if one.closed_ns is not None]
        for number in closed:
            self._drop(number)
        return len(closed)

    def _drop(self, number: int) -> None:
        exchange = self._exchanges.pop(number)
        if self._newest.get(exchange.id) is exchange:
            del self._newest[exchange.id]

    def wait(self, wait: Wait) -> None:
        """Answers `wait` now or when its time comes."""
        exchange = self._newest.get(wait.id)
        if exchange is None:
            self._early.setdefault(wait.id, []).append(wait)
        else:
            self._attach(wait, exchange)
            self.tell(exchange)

    def _attach(self, wait: Wait, exchange: Exchange) -> None:
        wait.exchange = exchange
        exchange.waits.append(wait)

    def tell(self, exchange: Exchange) -> None:
        """Answers those who waited for what has now come true."""
        for wait in [wait for wait in exchange.waits if exchange.reached(wait.wait, wait.count)]:
            self.answer(wait)

    def answer(self, wait: Wait) -> None:
        """Answers with the figure as it is. Idempotent."""
        waits = self._early.get(wait.id, []) if wait.exchange is None else wait.exchange.waits
        if wait not in waits:
            return
        waits.remove(wait)
        if wait.exchange is None and not waits:
            del self._early[wait.id]
        if wait.connection.phase is Phase.BUSY:  # else it has gone
            wait.connection.respond(*self._told(wait.id, wait.exchange, wait.after_ns))

    def one(self, name: str, after_ns: int | None = None) -> tuple[int, dict[str, object]]:
        """Returns status and body for one request."""
        return self._told(name, self._newest.get(name), after_ns)

    def _told(
        self, name: str, exchange: Exchange | None, after_ns: int | None
    ) -> tuple[int, dict[str, object]]:
        if exchange is not None:
            return 200, exchange.figure(time.monotonic_ns(), after_ns)
        return 404, BadRequest(f"No request {name!r} is known.", param="id").to_json()

    def all(self) -> list[dict[str, object]]:
        """Returns every figure, oldest first."""
        now_ns = time.monotonic_ns()
        return [exchange.figure(now_ns) for exchange in self._exchanges.values()]

    def stats(self) -> dict[str, int]:
        """Returns the totals since the start, those of forgotten requests included."""
        now_ns, running = time.monotonic_ns(), self._open.values()
        return {
            "requests": self.requests,
            "generating": len(running),
            "generated": self._closed_generated + sum(one.generated(now_ns) for one in running),
            "delivered": self._closed_delivered + sum(one.delivered for one in running),
        }
