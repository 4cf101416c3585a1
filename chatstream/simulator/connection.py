"""One client's socket: epoll's news in, requests read, steps sent as they fall due."""

from __future__ import annotations

import errno
import functools
import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol

from chatstream.simulator.exchange import Exchange, Mark
from chatstream.simulator.openai_chat import STAMP
from chatstream.simulator.plan import SECOND
from chatstream.simulator.script import NEVER, Step
from chatstream.simulator.wire import BadRequest, Request, dump, make_head, take_head

_WRITE_LIMIT = 65_536  # bytes for one write, so (plus one event) the most that is ever buffered

_READ_SIZE = 65_536  # bytes

_LINGER_NS = 2 * SECOND  # how long a connection that we ended waits for the client's own FIN


class Phase(Enum):
    """What a connection is doing."""

    HANDSHAKE = 1
    IDLE = 2  # reading a request
    BUSY = 3  # answering it; nothing is read meanwhile
    LINGER = 4  # our side is closed, the client's not yet
    CLOSED = 5


class Host(Protocol):
    """What connections are served by: the `Simulator`."""

    poller: select.epoll
    ledger: Any

    def call_at(
        self, when_ns: int, connection: Connection | None, call: Callable[[], None]
    ) -> None: ...
    def forget(self, connection: Connection, fd: int, now_ns: int) -> None: ...
    def serve(self, connection: Connection, request: Request) -> None: ...


class Connection:
    """One client's socket: reads requests, plays the steps of the answers.

    Touched by the loop's thread only.
    """

    def __init__(self, simulator: Host, sock: socket.socket, number: int, peer: int) -> None:
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
        self._single = self._stamps = False
        self._armed_ns = NEVER
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
        self._armed_ns = NEVER
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
        self,
        steps: Iterator[Step],
        exchange: Exchange | None = None,
        *,
        single: bool = False,
        stamps: bool = False,
    ) -> None:
        """Starts an answer; its steps are sent as they fall due.

        Never two at once if `single`; with `stamps`, each token tells when.
        """
        self.exchange, self._single, self._stamps = exchange, single, stamps
        self._steps, self._step = steps, next(steps, None)
        if self.gone_ns is None:
            self._pump()

    def respond(self, status: int, body: object) -> None:
        """Answers with JSON, at once."""
        data = dump(body)
        fields = {"Content-Type": "application/json", "Content-Length": len(data)}
        head = make_head(status, fields, self.keep_alive)
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
        if at_ns != self._armed_ns and at_ns != NEVER:
            self._armed_ns = at_ns
            self._simulator.call_at(at_ns, self, self._wake)

    def _gather(self, now_ns: int) -> None:
        step = self._step
        while step is not None and step.at_ns <= now_ns and len(self._out) < _WRITE_LIMIT:
            self._out += _stamped(step.data) if self._stamps and step.tokens else step.data
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


def _stamped(data: bytes) -> bytes:
    return data.replace(STAMP, b"@%020d" % time.monotonic_ns())
