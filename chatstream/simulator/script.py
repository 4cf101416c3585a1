"""When an answer sends what: its steps, and their instants."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

from chatstream.simulator.exchange import Exchange, Mark
from chatstream.simulator.openai_chat import ChatCompletion, overloaded
from chatstream.simulator.plan import Plan, ns, raw_bytes
from chatstream.simulator.wire import Request, dump, error_body, make_head

NEVER = (1 << 63) - 1  # an instant that does not come

_BATCH = 64  # tokens of one step, where all are made at once


class Step(NamedTuple):
    """Bytes to send, not before an instant."""

    at_ns: int
    data: bytes
    tokens: int = 0
    mark: Mark | None = None


class Script:
    """What one answer sends, and when. Pure: no socket, no thread; it only reads the clock."""

    def __init__(
        self, plan: Plan, request: Request, exchange: Exchange, include_usage: bool
    ) -> None:
        self._plan = plan
        self._exchange = exchange
        self._pieces = None if plan.raw is None else raw_bytes(plan.raw)
        self._headers_at = exchange.started_ns + ns(plan.headers_after)
        self._quiet_until = 0
        self._chat = ChatCompletion(plan, exchange, include_usage)
        # Bound once: it is called for every token.
        self._piece = self._chat.token if self._pieces is None else self._slice
        # Without a length, HTTP/1.0 knows only bodies that end with the connection (RFC 9112, 6.3).
        self._chunked = plan.chunked and request.http11
        self.keep_alive = request.keep_alive and self._chunked

    def steps(self) -> Iterator[Step]:
        """Yields the answer. A step's instant may depend on when the one before was taken."""
        if self._exchange.ending == "status":
            yield from self._refusal()
        elif self._exchange.ending == "reset_after" and self._exchange.tokens == 0:
            yield Step(self._headers_at, b"", mark=Mark.RESET)
        elif self._exchange.stream or self._pieces is not None:
            yield from self._streamed()
        else:
            yield from self._whole()

    def _refusal(self) -> Iterator[Step]:
        plan = self._plan
        kind = "server_error" if (plan.status or 0) >= 500 else "invalid_request_error"
        error = dump(error_body(plan.message, kind=kind, code=str(plan.status)))
        body = error if self._pieces is None else self._pieces
        head = self._head("application/json", status=plan.status or 0, length=len(body))
        yield Step(self._headers_at, head, mark=Mark.HEADERS)
        yield Step(self._headers_at, body, mark=Mark.END)

    def _streamed(self) -> Iterator[Step]:
        kind = "text/event-stream" if self._exchange.stream else "application/json"
        yield Step(self._headers_at, self._head(kind), mark=Mark.HEADERS)
        yield from self._queue(b": keep-alive\n\n" if self._exchange.stream else b"\n")
        alone = self._alone()
        for token in range(alone):
            yield Step(self._at(token), self._frame(self._piece(token)), 1)
        yield from self._batches(alone)
        yield from self._streamed_end(self._at(self._exchange.tokens))

    def _alone(self) -> int:
        """How many of the first tokens need a step of their own, or look like no other."""
        plan, tokens = self._plan, self._exchange.tokens
        batched = not plan.rate and plan.silent_after is None and not plan.pad and not plan.stamp
        return min(tokens, max(1, plan.reasoning)) if batched and self._pieces is None else tokens

    def _batches(self, first: int) -> Iterator[Step]:
        """The tokens from `first` on, many in a step: else we would be what a client waits for."""
        tokens = self._exchange.tokens
        made = range(first, min(first + self._chat.period, tokens))
        events = itertools.cycle([self._frame(self._piece(token)) for token in made])
        for token in range(first, tokens, _BATCH):
            count = min(_BATCH, tokens - token)
            yield Step(self._at(token), b"".join(itertools.islice(events, count)), count)

    def _streamed_end(self, at: int) -> Iterator[Step]:
        ending = self._exchange.ending
        if ending == "reset_after":
            yield Step(at, b"", mark=Mark.RESET)
            return
        if ending == "error_after":
            yield Step(at, self._frame(self._chat.error_event()))
        elif ending == "finished":
            events = self._chat.last_events() if self._pieces is None else ()
            yield Step(at, b"".join(map(self._frame, events)), mark=Mark.WHOLE)
            if self._plan.hold_open:
                at = time.monotonic_ns() + ns(self._plan.hold_open)
        yield Step(at, self._terminal(), mark=Mark.END)

    def _whole(self) -> Iterator[Step]:
        exchange, queued = self._exchange, bool(self._plan.queue)
        if queued:
            yield Step(self._headers_at, self._head("application/json"), mark=Mark.HEADERS)
            yield from self._queue(b"\n")
        at = max(self._headers_at, self._silence_of_whole(), exchange.due_ns(exchange.tokens))
        if exchange.ending == "reset_after":
            yield Step(at, b"", mark=Mark.RESET)
            return
        failed = exchange.ending == "error_after"
        body = dump(overloaded() if failed else self._chat.completed())
        if not queued:
            head = self._head("application/json", length=len(body))
            yield Step(at, head, mark=Mark.HEADERS)
        whole = Mark.WHOLE if exchange.ending == "finished" else None
        yield Step(at, self._frame(body) if queued else body, exchange.tokens, whole)
        yield Step(at, self._terminal() if queued else b"", mark=Mark.END)

    def _silence_of_whole(self) -> int:
        if self._plan.silent_after is not None and self._plan.silent_after <= self._exchange.tokens:
            self._at(self._plan.silent_after)
        return self._quiet_until

    def _queue(self, comment: bytes) -> Iterator[Step]:
        at = self._headers_at
        while at < self._exchange.clock_ns:
            yield Step(at, self._frame(comment))
            at += ns(self._plan.queue_interval)

    def _at(self, token: int) -> int:
        """Returns when `token` (or what comes instead) goes out, and begins the silence."""
        if token == self._plan.silent_after:
            begins = max(time.monotonic_ns(), self._exchange.due_ns(max(token - 1, 0)))
            length = self._plan.silent_for
            self._quiet_until = NEVER if length is None else begins + ns(length)
        due = self._exchange.due_ns(token)
        return due if due > self._quiet_until else self._quiet_until

    def _head(self, kind: str, *, status: int = 200, length: int | None = None) -> bytes:
        plan = self._plan
        fields = {
            "Content-Type": plan.content_type or kind,
            "Content-Encoding": plan.content_encoding,
            "Location": plan.location,
            "Set-Cookie": plan.set_cookie,
            "Retry-After": plan.retry_after,
            "Cache-Control": "no-cache",
        }
        if plan.chunked and length is not None:
            fields["Content-Length"] = length
        elif self._chunked:
            fields["Transfer-Encoding"] = "chunked"
        return make_head(status, fields, self.keep_alive)

    def _frame(self, data: bytes) -> bytes:
        # An empty chunk would end the body.
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data

    def _terminal(self) -> bytes:
        return b"0\r\n\r\n" if self._chunked else b""

    def _slice(self, token: int) -> bytes:
        assert self._pieces is not None
        size = self._plan.split or len(self._pieces)
        return self._pieces[token * size : (token + 1) * size]
