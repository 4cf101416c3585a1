"""Service: the streams of one app in one process. Wiring: the room that knows the others."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from chatstream.bus.messages import Listing
from chatstream.errors import StreamError, busy_without_descriptors, shutting_down
from chatstream.service.advice import advice
from chatstream.service.hooks import Admin, Identify, Prepare
from chatstream.service.lifetime import Lifetime, time_to_drain
from chatstream.service.lookout import Lookout
from chatstream.service.neighbours import Neighbours
from chatstream.service.registry import Registry
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop, Timer
from chatstream.stream.forms import EventStream
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.outcome import Cause, Outcome
from chatstream.stream.stream import Stream
from chatstream.telemetry import tracing
from chatstream.telemetry.announcer import Announcer, log_outcome
from chatstream.workers import draining, server
from chatstream.workers.server import detaches, stream_slots

if TYPE_CHECKING:
    from flask import Flask

    from chatstream.upstream.provider import Upstream


log = logging.getLogger("chatstream")


class Service:
    """The streams of one app in one process. Safe from any thread.

    Threads and connections start after a server's fork: the bus's with the process, the others with
    the first stream.

    Attributes:
        name: The app's on the bus.
        settings: The app's settings.
        registry: Its live streams.
        identify: See `Identify`.
        admin: See `Admin`.
        prepare: See `Prepare`.
        challenge: What a 401 says of how to log in, or None: the app knows.
    """

    def __init__(
        self,
        settings: Settings,
        identify: Identify | None = None,
        name: str = "0",
        app: Flask | None = None,
    ) -> None:
        """
        Args:
            settings: The app's.
            identify: See `Identify`.
            name: The app's on the bus: the same in every process, and no other app's.
            app: Who is the sender of the signals. Not kept: only looked at while it lives.
        """
        self._announcer = Announcer(app)
        self.name = name
        self.settings = settings
        self.identify = identify
        self.admin: Admin | None = None
        self.prepare: Prepare | None = None
        self.challenge: str | None = None
        self.registry = Registry(
            stream_slots(settings),
            reject_conflicts=settings.on_conflict == "reject",
        )
        self._loop = Loop()
        self._lookout = Lookout(self._loop, self.registry.held)
        self._lifetime = Lifetime(self._loop, self.registry)
        self._neighbours = Neighbours(
            name,
            lambda: self.settings,
            self.registry,
            self._loop,
            self._lifetime,
            on_join=lambda: atexit.register(self._leave),
            on_cancel=self._announcer.cancelled,
        )
        self._upstream: Upstream | None = None
        self._tracing: tracing.Tracing | None = None
        self._started = 0  # the process whose upstream it is
        self._walked = False  # a stream was, though the server would have let go of it

    def start(self, environ: Mapping[str, Any] | None = None) -> None:
        """Makes what must not cross a fork. Called by `open`; idempotent.

        Args:
            environ: A request's WSGI environ, for advice in the log about the server.
        """
        if self._started == os.getpid():
            return
        # Here, after the fork: with preload_app, gevent patches ssl after the app was imported,
        # and urllib3 must not have bound the unpatched one.
        from chatstream.upstream.provider import Upstream

        self._neighbours.join()
        with self._lifetime.making():
            if self._started == os.getpid():
                return
            # By now the server is known.
            self.registry.slots = stream_slots(self.settings, environ or {})
            self._upstream = Upstream(self.settings, self.registry.slots.all, self._loop.call_later)
            self._tracing = tracing.create(self.settings.upstream_url)
            self._started = os.getpid()
        draining.follow_signals()
        for sentence in advice(self.settings, self._neighbours.bus, environ or {}):
            log.warning(sentence)

    def join(self) -> None:
        """Joins the app's other workers, so that no request has to wait for that. Idempotent.

        Called when the process begins to serve. Where it fails it is tried again when needed.
        """
        with contextlib.suppress(StreamError, OSError):
            self._neighbours.join()

    def drain(self, *, at_once: bool = False) -> None:
        """Has the streams come to an end: what is left when the time is over is aborted.

        The cause is SHUTDOWN; streams that are opened after that are refused. Safe from any thread,
        also from one of the operating system's own. Idempotent.

        Args:
            at_once: The time is over now, not in CHATSTREAM_DRAIN seconds (or what gunicorn's
                `graceful_timeout` leaves of them).
        """
        self._lifetime.drain(time_to_drain(self.settings.drain), at_once=at_once)

    def draining(self) -> bool:
        """Whether this process is to end, so that new streams had better go elsewhere."""
        return self._lifetime.draining()

    def at_rest(self) -> bool:
        """Whether no stream is left, also none that has ended and only has to be sent."""
        return self._lifetime.at_rest()

    def has_readers(self) -> bool:
        """Whether somebody listens to `stream_ended` for an answer's text."""
        return self._announcer.has_readers()

    def stop(self) -> None:
        """Aborts every stream (cause SHUTDOWN), closes idle connections, ends the loop's thread.

        For tests and for the end of a process; a later `open` starts again. Does not wait: the loop
        goes on until the last stream's client has its end, or takes no bytes.
        """
        self._lifetime.end_streams()
        with self._lifetime.making():
            upstream, self._upstream, self._started = self._upstream, None, 0
            self._lookout.stop()
            left = self._neighbours.leave()
        left.close()
        if upstream is not None:
            upstream.close()
        self._lifetime.stop()
        atexit.unregister(self._leave)

    def reconfigure(self, settings: Settings) -> None:
        """Has other settings hold for the streams to come, and aborts those that live: see `stop`.

        For tests, and for programs whose settings are known after the app was made. Where the
        routes are, and what else `init_app` did with the settings, stays as it was. Not while
        streams are being opened.
        """
        self.stop()
        self.settings = settings
        self.registry.reject_conflicts = settings.on_conflict == "reject"

    def on_rest(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Has `listener` called whenever the last stream has gone. It must not block.

        Returns:
            What ends that. Idempotent.
        """
        return self._lifetime.on_rest(listener)

    def _leave(self) -> None:
        """At the end of a process; not of one that it has forked."""
        if self._neighbours.joined == os.getpid():
            self.stop()
            self._loop.stop()  # no thread is left that could end a stream

    def open(
        self,
        payload: bytes,
        *,
        session_id: str | None = None,
        stream_id: str | None = None,
        owner: str = "",
        environ: Mapping[str, Any] | None = None,
        form: Callable[[str, str, str], Stream] = EventStream,
    ) -> StreamIterable:
        """Begins a stream. The provider is called at the iterable's first `next`.

        Args:
            payload: The provider's chat request, as JSON.
            session_id: The chat; made up when None.
            stream_id: This answer; made up when None.
            owner: Whose it is.
            environ: The request's WSGI environ, where the client's socket is looked for.
            form: Makes the stream, given session, stream and owner: one of events, or another.

        Returns:
            What the server has to walk and to close.

        Raises:
            Busy: No slot or descriptor is free.
            Refused: 409 and 429, see `Registry.add` and `Bus.claim`.
            Unconfirmed: Streams of this session are in workers that hang.
            Ended: 503, the worker is to end, and the time for its streams is over.
        """
        self.start(environ)
        if self._lifetime.over:
            raise shutting_down()
        stream = form(session_id or uuid.uuid4().hex, stream_id or uuid.uuid4().hex, owner)
        stream.key = self.settings.api_key.encode()
        stream.outlives_client = self.settings.on_disconnect == "finish"
        stream.transcript = self._announcer.transcript(payload, stream)
        timer = None
        try:
            self._watch_client(stream, environ or {})
            if deadline := self.settings.stream_deadline:
                timer = self._loop.call_later(deadline, partial(stream.abort, Cause.DEADLINE))
            self._enter(stream)
        except BaseException:
            self._let_go(stream, timer)
            raise
        if self._lifetime.over:  # meanwhile
            stream.abort(Cause.SHUTDOWN)
        end = self._tracing.begin(stream, payload, environ or {}) if self._tracing else None
        source = StreamIterable(
            stream,
            partial(self._connect, payload),
            ping_interval=self.settings.ping_interval,
            headers_timeout=self.settings.upstream_headers_timeout,
            idle_timeout=self.settings.upstream_idle_timeout,
            on_close=partial(self._closed, stream, timer, end),
            walk=self._walk,
            loop=self._loop if self.settings.detach else None,
        )
        try:
            self._announcer.started(stream)
        except BaseException:  # the process is told to end, say: nobody gets to see the stream
            source.drop()
            raise
        return source

    def abort(self, session_id: str, stream_id: str | None = None, *, owner: str = "") -> bool:
        """Stops the live stream of these names, in whichever worker it is, cause CANCEL.

        A `stream_id` that has not been seen is remembered: see `Bus.cancel`.

        Returns:
            Whether there was one. When True, the provider's connection has been shut down.

        Raises:
            Unconfirmed: The worker that has it does not answer.
            BusUnavailable: Whether another worker has it cannot be found out.
        """
        return self._neighbours.cancel(session_id, stream_id, owner)

    def sessions(self, owner: str | None = None) -> Listing:
        """What lives in all workers of the app. Waits `PATIENCE` seconds for one that hangs.

        Args:
            owner: Whose streams; None for everybody's.

        Raises:
            BusUnavailable: Which workers there are cannot be found out.
        """
        return self._neighbours.sessions(owner)

    def cancel_all(self, owner: str | None) -> Listing:
        """Stops all live streams of an owner, in whichever workers they are, cause CANCEL.

        Waits `PATIENCE` seconds for a worker that hangs; it stops its own as soon as it wakes.

        Args:
            owner: Whose streams; None for everybody's.

        Returns:
            What this call stopped. A worker that has not answered is named.

        Raises:
            BusUnavailable: Which workers there are cannot be found out. What lived in this process
                has been stopped.
        """
        return self._neighbours.cancel_all(owner)

    def check_bus(self) -> None:
        """Looks whether the other workers can be reached now. Waits a second at most.

        Raises:
            BusUnavailable: They cannot.
        """
        self._neighbours.check()

    def _watch_client(self, stream: Stream, environ: Mapping[str, Any]) -> None:
        with busy_without_descriptors(), server.client_socket(environ) as connection:
            if connection is not None:
                stream.client = self._loop.watch(connection, stream.client_gone)
                self._lookout.begin(self.settings.send_timeout)

    def _enter(self, stream: Stream) -> None:
        """Has the stream found under its names, here and elsewhere; an older one makes way."""
        superseded = self.registry.add(stream)
        if superseded is not None:
            superseded.abort(Cause.SUPERSEDED)
        try:
            cancelled = self._neighbours.claim(stream)
        except BaseException:
            self.registry.remove(stream)
            raise
        if cancelled:
            stream.abort(Cause.CANCEL)

    def _connect(self, payload: bytes, stream: Stream) -> None:
        upstream = self._upstream
        if upstream is None:  # stopped meanwhile, and so was the stream
            return
        self.registry.enter(stream)
        upstream.begin(payload, stream, partial(self._called, stream))

    def _called(self, stream: Stream) -> None:
        self.registry.leave(stream)
        self._lifetime.gone()

    def _walk(self, stream: Stream) -> None:
        """A server's thread is about to walk `stream`. Raises Busy if none is left for that."""
        if detaches(self.settings) and not self._walked:
            self._walked = True
            log.warning(
                "[SSE] The app's responses are wrapped by something that needs to see them (a"
                " middleware). So streams keep their threads, %s at a time; CHATSTREAM_THREADS"
                " says how many there are.",
                self.registry.slots.walked,
            )
        self.registry.walk(stream)

    def _closed(
        self, stream: Stream, timer: Timer | None, end: tracing.End | None, outcome: Outcome
    ) -> None:
        self._let_go(stream, timer)
        self.registry.enter(stream)  # a worker that ends waits for those who listen
        self.registry.remove(stream)
        try:
            self._tell_end(stream, end, outcome)
        finally:
            self.registry.leave(stream)
            self._lifetime.gone()

    def _tell_end(self, stream: Stream, end: tracing.End | None, outcome: Outcome) -> None:
        try:
            self._neighbours.release(stream)
            log_outcome(outcome)
            if end is not None:
                end(outcome)
        finally:  # also where a filter of the app's log fails, or gevent ends a wait for the bus
            self._announcer.ended(outcome)

    def _let_go(self, stream: Stream, timer: Timer | None) -> None:
        if timer is not None:
            self._loop.cancel(timer)
        if stream.client is not None:
            stream.client.release()
