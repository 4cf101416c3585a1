"""Detached: a mover, the loop. A stream that it moves holds no thread.

    server's thread           loop's thread                              server's thread
    app, detach ────────────> provider answered: read, cut into events
                              first bytes ────────────────────────────> start_response
                              <──────────────── the head, the first bytes are sent ┘
                              (or the thread that called the provider does that, if they are there)
                              provider readable: read, cut, send
                              client full: nothing is read until it is writable
                              stream ended: last words, the response's end
                              over ───────────────────────────────────> close, access log

A WSGI server does not let go of a response; our workers do (`chatstream.workers`).
What an app can have wrapped, as `start_response`, may wait: it runs in a thread of the server's.
"""

from __future__ import annotations

import contextvars
import enum
import ssl
from collections.abc import Callable
from functools import partial
from time import monotonic

from chatstream.errors import UpstreamError, headers_late, idle
from chatstream.sockets import native
from chatstream.sockets.loop import Loop, Timer
from chatstream.stream.outcome import Cause, Phase
from chatstream.stream.sides import Body, Exchange
from chatstream.stream.stream import DRAIN, Stream

_NO_ROOM = (BlockingIOError, ssl.SSLWantWriteError)


class _State(enum.Enum):
    """What the stream waits for."""

    HEADERS = enum.auto()  # the provider's
    BODY = enum.auto()
    BEGINNING = enum.auto()  # a thread starts the response
    SENDING = enum.auto()  # room in the client's socket
    DRAINING = enum.auto()  # all is sent; the provider's connection may be reused
    OVER = enum.auto()


HEADERS, BODY, BEGINNING, SENDING, DRAINING, OVER = _State  # looked up for every event


def _unbroken(step: Callable[[Detached], None]) -> Callable[[Detached], None]:
    """A step of the loop's. One that fails ends its stream, and would else fail for ever."""

    def run(self: Detached) -> None:
        try:
            step(self)
        except Exception:
            self._break()

    return run


class Detached:
    """A mover: the loop receives and sends where the sockets allow it.

    All but `start` and what is said to be in a thread runs in the loop's.
    """

    def __init__(
        self,
        stream: Stream,
        loop: Loop,
        exchange: Exchange,
        start_response: Callable[[bytes], bytes],
        *,
        ping_interval: float,
        headers_timeout: float,
        idle_timeout: float,
    ) -> None:
        """
        Args:
            stream: What is moved.
            loop: Who moves it.
            exchange: Where to.
            start_response: Starts the WSGI response, given its first bytes: b"" where the stream
                has ended without any. Returns what they are then. In a thread.
            ping_interval: Seconds without a byte to the client after which a ping goes out.
            headers_timeout: Seconds from `start` to the provider's headers.
            idle_timeout: Seconds without a byte from the provider.
        """
        self._stream = stream
        self._loop = loop
        self._exchange = exchange
        self._start_response = start_response
        self._context = contextvars.copy_context()  # the app's
        self._ping_interval = ping_interval
        self._idle_timeout = idle_timeout
        self._body: Body | None = None
        self._upstream_fd = -1
        self._client_fd = exchange.sock.fileno()
        self._leaving = native.allocate_lock()  # guards the end of HEADERS
        self._state = HEADERS
        self._begun = False  # the response
        self._told = False  # it says itself how the stream ended
        self._ended = False  # its end is sent, or left
        self._pinged = False  # the last thing said was a ping
        self._left: bytes | memoryview = b""  # what the client's socket had no room for
        self._gone = False  # the client, and so the stream
        self._alone = False  # the client, and the stream goes on
        self._spoke = monotonic()
        self._give_up_at = self._spoke + headers_timeout
        first = min(ping_interval, headers_timeout, idle_timeout)
        self._timer: Timer | None = loop.call_later(first, self._on_time)

    def start(self, connect: Callable[[Stream], None]) -> None:
        """Has the provider called. In a thread."""
        self._stream.follow(self._on_change)
        if not self._stream.ended:
            connect(self._stream)
        if self._stream.ended or self._stream.body is not None:  # maybe before it was followed
            self._on_change()

    def _on_change(self) -> None:
        """The stream was answered, goes on alone, or has ended. In any thread, also the loop's."""
        stream = self._stream
        answered = stream.body is not None and not stream.ended and not stream.unattended
        if answered and not self._begun and self._leave_headers():
            self._begin_at_once()
        else:
            self._loop.call_soon(self._go_on)

    def _leave_headers(self) -> bool:
        """Whether who asks goes on: the loop, or the thread that called the provider."""
        with self._leaving:
            waiting = self._state is HEADERS
            if waiting:
                self._state = BEGINNING
        return waiting

    def _begin_at_once(self) -> None:
        """The provider has answered this thread: if its first bytes are here, so is who sends them.

        To wake the loop, and a thread of the server's for it, takes longer than all that is done.
        """
        out = b""
        try:
            out = self._receive(self._take_body())
        finally:
            if not out:
                self._loop.call_soon(self._resume)
        if out:
            self._begin_in_thread(out)

    @_unbroken
    def _go_on(self) -> None:
        if self._stream.unattended and not self._alone:
            self._alone = True
            if self._state is SENDING:
                self._flush()
                return
        if self._leave_headers() or (self._state is BODY and self._stream.ended):
            self._resume()

    @_unbroken
    def _resume(self) -> None:
        """Does what is next. Nothing is left to send, and no thread begins the response."""
        if self._ended:
            self._drain()
        elif self._stream.ended:
            self._conclude()
        elif self._body is not None:
            self._read()
        elif self._stream.body is not None:
            self._take_body()
            self._read()
        else:
            self._state = HEADERS

    def _take_body(self) -> Body:
        body = self._body = self._stream.body
        assert body is not None
        self._upstream_fd = body.detach()
        self._stream.phase = Phase.BODY
        self._pinged = False  # that was while the headers were awaited
        return body

    def _wait_for(self, state: _State) -> None:
        """Leaves the provider alone meanwhile."""
        self._state = state
        self._loop.forget_ready(self._upstream_fd)

    # From the provider

    def _read(self) -> None:
        """Moves what is there, and from then on what comes."""
        self._state = BODY
        if not self._pinged:  # the time that the client took does not count
            self._give_up_at = monotonic() + self._idle_timeout
        self._move()
        if self._state is BODY and self._upstream_fd >= 0:
            self._loop.on_readable(self._upstream_fd, self._move)

    def _move(self) -> None:
        """Sends the client what the provider has sent. Runs for every event."""
        if self._state is not BODY or (body := self._body) is None:
            return
        try:
            if out := self._receive(body):
                self._pinged = False
                if not self._begun:
                    self._begin(out)
                    return
                self._spoke = self._loop.now
                if not self._put(self._exchange.frame(out)):
                    self._hold_up()
                    return
            if self._stream.ended:
                self._conclude()
            elif body.more:
                self._loop.call_soon(self._move)
        except Exception:
            self._break()

    def _receive(self, body: Body) -> bytes:
        """What has come from the provider, in whole events. May end the stream."""
        try:
            data = body.receive_now()
            if data:
                self._give_up_at = self._loop.now + self._idle_timeout
                return self._stream.feed(data)
            return b"" if data is None else self._stream.eof()
        except UpstreamError as error:
            self._stream.fail(error)
            return b""

    # To the client

    def _begin(self, data: bytes) -> None:
        self._wait_for(BEGINNING)
        self._exchange.run(partial(self._begin_in_thread, data))

    def _begin_in_thread(self, data: bytes) -> None:
        """Sends the head and the first bytes. The loop leaves all of this alone meanwhile."""
        self._told = not data
        try:
            self._put(self._exchange.begin(self._context.run(self._start_response, data)))
        except BaseException as error:
            self._gone = True
            self._stream.unsent(len(data))
            if not isinstance(error, Exception):
                raise
            self._exchange.fail(error)  # now: from `_sent` on the connection is the server's
        finally:
            self._begun = True
            self._loop.call_soon(self._sent)

    def _conclude(self) -> None:
        """The stream has ended: the response does."""
        if not self._begun:
            self._begin(b"")
            return
        self._ended = True
        words = b"" if self._told else self._stream.last_words()
        self._put((self._exchange.frame(words) if words else b"") + self._exchange.end())
        self._sent()

    def _put(self, data: bytes | memoryview) -> bool:
        """Sends what the client's socket has room for.

        Returns:
            Whether that was all. Else the rest is left, or the client is gone.
        """
        try:
            count = len(data) if self._alone else self._exchange.sock.send(data)
        except _NO_ROOM:
            count = 0
        except OSError:
            count = self._lose_client(len(data))
        self._left = data[count:]
        return not self._left

    def _lose_client(self, count: int) -> int:
        """A write says that the client is gone. Returns how much of that write is done with."""
        self._stream.client_gone()
        self._alone = self._stream.unattended
        self._gone = not self._alone
        return count if self._alone else 0

    @_unbroken
    def _sent(self) -> None:
        """What came before the next thing is sent, or left."""
        self._spoke = self._loop.now
        if self._left or self._gone:
            self._hold_up()
        else:
            self._resume()

    def _hold_up(self) -> None:
        """The client takes no more now, or never."""
        if self._gone:
            self._stream.abort(Cause.CLIENT)  # of it, or of the app, whose response cannot begin
            self._finish(whole=False)
            return
        self._wait_for(SENDING)
        self._left = memoryview(self._left)  # an answer in one piece may be long: no more copies
        if self._body is not None:  # else who calls the provider says what is done
            self._stream.phase = Phase.SENDING
        self._loop.on_writable(self._client_fd, self._flush)

    @_unbroken
    def _flush(self) -> None:
        if not self._put(self._left) and not self._gone:
            return
        self._loop.forget_ready(self._client_fd)
        if self._body is not None:
            self._stream.phase = Phase.BODY
        self._sent()

    # Clocks, and the end

    @_unbroken
    def _on_time(self) -> None:
        """A ping is due, or the provider is late; unless something was heard meanwhile."""
        now = self._loop.now
        self._timer = None
        due = now + min(self._ping_interval, self._idle_timeout)  # of a clock that starts meanwhile
        if now < self._give_up_at:
            due = min(due, self._give_up_at)
        if self._state in (HEADERS, BODY):  # else it is the client that takes time
            if now >= self._give_up_at:
                self._stream.fail(headers_late() if self._body is None else idle())
                self._go_on()  # now: what the provider says from here on comes too late
                return
            if now >= self._spoke + self._ping_interval:
                self._ping()
            due = min(due, self._spoke + self._ping_interval)
        if self._state is not OVER:
            self._timer = self._loop.call_later(max(0.0, due - now), self._on_time)

    def _ping(self) -> None:
        if self._alone:
            self._spoke = self._loop.now
            return
        if self._state is not BODY and not self._leave_headers():
            return  # the provider's answer is just there
        self._pinged = True
        if not self._begun:
            self._begin(self._stream.ping)
            return
        self._spoke = self._loop.now
        if not self._put(self._exchange.frame(self._stream.ping)):
            self._hold_up()
        elif self._state is not BODY:
            self._resume()

    def _drain(self) -> None:
        """The rest of a completed body has a moment to come: then its connection is reused."""
        stream = self._stream
        if self._body is None or stream.cause is not None or stream.error is not None:
            self._finish(whole=True)
            return
        self._wait_for(DRAINING)
        if self._timer is not None:
            self._loop.cancel(self._timer)
        self._timer = self._loop.call_later(DRAIN, partial(self._finish, whole=True))
        self._drop()
        if self._state is DRAINING and self._upstream_fd >= 0:
            self._loop.on_readable(self._upstream_fd, self._drop)

    @_unbroken
    def _drop(self) -> None:
        if self._state is not DRAINING or self._body is None:
            return
        try:
            data = self._body.receive_now()
        except UpstreamError:
            data = b""
        if data == b"":
            self._finish(whole=True)
        elif self._body.more:
            self._loop.call_soon(self._drop)

    def _break(self) -> None:
        """A step has failed, which is a fault of ours."""
        native.report()  # the loop does not wait for the logger's handlers
        self._stream.fail(UpstreamError("The answer could not be relayed."))
        self._finish(whole=False)

    def _finish(self, *, whole: bool) -> None:
        if self._state is OVER:
            return
        self._wait_for(OVER)
        self._loop.forget_ready(self._client_fd)
        if self._timer is not None:
            self._loop.cancel(self._timer)
        self._stream.follow(None)
        if self._left and not (self._ended or self._told):
            self._stream.unsent(len(self._left) - self._exchange.trailer)
        self._exchange.over(whole and not self._alone)
