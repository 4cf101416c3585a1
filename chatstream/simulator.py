"""The built-in provider: an OpenAI-compatible chat API that is slow, silent or broken on request.

    python -m chatstream.simulator --port 9911

It serves the demo, the tests and the benchmark, so it measures as well as answers. One thread waits
on one epoll and one heap of timers; whatever epoll reports, hang-ups are stamped and acted upon
before anything else is done. What falls due is sent up to 1 ms late (epoll's unit), never early.

    POST .../chat/completions   the chat API; the body's "simulate" says how to behave: see `Plan`
    GET /requests               the figures of every request: `Exchange.figure`
    GET /requests/ID            of one: the newest that bears the name
        ?wait=W &timeout=S      answers when the request, which need not exist yet, is "started", at
        &count=N                its "headers", has N tokens "delivered", is "closed"; or after S s
    DELETE /requests            forgets the closed ones
    GET /stats                  totals; connections that only asked for figures are not counted
    GET /v1/models              one model

Every instant (``*_ns``) is `time.monotonic_ns`, so on one host it compares with the stamps of other
processes. A FIN counts as gone, as it does for most providers. (A client that closes a socket with
unread bytes sends a RST.) Linux only: epoll, eventfd. It needs no other part of the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import resource
import select
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from heapq import heappop, heappush
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Plan", "Simulator", "main"]

_NEVER = (1 << 63) - 1  # an instant that does not come
_SECOND = 1_000_000_000  # ns
_WRITE_LIMIT = 65_536  # bytes for one write, so (plus one event) the most that is ever buffered
_READ_SIZE = 65_536  # bytes
_HEAD_LIMIT = 65_536  # bytes of request line and headers
_BODY_LIMIT = 16 << 20  # bytes of a request's body
_WHOLE_LIMIT = 64 << 20  # bytes of an answer that is not streamed, as it is built in one piece
_LINGER_NS = 2 * _SECOND  # how long a connection that we ended waits for the client's own FIN
_ACCEPT_PAUSE_NS = _SECOND // 20  # when the process is out of descriptors
_BATCH = (
    32  # events or timers served between two looks at epoll: bounds how late a hang-up is stamped
)
_MAX_EVENTS = 4096
_BACKLOG = 4096
_LONGEST_POLL_S = 3600.0  # epoll_wait takes no more than an int of milliseconds
_KEPT = 20_000  # requests remembered; beyond it the oldest goes if it is closed
_WAIT_S = 30.0  # default timeout of ?wait=

_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WAITS = ("started", "headers", "delivered", "closed")
_CUTS = ("reset_after", "truncate_after", "error_after")

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
_CLOSE_EVENT = b'"},"finish_reason":null}]}\n\n'
_WORDS = [json.dumps(f"{word} ", ensure_ascii=False)[1:-1].encode() for word in _PROSE.split()]


class BadRequest(ValueError):
    """Something the caller must correct; answered as an error in OpenAI's shape."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status

    def to_json(self) -> dict[str, object]:
        """Returns the body of the error answer."""
        return _error(str(self), kind="invalid_request_error", param=self.param)


def _error(
    message: str, *, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _ns(seconds: float) -> int:
    return int(seconds * _SECOND)


# ---------------------------------------------------------------- what an answer shall be like


# What a key takes follows from its annotation in `Plan`. Numbers go from 0 to a million, except:
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str | float": ((str, int, float), "text or a number"),
}
_LIMITS = {"status": (200, 599), "queue_interval": (0.001, 1e6), "split": (1, _BODY_LIMIT)}
_HEADER_KEYS = ("retry_after", "content_type", "content_encoding", "location", "set_cookie")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How one answer behaves: the request's ``simulate`` over the server's defaults.

    Times are in seconds.
    """

    id: str | None = None  # the request's name in the figures (else req-N)
    tokens: int = 200  # of the whole answer
    rate: float = 20  # tokens per second; 0: as fast as the socket takes them
    headers_after: float = 0  # until the response headers; tokens are being made meanwhile
    silent_after: int | None = None  # tokens before a silence; others are being made meanwhile
    silent_for: float | None = None  # length of the silence; then the backlog goes out. None: ever
    reasoning: int = 0  # first tokens that come as delta.reasoning_content
    status: int | None = None  # refuse with this status (and `raw`, if set, as the body)
    retry_after: str | float | None = None  # a refusal's Retry-After header
    message: str = "The simulator was told to refuse."  # a refusal's
    reset_after: int | None = None  # tokens, then RST instead of the next; 0: RST before any byte
    truncate_after: int | None = None  # tokens, then a clean end without finish_reason and [DONE]
    no_done: bool = False  # end with finish_reason but without [DONE]
    error_after: int | None = None  # tokens, then an error event and a clean end
    queue: float = 0  # of ": keep-alive" (not streamed: empty lines) before any token is made
    queue_interval: float = 1.0  # between two comments
    chunked: bool = True  # False: a body that ends with the connection
    hold_open: float = 0  # between a stream's last event and the end of its body
    content_type: str | None = None  # these four: response headers
    content_encoding: str | None = None  # (the body stays as it is)
    location: str | None = None
    set_cookie: str | None = None
    raw: str | None = None  # the body, instead of events; U+DC80..U+DCFF stand for the bytes 80..FF
    split: int | None = None  # bytes of `raw` per write; each such piece takes the place of a token
    pad: int = 0  # extra bytes of content per token

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Plan:
        """Checks keys, types and ranges.

        Raises:
            BadRequest: It names the key and says what it takes.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in fields:
                raise _bad_key(key, f"is not known; known are: {', '.join(fields)}")
            kind = str(fields[key].type)
            if value is not None or not kind.endswith(" | None"):
                _check(key, kind.removesuffix(" | None"), value)
        return cls(**values)

    def interval_ns(self) -> float:
        """Returns the time between two tokens, within what an instant can hold."""
        return min(_SECOND / self.rate, 1e15) if self.rate else 0

    def pieces(self) -> int:
        """Returns of how many tokens, or pieces of `raw`, the whole answer consists."""
        if self.raw is None:
            return self.tokens
        size = len(_raw_bytes(self.raw))
        return math.ceil(size / (self.split or size)) if size else 0

    def ending(self) -> tuple[int, str]:
        """Returns after how many tokens it ends, and how: "finished" or the key that ends it."""
        if self.status is not None:
            return 0, "status"
        whole = (self.pieces(), "finished")
        cuts = [(after, key) for key in _CUTS if (after := getattr(self, key)) is not None]
        return min(*cuts, whole, key=lambda cut: cut[0]) if cuts else whole


def _bad_key(key: str, fault: str) -> BadRequest:
    return BadRequest(f"simulate.{key} {fault}", param=f"simulate.{key}")


def _check(key: str, kind: str, value: object) -> None:
    kinds, words = _KINDS[kind]
    # bool is a kind of int in Python, but not in JSON.
    if not isinstance(value, kinds) or isinstance(value, bool) is not (kind == "bool"):
        raise _bad_key(key, f"must be {words}")
    if isinstance(value, str):
        _check_text(key, value)
        return
    low, high = _LIMITS.get(key, (0, 1_000_000))
    if isinstance(value, int | float) and not low <= value <= high:
        raise _bad_key(key, f"must be from {low:g} to {high:g}")


def _check_text(key: str, value: str) -> None:
    if key in _HEADER_KEYS and not (value.isascii() and value.isprintable()):
        raise _bad_key(key, "must be printable ASCII")  # else it could start another header
    try:
        _raw_bytes(value)
    except UnicodeEncodeError:
        raise _bad_key(key, "has a lone surrogate") from None


def _raw_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------- one request: figures and script


class Mark(Enum):
    """What has come true once the kernel has taken a step's last byte."""

    HEADERS = 1
    WHOLE = 2  # the client has every event, even if the body is held open
    END = 3
    RESET = 4


class Step(NamedTuple):
    """Bytes to send, not before an instant."""

    at_ns: int
    data: bytes
    tokens: int = 0
    mark: Mark | None = None


class Request(NamedTuple):
    """One parsed HTTP request."""

    method: str
    target: str
    headers: dict[str, str]  # lower-case names
    http11: bool
    length: int
    body: bytes = b""

    @property
    def keep_alive(self) -> bool:
        """Whether the client will have the connection again."""
        wanted = "close" not in self.headers.get("connection", "").lower()
        return self.http11 and wanted and self.method != "HEAD"  # we would send HEAD a body


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


class Script:
    """What one answer sends, and when. Pure: no socket, no thread; it only reads the clock."""

    def __init__(
        self, plan: Plan, request: Request, exchange: Exchange, include_usage: bool
    ) -> None:
        self._plan = plan
        self._exchange = exchange
        self._include_usage = include_usage
        self._pieces = None if plan.raw is None else _raw_bytes(plan.raw)
        self._headers_at = exchange.started_ns + _ns(plan.headers_after)
        self._quiet_until = 0
        # Without a length, HTTP/1.0 knows only bodies that end with the connection (RFC 9112, 6.3).
        self._chunked = plan.chunked and request.http11
        self.keep_alive = request.keep_alive and self._chunked
        self._completion = {
            "id": f"chatcmpl-{exchange.id}",
            "created": int(time.time()),
            "model": _model(exchange.body),
        }
        self._open_event = b'data: %b,"choices":[{"index":0,"delta":{' % _dump(self._chunk())[:-1]

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
        error = _dump(_error(plan.message, kind=kind, code=str(plan.status)))
        body = error if self._pieces is None else self._pieces
        head = self._head("application/json", status=plan.status or 0, length=len(body))
        yield Step(self._headers_at, head, mark=Mark.HEADERS)
        yield Step(self._headers_at, body, mark=Mark.END)

    def _streamed(self) -> Iterator[Step]:
        kind = "text/event-stream" if self._exchange.stream else "application/json"
        yield Step(self._headers_at, self._head(kind), mark=Mark.HEADERS)
        yield from self._queue(b": keep-alive\n\n" if self._exchange.stream else b"\n")
        for token in range(self._exchange.tokens):
            yield Step(self._at(token), self._frame(self._piece(token)), 1)
        yield from self._streamed_end(self._at(self._exchange.tokens))

    def _streamed_end(self, at: int) -> Iterator[Step]:
        ending = self._exchange.ending
        if ending == "reset_after":
            yield Step(at, b"", mark=Mark.RESET)
            return
        if ending == "error_after":
            yield Step(at, self._frame(b"data: %b\n\n" % _dump(_overloaded())))
        elif ending == "finished":
            yield Step(at, self._last_events(), mark=Mark.WHOLE)
            if self._plan.hold_open:
                at = time.monotonic_ns() + _ns(self._plan.hold_open)
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
        body = _dump(_overloaded() if exchange.ending == "error_after" else self._completed())
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
            at += _ns(self._plan.queue_interval)

    def _at(self, token: int) -> int:
        """Returns when `token` (or what comes instead) goes out, and begins the silence."""
        if token == self._plan.silent_after:
            begins = max(time.monotonic_ns(), self._exchange.due_ns(max(token - 1, 0)))
            length = self._plan.silent_for
            self._quiet_until = _NEVER if length is None else begins + _ns(length)
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
        return _head(status, fields, self.keep_alive)

    def _frame(self, data: bytes) -> bytes:
        # An empty chunk would end the body.
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data

    def _terminal(self) -> bytes:
        return b"0\r\n\r\n" if self._chunked else b""

    def _word(self, token: int) -> bytes:
        word = _WORDS[token % len(_WORDS)]
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
            events.append(b"data: %b\n\n" % _dump(chunk))
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
    return _error("The simulator was told to fail here.", kind="server_error", code="overloaded")


def _model(body: Mapping[str, object]) -> str:
    model = body.get("model")
    return model if isinstance(model, str) else "simulated"


# ---------------------------------------------------------------- HTTP


def _head(status: int, fields: Mapping[str, object], keep_alive: bool) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Simulated"
    everything = {**fields, "Connection": "keep-alive" if keep_alive else "close"}
    lines = [f"{name}: {value}\r\n" for name, value in everything.items() if value is not None]
    return f"HTTP/1.1 {status} {phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


def take_head(buffer: bytearray) -> Request | None:
    """Takes a request's head off the front of `buffer`; returns None while it is not whole.

    Raises:
        BadRequest: What came is not HTTP/1, or too much for this server.
    """
    while buffer[:2] == b"\r\n":  # RFC 9112, 2.2: tolerated before a request line
        del buffer[:2]
    if buffer and not buffer[:1].isalpha() and buffer != b"\r":
        raise BadRequest("This is not HTTP.")
    end = buffer.find(b"\r\n\r\n")
    if (end if end >= 0 else len(buffer)) > _HEAD_LIMIT:
        raise BadRequest("The request's headers are too large.", status=431)
    if end < 0:
        return None
    lines = buffer[:end].decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    return _parse_head(lines)


def _parse_head(lines: list[str]) -> Request:
    parts = lines[0].split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequest("The request line is malformed.")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadRequest("A header line is malformed.")
        key = name.lower()
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    return Request(parts[0], parts[1], headers, parts[2] == "HTTP/1.1", _body_length(headers))


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise BadRequest("Send the body with a Content-Length.", status=411)
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise BadRequest("Content-Length must be a whole number.")
    if len(length) > 12 or int(length) > _BODY_LIMIT:
        raise BadRequest(f"The body may have up to {_BODY_LIMIT} bytes.", status=413)
    return int(length)


class Phase(Enum):
    """What a connection is doing."""

    HANDSHAKE = 1
    IDLE = 2  # reading a request
    BUSY = 3  # answering it; nothing is read meanwhile
    LINGER = 4  # our side is closed, the client's not yet
    CLOSED = 5


class Connection:
    """One client's socket: reads requests, plays the steps of the answers.

    Touched by the loop's thread only.
    """

    def __init__(self, simulator: Simulator, sock: socket.socket, number: int, peer: int) -> None:
        self.number = number
        self.peer = peer
        self.figures_only = False
        self.exchange: Exchange | None = None
        self.phase = Phase.IDLE
        self.gone_ns: int | None = None
        self.keep_alive = True
        self._simulator = simulator
        self._sock = sock
        self._fd = sock.fileno()
        self._watched = 0
        self._head: Request | None = None
        self._in = bytearray()
        self._out = bytearray()
        self._queued = 0  # bytes ever put into _out
        self._sent = 0  # bytes ever taken by the kernel
        # What becomes true when _sent reaches the first number: so many tokens delivered, a mark.
        self._marks: deque[tuple[int, int, Mark | None]] = deque()
        self._steps: Iterator[Step] = iter(())
        self._step: Step | None = None
        self._single = False
        self._armed_ns = _NEVER
        self._wake = self.wake  # bound once: it is pushed for every token

    def open(self, context: ssl.SSLContext | None, handshake_delay_ns: int) -> None:
        """Starts to serve; given `context`, with a TLS handshake, begun after the delay."""
        self._simulator.poller.register(self._fd, select.EPOLLRDHUP)
        if context is None:
            self._watch(select.EPOLLIN)
            return
        self.phase = Phase.HANDSHAKE
        if handshake_delay_ns:
            begin = functools.partial(self._begin_handshake, context)
            self._simulator.call_at(time.monotonic_ns() + handshake_delay_ns, self, begin)
        else:
            self._begin_handshake(context)

    def ready(self) -> None:
        """The socket can be read or written, as we asked."""
        if self.phase is Phase.BUSY:
            self._pump()
            self._take_requests()
        elif self.phase is Phase.IDLE:
            self._read()
        elif self.phase is Phase.HANDSHAKE:
            self._handshake()

    def wake(self) -> None:
        """The next step is due, unless this timer is stale: none is cancelled, only forgotten."""
        if time.monotonic_ns() < self._armed_ns:
            return
        self._armed_ns = _NEVER
        self._pump()
        self._take_requests()

    def hang_up(self, now_ns: int, by: str | None = None) -> None:
        """The client has gone: ends the running answer as of `now_ns` and closes."""
        if self.phase is Phase.CLOSED:
            return
        by = by or self._who_hung_up()
        self.gone_ns = now_ns
        if self.phase in (Phase.IDLE, Phase.HANDSHAKE):
            self._read_last_words()
        self._end_exchange(now_ns, by)
        self.close(now_ns)

    def close(self, now_ns: int) -> None:
        """Gives the socket back. Idempotent."""
        if self.phase is Phase.CLOSED:
            return
        self._simulator.forget(self, self._fd, now_ns)
        self.phase = Phase.CLOSED
        self._steps, self._step = iter(()), None
        self._sock.close()

    def play(
        self, steps: Iterator[Step], exchange: Exchange | None = None, *, single: bool = False
    ) -> None:
        """Starts an answer; its steps are sent as they fall due, never two at once if `single`."""
        self.exchange, self._single = exchange, single
        self._steps, self._step = steps, next(steps, None)
        if self.gone_ns is None:
            self._pump()

    def respond(self, status: int, body: object) -> None:
        """Answers with JSON, at once."""
        data = _dump(body)
        fields = {"Content-Type": "application/json", "Content-Length": len(data)}
        head = _head(status, fields, self.keep_alive)
        self.play(iter([Step(0, head + data, mark=Mark.END)]))

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._watched = events
            self._simulator.poller.modify(self._fd, events | select.EPOLLRDHUP)

    def _who_hung_up(self) -> str:
        # A RST out of the blue leaves ECONNRESET; one that answers bytes sent after a FIN, EPIPE.
        with suppress(OSError):
            if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET:
                return "reset"
        return "client"

    # ---- TLS

    def _begin_handshake(self, context: ssl.SSLContext) -> None:
        if self.phase is not Phase.HANDSHAKE:
            return
        wrap = functools.partial(context.wrap_socket, do_handshake_on_connect=False)
        try:
            self._sock.getpeername()  # wrap_socket would lose the descriptor if this fails
            self._sock = wrap(self._sock, server_side=True)
        except (OSError, ValueError):  # gone in the meantime
            self.close(time.monotonic_ns())
            return
        self._handshake()

    def _handshake(self) -> None:
        if not isinstance(self._sock, ssl.SSLSocket):
            return
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._watch(select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self._watch(select.EPOLLOUT)
        except (OSError, ValueError):
            self.close(self.gone_ns or time.monotonic_ns())
        else:
            self.phase = Phase.IDLE
            self._watch(select.EPOLLIN)

    # ---- reading

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_SIZE)
            # What OpenSSL has already taken out of the kernel's buffer, epoll cannot see.
            while isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
                data += self._sock.recv(_READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self.hang_up(time.monotonic_ns(), "reset")
            return
        if not data:  # TLS: the client took its leave but kept TCP open
            self.hang_up(time.monotonic_ns(), "client")
            return
        self._in += data
        self._take_requests()

    def _read_last_words(self) -> None:
        """Takes down a request that came in one turn with the FIN, though nobody waits for it."""
        if self.phase is Phase.HANDSHAKE:
            self._handshake()
        if self.phase is not Phase.IDLE:
            return
        with suppress(OSError):
            while data := self._sock.recv(_READ_SIZE):
                self._in += data
        self._take_requests()

    def _take_requests(self) -> None:
        while self._in and self.phase is Phase.IDLE:
            try:
                request = self._take_request()
            except BadRequest as bad:
                self._in.clear()
                self._start_answer(keep_alive=False)
                self.respond(bad.status, bad.to_json())
                return
            if request is None:
                return
            self._start_answer(request.keep_alive)
            self._simulator.serve(self, request)

    def _take_request(self) -> Request | None:
        if self._head is None:
            self._head = take_head(self._in)
            if self._head is not None and "expect" in self._head.headers:
                with suppress(OSError):
                    self._sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = self._head
        if head is None or len(self._in) < head.length:
            return None
        self._head, body = None, bytes(self._in[: head.length])
        del self._in[: head.length]
        return head._replace(body=body)

    def _start_answer(self, keep_alive: bool) -> None:
        self.phase = Phase.BUSY
        self.keep_alive = keep_alive
        if self.gone_ns is None:
            self._watch(0)

    # ---- writing

    def _pump(self) -> None:
        """Sends what is due, and arranges to be called again for the rest."""
        now_ns = time.monotonic_ns()
        self._gather(now_ns)
        if not self._flush():
            return
        self._settle()
        if self._out:
            self._watch(select.EPOLLOUT)
        elif self._step is not None:  # else the answer has ended, or somebody waits
            self._watch(0)
            self._arm(self._step.at_ns)

    def _arm(self, at_ns: int) -> None:
        if at_ns != self._armed_ns and at_ns != _NEVER:
            self._armed_ns = at_ns
            self._simulator.call_at(at_ns, self, self._wake)

    def _gather(self, now_ns: int) -> None:
        step = self._step
        while step is not None and step.at_ns <= now_ns and len(self._out) < _WRITE_LIMIT:
            self._out += step.data
            self._queued += len(step.data)
            self._marks.append((self._queued, step.tokens, step.mark))
            # Looking up an enum's member costs more than the rest: not for every token.
            alone = self._single or (step.mark is not None and step.mark is Mark.HEADERS)
            step = next(self._steps, None)
            if alone:  # in a write of its own
                break
        self._step = step

    def _flush(self) -> bool:
        """Hands bytes to the kernel. Returns False if that showed the client to be gone."""
        if not self._out:
            return True
        try:
            sent = self._sock.send(self._out)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return True
        except OSError as error:
            self.hang_up(time.monotonic_ns(), "client" if error.errno == errno.EPIPE else "reset")
            return False
        self._sent += sent
        del self._out[:sent]
        return True

    def _settle(self) -> None:
        exchange = self.exchange
        while self._marks and self._marks[0][0] <= self._sent:
            _, tokens, mark = self._marks.popleft()
            if exchange is not None:
                exchange.note(tokens, mark)
            if mark is not None:
                self._act(mark)
        if exchange is not None and exchange.waits:
            self._simulator.ledger.tell(exchange)

    def _act(self, mark: Mark) -> None:
        if mark is Mark.END:
            self._end_answer()
        elif mark is Mark.RESET:
            self._reset()

    def _end_answer(self) -> None:
        self._step = None
        if self.exchange is not None:
            self._end_exchange(time.monotonic_ns(), self.exchange.ending)
        if self.keep_alive:
            self.phase = Phase.IDLE
            self._watch(select.EPOLLIN)
        else:
            self._linger()

    def _end_exchange(self, now_ns: int, by: str) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            self._simulator.ledger.close(exchange, now_ns, by)

    def _reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        now_ns = time.monotonic_ns()
        self._end_exchange(now_ns, "reset_after")
        self.close(now_ns)

    def _linger(self) -> None:
        """Ends our side and waits for the client's: a close with unread bytes would send a RST."""
        self.phase = Phase.LINGER
        self._watch(0)
        with suppress(OSError, ValueError):
            if isinstance(self._sock, ssl.SSLSocket):
                self._sock.unwrap()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic_ns() + _LINGER_NS
        self._simulator.call_at(deadline, self, lambda: self.close(time.monotonic_ns()))


# ---------------------------------------------------------------- the figures


@dataclasses.dataclass(slots=True, eq=False)
class Wait:
    """A connection that waits to hear about a request."""

    connection: Connection
    id: str
    wait: str
    count: int
    exchange: Exchange | None = None  # as soon as there is one


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
            seconds = (now_ns - exchange.started_ns) / _SECOND
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
            wait.connection.respond(*self._told(wait.id, wait.exchange))

    def one(self, name: str) -> tuple[int, dict[str, object]]:
        """Returns status and body for one request."""
        return self._told(name, self._newest.get(name))

    def _told(self, name: str, exchange: Exchange | None) -> tuple[int, dict[str, object]]:
        if exchange is not None:
            return 200, exchange.figure(time.monotonic_ns())
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


# ---------------------------------------------------------------- the server


class Simulator:
    """The provider. Listens from construction on; serves in a thread of its own (`start`) or yours.

    `start`, `close` and the properties are safe from any thread; the rest is the loop's thread's.

    Args:
        host: Address to listen on.
        port: 0 takes a free one, see `port`.
        certfile: PEM file; given, the server speaks TLS.
        keyfile: PEM file, unless the key is in `certfile`.
        handshake_delay: Seconds for which a TLS connection is accepted but not answered.
        defaults: Values for keys of ``simulate`` that a request leaves out, see `Plan`.
        say: Takes a line of text for every request that has ended; must not block.

    Raises:
        ValueError: A default is unknown or out of range, or the certificate cannot be read.
        OSError: It cannot listen there, for instance because the port is in use.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        certfile: str | None = None,
        keyfile: str | None = None,
        handshake_delay: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._defaults = dict(defaults or {})
        Plan.parse(self._defaults)
        self._context = _tls_context(certfile, keyfile)
        self._handshake_delay_ns = _ns(handshake_delay)
        self._host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.setblocking(False)
        # On Linux the sockets it accepts inherit this: an event must not wait for another's ACK.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._port: int = self._listener.getsockname()[1]
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.poller = select.epoll()
        self.poller.register(self._listener, select.EPOLLIN)
        self.poller.register(self._wake_fd, select.EPOLLIN)
        self.ledger = Ledger(say)
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._ready: dict[int, None] = {}  # descriptors to serve, in the order epoll named them
        self._timers: list[tuple[int, int, Connection | None, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._accepted = 0
        self._figure_connections = 0
        self._handshakes_aborted = 0
        self._last_closed_ns: int | None = None
        self._internal_errors = 0
        self._closing = False
        self._running = False
        self._loop_ident: int | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        # Guards _running and _wake_fd. Reentrant: a signal handler's close() may find it held.
        self._lock = threading.RLock()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def origin(self) -> str:
        """Scheme, host and port, to which the paths of the figures are appended."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._context else 'http'}://{host}:{self._port}"

    @property
    def url(self) -> str:
        """The chat API's address."""
        return f"{self.origin}/v1/chat/completions"

    def __enter__(self) -> Simulator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Simulator:
        """Serves in a thread of its own; returns itself. To be called once."""
        with self._lock:
            self._running = True
        self._thread = threading.Thread(
            target=self.serve_forever, name="chatstream-simulator", daemon=True
        )
        self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serves in the calling thread until `close` is called."""
        with self._lock:
            self._loop_ident = threading.get_ident()
            self._running = True
        try:
            while not self._closing:
                self._turn()
        finally:
            self._dispose()

    def close(self) -> None:
        """Ends the loop, closes every socket, waits for both. Safe from any thread. Idempotent.

        From a signal handler in the loop's own thread it only asks the loop to end.
        """
        with self._lock:
            self._closing = True
            with suppress(OSError, ValueError):  # closed already
                os.eventfd_write(self._wake_fd, 1)
            if not self._running:
                self._dispose()
        if threading.get_ident() == self._loop_ident:
            return
        self._ended.wait()
        if self._thread is not None:
            self._thread.join()

    def _dispose(self) -> None:
        now_ns = time.monotonic_ns()
        for connection in list(self._connections.values()):
            connection.close(now_ns)
        with self._lock:
            if self._ended.is_set():
                return
            self._listener.close()
            self.poller.close()
            os.close(self._wake_fd)
            self._wake_fd = -1
            self._timers.clear()
            self._ended.set()

    # ---- the loop

    def _turn(self) -> None:
        events = self.poller.poll(self._timeout_s(), _MAX_EVENTS)
        now_ns = time.monotonic_ns()  # before anything else: one stamp for all that have gone
        for fd, mask in events:
            if mask & _GONE and (connection := self._connections.get(fd)) is not None:
                self._guard(connection, functools.partial(connection.hang_up, now_ns))
            else:
                self._ready[fd] = None
        self._serve_ready()
        self._run_timers()

    def _timeout_s(self) -> float | None:
        if self._ready:
            return 0
        if not self._timers:
            return None
        return min(max(0, self._timers[0][0] - time.monotonic_ns()) / _SECOND, _LONGEST_POLL_S)

    def _serve_ready(self) -> None:
        # What is left over stays in line ahead of what the next poll adds, so that nobody starves.
        for fd in list(itertools.islice(self._ready, _BATCH)):
            if fd not in self._ready:  # closed by one of those before
                continue
            del self._ready[fd]
            if (connection := self._connections.get(fd)) is not None:
                self._guard(connection, connection.ready)
            elif fd == self._listener.fileno():
                self._guard(None, self._accept)

    def _run_timers(self) -> None:
        for _ in range(_BATCH):
            if not self._timers or self._timers[0][0] > time.monotonic_ns():
                return
            _, _, connection, call = heappop(self._timers)
            self._guard(connection, call)

    def _guard(self, connection: Connection | None, call: Callable[[], None]) -> None:
        """Calls; a defect costs one connection, not the server, and shows in /stats."""
        try:
            call()
        except Exception:
            self._internal_errors += 1
            if connection is not None:
                with suppress(Exception):
                    connection.hang_up(time.monotonic_ns(), "internal_error")

    def call_at(
        self, when_ns: int, connection: Connection | None, call: Callable[[], None]
    ) -> None:
        """Has `call` called at an instant. It is never cancelled: `call` must bear being late."""
        heappush(self._timers, (when_ns, next(self._timer_numbers), connection, call))

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting()
                    return
                continue  # that client has gone already (accept(2): treat like EAGAIN)
            self._admit(sock, address[1])

    def _pause_accepting(self) -> None:
        # The listener stays readable while descriptors are short: the loop would spin.
        self.poller.modify(self._listener, 0)
        resume_ns = time.monotonic_ns() + _ACCEPT_PAUSE_NS
        self.call_at(resume_ns, None, lambda: self.poller.modify(self._listener, select.EPOLLIN))

    def _admit(self, sock: socket.socket, peer: int) -> None:
        sock.setblocking(False)
        self._accepted += 1
        connection = Connection(self, sock, self._accepted, peer)
        self._connections[sock.fileno()] = connection
        self._guard(connection, lambda: connection.open(self._context, self._handshake_delay_ns))

    def forget(self, connection: Connection, fd: int, now_ns: int) -> None:
        """Takes a connection out of the books. It is about to close and still in its last phase."""
        del self._connections[fd]
        self._ready.pop(fd, None)
        with suppress(OSError):
            self.poller.unregister(fd)
        if connection.phase is Phase.HANDSHAKE:
            self._handshakes_aborted += 1
        if not connection.figures_only:
            self._last_closed_ns = now_ns

    # ---- the routes

    def serve(self, connection: Connection, request: Request) -> None:
        """Answers one request, now or later."""
        try:
            target = urlsplit(request.target)
            if request.method == "POST" and target.path.endswith("/chat/completions"):
                self._chat(connection, request, target.path)
            else:
                self._figures(connection, request.method, target.path, target.query)
        except BadRequest as bad:
            connection.respond(bad.status, bad.to_json())
        except ValueError:  # urlsplit
            connection.respond(400, BadRequest("The request's target is malformed.").to_json())

    def _chat(self, connection: Connection, request: Request, path: str) -> None:
        body, values = _parse_chat(request.body)
        plan = Plan.parse({**self._defaults, **values})
        exchange = self._exchange(connection, request, path, body, plan)
        if not exchange.stream and exchange.tokens * (plan.pad + 8) > _WHOLE_LIMIT:
            raise _bad_key("tokens", "is too much for an answer in one piece")
        options = body.get("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        script = Script(plan, request, exchange, usage)
        self.ledger.add(exchange)
        connection.keep_alive = script.keep_alive
        connection.play(script.steps(), exchange, single=plan.raw is not None)

    def _exchange(
        self,
        connection: Connection,
        request: Request,
        path: str,
        body: dict[str, object],
        plan: Plan,
    ) -> Exchange:
        name = plan.id if plan.id is not None else f"req-{self.ledger.requests + 1}"
        tokens, ending = plan.ending()
        headers = {**request.headers}
        if "authorization" in headers:
            headers["authorization"] = "present"
        now_ns = connection.gone_ns or time.monotonic_ns()
        return Exchange(
            id=name,
            attempt=self.ledger.attempts(name) + 1,
            connection=connection.number,
            peer=connection.peer,
            path=path,
            headers=headers,
            body=body,
            stream=body.get("stream") is True,
            tokens=tokens,
            interval_ns=plan.interval_ns(),
            ending=ending,
            started_ns=now_ns,
            clock_ns=now_ns + _ns(plan.queue),
        )

    def _figures(self, connection: Connection, method: str, path: str, query: str) -> None:
        if path == "/requests" or path == "/stats" or path.startswith("/requests/"):
            self._set_aside(connection)
        if (method, path) == ("GET", "/requests"):
            connection.respond(200, self.ledger.all())
        elif (method, path) == ("DELETE", "/requests"):
            connection.respond(200, {"forgotten": self.ledger.forget()})
        elif (method, path) == ("GET", "/stats"):
            connection.respond(200, self._stats())
        elif (method, path) == ("GET", "/v1/models"):
            model = {"id": "simulated", "object": "model", "created": 0, "owned_by": "chatstream"}
            connection.respond(200, {"object": "list", "data": [model]})
        elif method == "GET" and path.startswith("/requests/"):
            self._figure(connection, unquote(path.removeprefix("/requests/")), query)
        else:
            connection.respond(404, BadRequest(f"There is no {method} {path} here.").to_json())

    def _set_aside(self, connection: Connection) -> None:
        if not connection.figures_only:
            connection.figures_only = True
            self._figure_connections += 1

    def _figure(self, connection: Connection, name: str, query: str) -> None:
        fields = {key: values[-1] for key, values in parse_qs(query).items()}
        if "wait" not in fields:
            connection.respond(*self.ledger.one(name))
            return
        if fields["wait"] not in _WAITS:
            raise BadRequest(f"wait must be one of {', '.join(_WAITS)}", param="wait")
        count, timeout = _number(fields, "count", 1), _number(fields, "timeout", _WAIT_S)
        wait = Wait(connection, name, fields["wait"], math.ceil(count))
        deadline_ns = time.monotonic_ns() + _ns(timeout)
        self.call_at(deadline_ns, connection, lambda: self.ledger.answer(wait))
        self.ledger.wait(wait)

    def _stats(self) -> dict[str, object]:
        is_chat = [not connection.figures_only for connection in self._connections.values()]
        return {
            **self.ledger.stats(),
            "connections_open": sum(is_chat),
            "connections_total": self._accepted - self._figure_connections,
            "handshakes_aborted": self._handshakes_aborted,
            "last_connection_closed_ns": self._last_closed_ns,
            "internal_errors": self._internal_errors,
            "cpu_seconds": time.process_time(),
        }


def _tls_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    if certfile is None:
        if keyfile is not None:
            raise ValueError("keyfile needs a certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"certfile or keyfile cannot be read: {why}") from error
    return context


def _parse_chat(data: bytes) -> tuple[dict[str, object], dict[str, object]]:
    """Returns the body without ``simulate``, and ``simulate``."""
    try:
        body = json.loads(data)
        # What cannot be written again (NaN, too deep a nest) would spoil the answer to /requests.
        json.dumps([[[[body]]]], allow_nan=False)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    if not isinstance(body.get("stream", False), bool | None):
        raise BadRequest("stream must be true or false.", param="stream")
    values = body.pop("simulate", {})
    if not isinstance(values, dict):
        raise BadRequest("simulate must be an object.", param="simulate")
    return body, values


def _number(fields: Mapping[str, str], key: str, default: float) -> float:
    try:
        value = float(fields.get(key, default))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise BadRequest(f"{key} must be a number from 0 to 1e6.", param=key)
    return value


# ---------------------------------------------------------------- the command


def _setting(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chatstream.simulator", description="A provider to try and test with."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=9911, help="0 takes a free one (default: %(default)s)")
    add("--rate", type=float, help="tokens per second (default: 20)")
    add("--tokens", type=int, help="tokens of an answer (default: 200)")
    add("--set", type=_setting, action="append", default=[], metavar="KEY=JSON",
        help="a default of simulate, such as silent_after=10")  # fmt: skip
    add("--certfile", help="PEM file; turns TLS on")
    add("--keyfile", help="PEM file, unless the key is in --certfile")
    add("--handshake-delay", type=float, default=0, metavar="SECONDS", help="before TLS begins")
    add("--quiet", action="store_true", help="no line for every request that has ended")
    return parser


def _say(line: str) -> None:
    # A pipe that nobody empties must not stop the clock, so the line is dropped if it would block.
    # A writable pipe takes PIPE_BUF bytes at once (pipe(7)).
    data = f"chatstream simulator: {line}\n".encode("utf-8", "replace")[: select.PIPE_BUF]
    with suppress(OSError, ValueError):
        if select.select([], [1], [], 0)[1]:
            os.write(1, data)


def _raise_file_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 after SIGTERM or SIGINT, 2 if it cannot serve."""
    parser = _parser()
    options = parser.parse_args(argv)
    given = {"rate": options.rate, "tokens": options.tokens, **dict(options.set)}
    _raise_file_limit()
    try:
        simulator = Simulator(
            options.host,
            options.port,
            certfile=options.certfile,
            keyfile=options.keyfile,
            handshake_delay=options.handshake_delay,
            defaults={key: value for key, value in given.items() if value is not None},
            say=None if options.quiet else _say,
        )
    except (OSError, ValueError, OverflowError) as error:
        print(f"chatstream simulator: {_explain(error, options)}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: simulator.close())
    print(f"chatstream simulator: listening on {simulator.url}", flush=True)
    simulator.serve_forever()
    return 0


def _explain(error: Exception, options: argparse.Namespace) -> str:
    if not isinstance(error, OSError):
        return str(error)
    address = f"{options.host}:{options.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{address} is in use; stop the other program or choose another --port"
    return f"cannot listen on {address}: {error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
