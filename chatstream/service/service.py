"""Service: the streams of one app in one process. Wiring: the room that knows the others."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from chatstream import bus
from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Action, Answer, Claim, Enquiry, Listing, Live, Name, Request
from chatstream.errors import (
    BusUnavailable,
    Busy,
    StreamAborted,
    StreamError,
    Unconfirmed,
    UpstreamError,
    busy_without_descriptors,
    shutting_down,
)
from chatstream.service.advice import advice
from chatstream.service.hooks import Admin, Identify, Prepare
from chatstream.service.lookout import Lookout
from chatstream.service.registry import Registry
from chatstream.settings.table import Settings
from chatstream.sockets import native
from chatstream.sockets.loop import Loop, Timer
from chatstream.stream.forms import EventStream
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.outcome import Cancelled, Cause, Outcome
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

    Threads and connections start with the first stream, so after a server's fork.

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
        self._bus: Bus = LocalBus(self._receive)
        self._upstream: Upstream | None = None
        self._tracing: tracing.Tracing | None = None
        self._joined = 0  # the process whose bus it is
        self._started = 0  # the process whose upstream it is
        self._lookout = Lookout(self._loop, self.registry.held)
        self._draining = self._drained = False
        self._stopped = False  # the loop is to end with the last stream
        self._on_rest: dict[object, Callable[[], object]] = {}  # changed in one step
        self._walked = False  # a stream was, though the server would have let go of it
        self._locks: tuple[int, threading.Lock] = (0, threading.Lock())
        self._forked = native.allocate_lock()  # guards the one above

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

        self._join()
        with self._starting():
            if self._started == os.getpid():
                return
            # By now the server is known.
            self.registry.slots = stream_slots(self.settings, environ or {})
            self._upstream = Upstream(self.settings, self.registry.slots.all, self._loop.call_later)
            self._tracing = tracing.create(self.settings.upstream_url)
            self._started = os.getpid()
        draining.follow_signals()
        for sentence in advice(self.settings, self._bus, environ or {}):
            log.warning(sentence)

    def _starting(self) -> threading.Lock:
        """The lock under which this process's things are made: nobody can go on without them.

        Made in the process: with preload_app, one that was made before gevent patched would block
        all greenlets when one of them waits.
        """
        with self._forked:
            if self._locks[0] != os.getpid():
                self._locks = (os.getpid(), threading.Lock())
            return self._locks[1]

    def _join(self) -> None:
        """Joins the bus, once per process."""
        if self._joined == os.getpid():
            return
        with self._starting():
            if self._joined == os.getpid():
                return
            self._stopped = False
            joined = bus.create(self.settings, self._receive, self._loop, self.name, self._lives)
            joined.start()
            self._bus, self._joined = joined, os.getpid()
            atexit.register(self._leave)

    def drain(self, *, at_once: bool = False) -> None:
        """Has the streams come to an end: what is left when the time is over is aborted.

        The cause is SHUTDOWN; streams that are opened after that are refused. Safe from any thread,
        also from one of the operating system's own. Idempotent.

        Args:
            at_once: The time is over now, not in CHATSTREAM_DRAIN seconds (or what gunicorn's
                `graceful_timeout` leaves of them).
        """
        if at_once:
            self._end_streams()
        elif not self._draining:
            self._draining = True
            try:
                self._loop.call_later(self._time_to_drain(), self._end_streams)
            except Busy:  # no clock can be had
                self._end_streams()

    def draining(self) -> bool:
        """Whether this process is to end, so that new streams had better go elsewhere."""
        alive = getattr(server.gunicorn_worker(), "alive", True)
        return self._draining or self._drained or not alive

    def at_rest(self) -> bool:
        """Whether no stream is left, also none that has ended and only has to be sent."""
        return len(self.registry) == 0

    def has_readers(self) -> bool:
        """Whether somebody listens to `stream_ended` for an answer's text."""
        return self._announcer.has_readers()

    def stop(self) -> None:
        """Aborts every stream (cause SHUTDOWN), closes idle connections, ends the loop's thread.

        For tests and for the end of a process; a later `open` starts again. Does not wait: the loop
        goes on until the last stream's client has its end, or takes no bytes.
        """
        self._end_streams()
        with self._starting():
            upstream, self._upstream, self._started = self._upstream, None, 0
            self._lookout.stop()
            joined, self._bus, self._joined = self._bus, LocalBus(self._receive), 0
        joined.close()
        if upstream is not None:
            upstream.close()
        self._stopped = True
        self._gone()
        self._draining = self._drained = False
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
        key = object()
        self._on_rest[key] = listener

        def forget() -> None:
            self._on_rest.pop(key, None)

        return forget

    def _gone(self) -> None:
        """A stream has gone. After the last one the loop's thread ends, if `stop` left it that."""
        if not self.at_rest():
            return
        if self._stopped:
            self._loop.stop()
        for listener in list(self._on_rest.values()):
            listener()

    def _leave(self) -> None:
        """At the end of a process; not of one that it has forked."""
        if self._joined == os.getpid():
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
        if self._drained:
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
        if self._drained:  # meanwhile
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
        with self._cancelling(session_id, stream_id, owner) as answers:
            stopped = self._bus.cancel(owner, session_id, stream_id)
            answers.append("stopped" if stopped else "not_found")
            return stopped

    def sessions(self, owner: str | None = None) -> Listing:
        """What lives in all workers of the app. Waits `PATIENCE` seconds for one that hangs.

        Args:
            owner: Whose streams; None for everybody's.

        Raises:
            BusUnavailable: Which workers there are cannot be found out.
        """
        self._join()
        with self._bus_faults():
            return self._bus.list(owner)

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
        with self._cancelling(None, None, owner) as answers:
            listing = self._bus.cancel_all(owner)
            stopped = any(each.streams for each in listing.workers)
            silent = not all(each.answered for each in listing.workers)
            answers.append(Unconfirmed.code if silent else "stopped" if stopped else "not_found")
            return listing

    def check_bus(self) -> None:
        """Looks whether the other workers can be reached now. Waits a second at most.

        Raises:
            BusUnavailable: They cannot.
        """
        self._join()
        with self._bus_faults():
            self._bus.check()

    @contextlib.contextmanager
    def _cancelling(
        self, session_id: str | None, stream_id: str | None, owner: str | None
    ) -> Iterator[list[str]]:
        """Tells who listens of a cancel: its answer is put into the list, or raised."""
        begin = monotonic()
        answers: list[str] = []
        try:
            self._join()
            with self._bus_faults():
                yield answers
        except StreamError as error:
            answers = [error.code]
            raise
        finally:
            answer = answers[0] if answers else "failed"
            seconds = monotonic() - begin
            self._announcer.cancelled(Cancelled(session_id, stream_id, owner, answer, seconds))

    @contextlib.contextmanager
    def _bus_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("[bus] %s: %s", self._bus.name, error)
            raise BusUnavailable from error

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
            cancelled = self._claim(stream)
        except BaseException:
            self.registry.remove(stream)
            raise
        if cancelled:
            stream.abort(Cause.CANCEL)

    def _claim(self, stream: Stream) -> bool:
        reject = self.settings.on_conflict == "reject"
        limit = self.settings.max_streams_per_owner
        try:
            return self._bus.claim(_claim_of(stream), reject=reject, limit=limit)
        except OSError as error:  # the bus is broken; the stream need not be
            log.warning("[bus] %s: %s", self._bus.name, error)
            return False

    def _receive(self, request: Request) -> Answer:
        """What the bus's requests do here. See `Bus` for its contract."""
        stream = self.registry.find(request.owner, request.session_id, request.stream_id)
        if stream is None:
            return Answer.ABSENT
        if request.action is Action.PROBE:
            return Answer.LIVE
        if request.before is not None and stream.started > request.before:  # the next one
            return Answer.ABSENT if request.action is Action.CANCEL else Answer.LIVE
        cause = Cause.CANCEL if request.action is Action.CANCEL else Cause.SUPERSEDED
        return Answer.STOPPED if stream.abort(cause) else Answer.ABSENT

    def _lives(self, enquiry: Enquiry) -> Iterator[Live]:
        """What the bus says of this process, and what it stops; see `Lives`."""
        now = monotonic()
        for stream in self.registry.live():  # in the order of their numbers
            if (
                stream.number > enquiry.after
                and enquiry.owner in (None, stream.owner)
                and (enquiry.before is None or stream.started <= enquiry.before)
            ):
                seconds, phase = now - stream.started, stream.phase.value
                if not enquiry.stop or stream.abort(Cause.CANCEL):
                    yield Live(_claim_of(stream).name, stream.number, phase, seconds, stream.events)

    def _end_streams(self) -> None:
        self._drained = True  # before the list is made: a stream that is not in it sees this
        for stream in self.registry.live():
            stream.abort(Cause.SHUTDOWN)

    def _time_to_drain(self) -> float:
        """Seconds that streams may go on."""
        worker = server.gunicorn_worker()
        if worker is None:
            return self.settings.drain
        graceful: int = worker.cfg.graceful_timeout
        return max(0.0, min(self.settings.drain, graceful - draining.GRACE))

    def _connect(self, payload: bytes, stream: Stream) -> None:
        upstream = self._upstream
        if upstream is None:  # stopped meanwhile, and so was the stream
            return
        self.registry.enter(stream)
        try:
            upstream.threads.run(partial(self._call, upstream, payload, stream))
        except RuntimeError:  # can't start new thread
            stream.fail(Busy("This worker has no free thread. Please try again."))
            self.registry.leave(stream)

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

    def _call(self, upstream: Upstream, payload: bytes, stream: Stream) -> None:
        """Calls the provider, in a thread of the call's own. Returns when its headers are in."""
        try:
            body = upstream.open(payload, stream)
            if not stream.answered(body):
                body.close()
        except StreamAborted:
            pass
        except StreamError as error:
            stream.fail(error)
        except Exception:
            names = {"session_id": stream.session_id, "stream_id": stream.stream_id}
            log.exception("[SSE] %s stream=%s", *names.values(), extra=names)
            stream.fail(UpstreamError("The provider could not be called."))
        finally:
            self.registry.leave(stream)
            self._gone()

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
            self._gone()

    def _tell_end(self, stream: Stream, end: tracing.End | None, outcome: Outcome) -> None:
        try:
            with contextlib.suppress(OSError):  # the bus is broken, and has said so
                self._bus.release(_claim_of(stream))
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


def _claim_of(stream: Stream) -> Claim:
    return Claim(Name(stream.owner, stream.session_id, stream.stream_id), stream.number)
