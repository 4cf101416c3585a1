"""StreamIterable: a mover, the iterable that a WSGI server walks with a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic

from chatstream.errors import StreamError, UpstreamError, headers_late, idle
from chatstream.sockets.loop import Loop
from chatstream.stream.detached import Detached
from chatstream.stream.outcome import Cause, Kind, Outcome, Phase
from chatstream.stream.sides import Body, Exchange
from chatstream.stream.stream import DRAIN, Stream


class StreamIterable:
    """A mover: the WSGI iterable. The thread that walks it waits, receives and sends.

    Owner thread only: the server's, one call at a time. `close` is idempotent and is the server's
    way to say that the response is over, whole or not.
    """

    def __init__(
        self,
        stream: Stream,
        connect: Callable[[Stream], None],
        *,
        ping_interval: float,
        headers_timeout: float,
        idle_timeout: float,
        on_close: Callable[[Outcome], None],
        walk: Callable[[Stream], None] | None = None,
        loop: Loop | None = None,
    ) -> None:
        """
        Args:
            stream: What is moved.
            connect: Starts the call to the provider in a thread (under gevent: a greenlet) of its
                own, which ends in `Stream.answered` or `Stream.fail`. So this one can send pings.
            ping_interval: Seconds without a byte to the client after which a ping goes out.
            headers_timeout: Seconds from the first `next` to the provider's headers.
            idle_timeout: Seconds without a byte from the provider.
            on_close: Called once, at the true end.
            walk: Called before the first `next`: a thread is about to be held. Raises StreamError.
            loop: What moves the stream where the server can detach it; None: nothing does.
        """
        self.stream = stream
        self._connect: Callable[[Stream], None] | None = connect
        self._ping_interval = ping_interval
        self._headers_timeout = headers_timeout
        self._idle_timeout = idle_timeout
        self._on_close = on_close
        self._walk = walk
        self._loop = loop
        self._body: Body | None = None
        self._changed: threading.Event | None = None  # answered, or ended; once it is walked
        self._called = False  # the provider was, or need not be
        self._begun = False  # a byte was handed to the server
        self._over = False  # nothing more will be
        self._closed = False
        self._pinged = False  # the last thing handed over was a ping
        self._unsent = 0  # bytes handed over, and the server has not said that they are sent
        self._ping_at = self._give_up_at = 0.0

    def __iter__(self) -> Iterator[bytes]:
        return self

    @property
    def refusal(self) -> StreamError | None:
        """What is to be the whole response, when the stream ended in an error before any byte."""
        return None if self._begun else self.stream.error

    @property
    def said_nothing(self) -> bool:
        """Whether it was walked to its end, and that was without any byte."""
        return self._over and not self._begun

    def detach(self, exchange: Exchange, start_response: Callable[[bytes], bytes]) -> bool:
        """Leaves the stream to the loop, in the place of the first `next`. See `Detached`.

        Returns:
            Whether that is so: then only `close` is left to do.
        """
        if self._loop is None:
            return False
        Detached(
            self.stream,
            self._loop,
            exchange,
            start_response,
            ping_interval=self._ping_interval,
            headers_timeout=self._headers_timeout,
            idle_timeout=self._idle_timeout,
        ).start(self._call_provider)
        return True

    def __next__(self) -> bytes:
        self._unsent = 0  # else the server would not be back
        data = b"" if self._over else self._advance()
        if data:
            self._unsent = 0 if self._pinged else len(data)
        else:
            data = b"" if self._over else self._conclude()
        if not data:
            raise StopIteration
        if self._body is not None:
            self.stream.phase = Phase.SENDING
        self._begun = True
        return data

    def close(self) -> None:
        """Gives everything back. A stream that is not over lost its client.

        One that outlives it is read to its end first: that takes as long as the provider does.
        """
        if self._closed:
            return
        self._closed = self._over = True
        self.stream.client_gone()
        try:
            while not self.stream.ended:
                self._advance()
        finally:
            self.stream.abort(Cause.CLIENT)
            self._give_back()

    def _give_back(self) -> None:
        stream = self.stream
        stream.unsent(self._unsent)
        if stream.client is not None:
            stream.client.release()
        outcome = stream.outcome()
        try:
            if stream.body is not None:
                if outcome.kind is Kind.COMPLETED:
                    stream.body.drain(DRAIN)
                stream.body.close()
        finally:
            self._on_close(outcome)

    def drop(self) -> None:
        """Ends a stream whose answer nobody is going to be sent. As `close`, and never waits."""
        self.stream.abort(Cause.CLIENT)
        self.close()

    def _advance(self) -> bytes:
        """The next bytes for the client; b"" when the stream has ended."""
        self._set_clocks()
        while not self.stream.ended:
            timeout = min(self._ping_at, self._give_up_at) - monotonic()
            try:
                data = self._receive(max(0.0, timeout))
            except TimeoutError:
                data = self._out_of_time()
            except UpstreamError as error:
                self.stream.fail(error)
                break
            if data:
                return data
        return b""

    def _set_clocks(self) -> None:
        """The server is back for more: the time it took to send counts for neither clock."""
        now = monotonic()
        self._ping_at = now + self._ping_interval
        if self._body is not None:
            self.stream.phase = Phase.BODY
            if not self._pinged:
                self._give_up_at = now + self._idle_timeout
        elif not self._called:
            self._called = True
            self._give_up_at = now + self._headers_timeout
            self._call()
        self._pinged = False

    def _call(self) -> None:
        self._changed = threading.Event()
        self.stream.follow(self._on_change)
        self._on_change()  # what changed before that
        try:
            if self._walk is not None:
                self._walk(self.stream)
        except StreamError as error:
            self.stream.fail(error)
        if not self.stream.ended:
            self._call_provider(self.stream)

    def _on_change(self) -> None:
        """In any thread. That the client has gone changes nothing: a write will say so."""
        if self._changed is not None and (self.stream.ended or self.stream.body is not None):
            self._changed.set()

    def _call_provider(self, stream: Stream) -> None:
        # Once: it has the whole request, which may be long, and the stream may be so too.
        connect, self._connect = self._connect, None
        if connect is not None:
            connect(stream)

    def _receive(self, timeout: float) -> bytes:
        """What came from the provider within `timeout` seconds, in whole events."""
        if self._body is None:
            assert self._changed is not None
            if not self._changed.wait(timeout):
                raise TimeoutError
            self._body = self.stream.body
            if self._body is not None:
                self.stream.phase = Phase.BODY
                self._give_up_at = monotonic() + self._idle_timeout
            return b""
        data = self._body.receive(timeout)
        if not data:
            return self.stream.eof()
        self._give_up_at = monotonic() + self._idle_timeout
        return self.stream.feed(data)

    def _out_of_time(self) -> bytes:
        now = monotonic()
        if now >= self._give_up_at:
            self.stream.fail(headers_late() if self._body is None else idle())
        elif now >= self._ping_at:
            self._pinged = True
            return self.stream.ping
        return b""

    def _conclude(self) -> bytes:
        """The last bytes for the client, where it is to be told of something."""
        self._over = True
        return self.stream.last_words() if self._begun else b""
