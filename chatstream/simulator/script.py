"""What an answer sends, and when: the words, the events, their instants."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from chatstream.simulator.exchange import Exchange, Mark
from chatstream.simulator.plan import Plan, ns, raw_bytes
from chatstream.simulator.wire import Request, dump, error_body, make_head

NEVER = (1 << 63) - 1  # an instant that does not come

_PROSE = """
A stop button is a promise. Whoever presses it has already decided, and everything that happens
afterwards happens against their will. So the first rule is that it works at once: not when the
next word arrives, not when some buffer has been emptied, and not when a timer happens to look. The
second rule is that it works everywhere. A lamp that goes dark on the desk while the engine runs on
in the cellar has not been switched off; it has only been hidden, and the meter keeps counting. The
third rule is that it always works. Pressing it early, before the first word, is no mistake.
Pressing it late, when the last word has just been said, is no mistake either. Pressing it twice
means nothing more than pressing it once, and pressing it by accident costs no more than asking
again.

Good brakes are boring. Nobody praises the lift for halting at the right floor, or the kettle for
falling silent when the water boils, and yet we would notice within a day if they did not. The
naïve design sets a flag and hopes that somebody reads it. The patient design asks who is asleep at
that moment, and what would wake them: a worker waiting for a line that never comes, a socket
nobody reads, a queue in which the order to halt stands politely behind the very work it was meant
to halt. It then wakes them, one after the other, and counts them on the way out.

There is also the matter of honesty. When something has been stopped, say so; when it had already
ended by itself, say that instead. Do not call a broken pipe a failure if you broke it on purpose,
and do not call half an answer an answer. Keep what was said up to that point, because it was paid
for, and hand it back without losing a word — or adding one. Then put everything back where it was:
the thread, the socket, the place in the pool. A button that leaves a little litter behind each
time it is pressed will one day be the reason that nothing moves at all.

Last of all, stay calm under a crowd. One person who stops is an event; a thousand who stop at the
same second are a Tuesday. Each of them deserves the same quick answer, and the thousand and first,
who merely wants to go on reading, should not notice that anything happened. That is all there is
to it, and it is harder than it looks.
"""

STAMP = b"@" + b"0" * 20
"""Takes the place of the instant in a token with `stamp`: nobody knows it before it is sent."""

_BATCH = 64  # tokens of one step, where all are made at once

_CLOSE_EVENT = b'"},"finish_reason":null}]}\n\n'


def _words(text: str) -> list[bytes]:
    """A text's words as JSON has them, each with the space after it. At least one."""
    words = re.findall(r"\s*\S+\s*", text) or [text]
    return [json.dumps(word, ensure_ascii=False)[1:-1].encode() for word in words]


_WORDS = _words(f"{' '.join(_PROSE.split())} ")


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
        self._include_usage = include_usage
        self._pieces = None if plan.raw is None else raw_bytes(plan.raw)
        self._headers_at = exchange.started_ns + ns(plan.headers_after)
        self._quiet_until = 0
        self._words = _WORDS if plan.text is None else _words(plan.text)
        # Without a length, HTTP/1.0 knows only bodies that end with the connection (RFC 9112, 6.3).
        self._chunked = plan.chunked and request.http11
        self.keep_alive = request.keep_alive and self._chunked
        self._completion = {
            "id": f"chatcmpl-{exchange.id}",
            "created": int(time.time()),
            "model": _model(exchange.body),
        }
        self._open_event = b'data: %b,"choices":[{"index":0,"delta":{' % dump(self._chunk())[:-1]

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
        made = range(first, min(first + len(self._words), tokens))
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
            yield Step(at, self._frame(b"data: %b\n\n" % dump(_overloaded())))
        elif ending == "finished":
            yield Step(at, self._last_events(), mark=Mark.WHOLE)
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
        body = dump(_overloaded() if exchange.ending == "error_after" else self._completed())
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

    def _word(self, token: int) -> bytes:
        word = STAMP if self._plan.stamp else self._words[token % len(self._words)]
        return word + b"x" * self._plan.pad if self._plan.pad else word

    def _piece(self, token: int) -> bytes:
        if self._pieces is not None:
            size = self._plan.split or len(self._pieces)
            return self._pieces[token * size : (token + 1) * size]
        role = b"" if token else b'"role":"assistant",'
        name = b'"reasoning_content":"' if token < self._plan.reasoning else b'"content":"'
        return b"".join((self._open_event, role, name, self._word(token), _CLOSE_EVENT))

    def _last_events(self) -> bytes:
        if self._pieces is not None:
            return b""
        events = [self._open_event + b'},"finish_reason":"stop"}]}\n\n']
        if self._include_usage:
            chunk = {**self._chunk(), "choices": [], "usage": self._usage()}
            events.append(b"data: %b\n\n" % dump(chunk))
        if not self._plan.no_done:
            events.append(b"data: [DONE]\n\n")
        return b"".join(map(self._frame, events))

    def _chunk(self) -> dict[str, object]:
        return {**self._completion, "object": "chat.completion.chunk"}

    def _completed(self) -> dict[str, object]:
        reasoning = min(self._plan.reasoning, self._exchange.tokens)
        message = {"role": "assistant", "content": self._text(reasoning, self._exchange.tokens)}
        if reasoning:
            message["reasoning_content"] = self._text(0, reasoning)
        reason = "stop" if self._exchange.ending == "finished" else None
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {
            **self._completion,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    def _text(self, first: int, end: int) -> str:
        text: str = json.loads(b'"%b"' % b"".join(map(self._word, range(first, end))))
        return text

    def _usage(self) -> dict[str, int]:
        prompt, made = len(str(self._exchange.body.get("messages")).split()), self._exchange.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }


def _overloaded() -> dict[str, object]:
    return error_body(
        "The simulator was told to fail here.", kind="server_error", code="overloaded"
    )


def _model(body: Mapping[str, object]) -> str:
    model = body.get("model")
    return model if isinstance(model, str) else "simulated"
