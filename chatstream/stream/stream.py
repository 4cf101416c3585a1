"""Stream: one provider call relayed to one client.

`Stream` is what a stream is: its names, its verdict (the one way it ends), the upstream socket's
handle and the counting. What its client gets is the form's (`forms`). It moves no bytes. That is
done by a mover: the iterable that a WSGI server walks with a thread of its own (`iterable`), or the
loop (`detached`). A stop never needs the mover's help: `Stream.abort` records the cause and shuts
the upstream socket down, from any thread.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from time import monotonic
from types import MappingProxyType

from chatstream.errors import (
    Ended,
    StreamAborted,
    StreamError,
    busy_without_descriptors,
    shutting_down,
)
from chatstream.sockets import native
from chatstream.sockets.handle import SocketHandle
from chatstream.stream.outcome import Cause, Kind, Outcome, Phase
from chatstream.stream.sides import Body, Client
from chatstream.stream.transcript import Said, Transcript

ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""A session's or a stream's name."""

CLIENT_PATIENCE = 2.0
"""Seconds that a client may take no bytes once its stream was aborted."""

DRAIN = 0.05
"""Seconds that the rest of a completed body may take, so that its connection can be reused."""

_TOLD = {
    Cause.DEADLINE: Ended(
        "The answer took longer than this service allows.", code="deadline", status=504
    ),
    Cause.SHUTDOWN: shutting_down(),
}
"""The causes that a client is told of. It knows of the others: they are its own."""

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Stream:
    """One provider call relayed to one client. The base of all forms.

    Safe from any thread, where a method does not say otherwise.

    Attributes:
        session_id: The chat the client named.
        stream_id: This one answer's name.
        owner: Who asked, as `identify` said.
        number: Which of its process's streams it is, as the registry counts.
        phase: What the stream is doing. Written by whoever moves it; read for the log.
        client: The client's socket, where the server shows it.
        ended: Whether the verdict is there: completed, aborted or failed.
        outlives_client: Whether it goes on when its client has gone. Set before it is moved.
        unattended: Whether it did, and nobody is sent anything any more.
        transcript: Keeps what the client is sent, where somebody listens. Set before it is moved.
        headers: More of them for the provider's request. Set before it is moved.
        key: The provider's, which no client gets to see. Set before it is moved.
        media_type: The answer's form, as the provider is asked for it and the client gets it.
        ping: What shows a client in silence that there is life: it means nothing in that form.
    """

    media_type: str
    ping: bytes

    def __init__(self, session_id: str, stream_id: str, owner: str = "") -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.owner = owner
        self.number = 0
        self.phase = Phase.NEW
        self.client: Client | None = None
        self.ended = False
        self.outlives_client = self.unattended = False
        self.transcript: Transcript | None = None
        self.headers: Mapping[str, str] = _NO_HEADERS
        self.key = b""
        self.started = monotonic()
        # Guards the three below. Held for assignments only.
        self._lock = native.allocate_lock()
        self._verdict: Cause | StreamError | Kind | None = None
        self._handle: SocketHandle | None = None
        self._body: Body | None = None
        self._follower: Callable[[], object] | None = None
        # Held until the stream has ended and its socket is shut down. No Event: that has a KB.
        self._uneffected = native.allocate_lock()
        self._uneffected.acquire()
        self._finish_reason = False
        self._events = 0
        self._bytes = 0
        self._stopped_in = Phase.NEW
        self._stop_ms = 0.0
        self._answered_at = self._first_event_at = 0.0

    def __repr__(self) -> str:
        verdict = self._verdict
        state = self.phase.value if verdict is None else getattr(verdict, "name", "failed")
        return f"<Stream {self.session_id}/{self.stream_id} {state}>"

    @property
    def events(self) -> int:
        """Whole events handed to the server so far. To be looked at from any thread."""
        return self._events

    # How it ends

    @property
    def cause(self) -> Cause | None:
        """Why the stream was aborted, or None."""
        return self._verdict if isinstance(self._verdict, Cause) else None

    @property
    def error(self) -> StreamError | None:
        """What the client is to be told, or None: a failure, a deadline, a shutdown."""
        verdict = self._verdict
        if isinstance(verdict, Cause):
            return _TOLD.get(verdict)
        return verdict if isinstance(verdict, StreamError) else None

    def abort(self, cause: Cause) -> bool:
        """Ends the stream for `cause`: records it, then shuts the upstream socket down.

        Safe from any thread. Idempotent. Never blocks. When it returns, the provider has been told.

        Returns:
            Whether this call ended the stream; False when it had ended already.
        """
        if not self._end(cause):
            return False
        if self.client is not None:
            self.client.expect_end(CLIENT_PATIENCE)
        return True

    def client_gone(self, cause: Cause = Cause.CLIENT) -> None:
        """The client takes nothing more: ends the stream for `cause`, or has it go on alone.

        Safe from any thread. Idempotent. Never blocks.
        """
        if not self.outlives_client:
            self.abort(cause)
        elif not self.unattended and not self.ended:
            self.unattended = True
            self._tell()

    def fail(self, error: StreamError) -> bool:
        """Ends the stream for a fault. Like `abort`, with an error in the place of a cause."""
        return self._end(error)

    def complete(self) -> bool:
        """Records that the answer is whole. The upstream connection is left as it is."""
        return self._end(Kind.COMPLETED)

    def _end(self, verdict: Cause | StreamError | Kind) -> bool:
        noticed = monotonic()
        with self._lock:
            if self._verdict is not None:
                return False
            self._verdict = verdict
            self.ended = True
            self._stopped_in = self.phase
            handle = None
            if verdict is not Kind.COMPLETED:
                handle, self._handle = self._handle, None
        if handle is not None:
            handle.shutdown()
        self._stop_ms = (monotonic() - noticed) * 1000
        self._uneffected.release()
        self._tell()
        return True

    def _tell(self) -> None:
        if (follower := self._follower) is not None:
            follower()

    # The upstream socket

    def check(self) -> None:
        """Raises StreamAborted if the stream has ended."""
        if self._verdict is not None:
            raise StreamAborted

    def arm(self, sock: socket.socket) -> None:
        """Makes `sock` the one that a stop shuts down.

        Raises:
            StreamAborted: The stream has ended; the socket is not armed and must not be used.
            Busy: The process has no descriptor left.
        """
        with busy_without_descriptors():
            handle = SocketHandle(sock)
        with self._lock:
            ended = self._verdict is not None
            previous, self._handle = self._handle, (None if ended else handle)
        if previous is not None:
            previous.close()
        if ended:
            handle.close()
            raise StreamAborted

    def disarm(self) -> bool:
        """Takes the socket out of reach of a stop.

        Returns:
            Whether the connection is fit for another request: False when a stop came first.
        """
        with self._lock:
            handle, self._handle = self._handle, None
            fit = self._verdict in (None, Kind.COMPLETED)
        if handle is not None:
            handle.close()
        return fit

    def answered(self, body: Body) -> bool:
        """Hands over the provider's answer. Returns False if the stream has ended: close it."""
        with self._lock:
            if self._verdict is not None:
                return False
            self._body = body
        self._answered_at = monotonic()
        self._tell()
        return True

    def follow(self, callback: Callable[[], object] | None) -> None:
        """Has `callback` run at each change - answered, alone, ended - in the thread that makes it.

        It must not block. What has changed before, it is not told of. Mover only.
        """
        self._follower = callback

    @property
    def body(self) -> Body | None:
        """The provider's answer, if it came before the stream ended. Mover only."""
        return self._body

    # What goes through it. Mover only.

    def feed(self, data: bytes) -> bytes:
        """What `data` adds that can be sent, for the client. May end the stream."""
        raise NotImplementedError

    def eof(self) -> bytes:
        """The provider's body has ended. Returns as `feed` does. Ends the stream."""
        raise NotImplementedError

    def last_words(self) -> bytes:
        """What is left to say when it has ended."""
        return b""

    def _passed(self, data: bytes, events: int) -> None:
        """Notes what the client is about to be sent."""
        if events and not self._events:
            self._first_event_at = monotonic()
        self._events += events
        self._bytes += len(data)
        if self.transcript is not None:
            self.transcript.add(data)

    def unsent(self, count: int) -> None:
        """The last `count` bytes of what `feed` or `eof` returned last did not reach the client."""
        if self.transcript is not None and not self.unattended:
            self.transcript.drop(count)

    def without_key(self, error: bytes) -> bytes:
        """What a provider says of its failure, which may quote the key that it was sent."""
        return error.replace(self.key, b"[key]") if self.key else error

    def outcome(self) -> Outcome:
        """How the stream ended, as of now. Only once it has ended. Mover only."""
        with self._uneffected:  # a mover can be awake before the thread that woke it is done
            pass
        cause, verdict = self.cause, self._verdict
        error = verdict if isinstance(verdict, StreamError) else None
        said = self._said(verdict is Kind.COMPLETED)
        return Outcome(
            kind=Kind.ABORTED if cause else Kind.FAILED if error else Kind.COMPLETED,
            session_id=self.session_id,
            stream_id=self.stream_id,
            owner=self.owner,
            cause=cause,
            code=error.code if error else None,
            detail=error.detail if error else "",
            phase=self._stopped_in,
            duration=monotonic() - self.started,
            events=self._events,
            bytes=self._bytes,
            stop_ms=self._stop_ms if cause else None,
            time_to_headers=self._since_started(self._answered_at),
            time_to_first_event=self._since_started(self._first_event_at),
            text=said and said.text,
            reasoning=said and said.reasoning,
            model=said and said.model,
            usage=said and said.usage,
            client_left=self.unattended,
        )

    def _said(self, completed: bool) -> Said | None:
        """What the client was sent, where that was kept."""
        if self.transcript is None:
            return None
        asked = self._stopped_in not in (Phase.NEW, Phase.CONNECTING)
        return self.transcript.said(asked=asked, whole=completed or self._finish_reason)

    def _since_started(self, instant: float) -> float | None:
        return instant - self.started if instant else None
