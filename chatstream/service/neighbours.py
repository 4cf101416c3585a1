"""The other workers: what is asked of them, and what they ask of us."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from time import monotonic

from chatstream import bus
from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Action, Answer, Claim, Enquiry, Listing, Live, Name, Request
from chatstream.errors import BusUnavailable, StreamError, Unconfirmed
from chatstream.service.lifetime import Lifetime
from chatstream.service.registry import Registry
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop
from chatstream.stream.outcome import Cancelled, Cause
from chatstream.stream.stream import Stream

log = logging.getLogger("chatstream")


class Neighbours:
    """A service's way to the app's other workers, and theirs to its streams. Safe from any thread.

    Attributes:
        bus: What carries it; before `join`, and after `leave`, this process alone.
        joined: The process whose bus it is.
    """

    def __init__(
        self,
        name: str,
        settings: Callable[[], Settings],
        registry: Registry,
        loop: Loop,
        lifetime: Lifetime,
        *,
        on_join: Callable[[], object],
        on_cancel: Callable[[Cancelled], object],
    ) -> None:
        """
        Args:
            name: The app's on the bus.
            settings: The app's, as they are now.
            registry: The streams of this process.
            loop: Where the bus waits for sockets.
            lifetime: Whose lock is held while a bus is joined.
            on_join: Called under that lock, once per process.
            on_cancel: Told of each cancel, when it has been answered.
        """
        self._name = name
        self._settings = settings
        self._registry = registry
        self._loop = loop
        self._lifetime = lifetime
        self._on_join = on_join
        self._on_cancel = on_cancel
        self.bus: Bus = LocalBus(self.receive)
        self.joined = 0

    def join(self) -> None:
        """Joins the bus, once per process.

        Raises:
            Busy: The process has no thread or descriptor left.
        """
        if self.joined == os.getpid():
            return
        with self._lifetime.making():
            if self.joined == os.getpid():
                return
            self._lifetime.begin()
            settings = self._settings()
            joined = bus.create(settings, self.receive, self._loop, self._name, self.lives)
            joined.start()
            self.bus, self.joined = joined, os.getpid()
            self._on_join()

    def leave(self) -> Bus:
        """Returns the bus that was joined, to be closed. Under the lock of `Lifetime.making`."""
        left, self.bus, self.joined = self.bus, LocalBus(self.receive), 0
        return left

    # What is asked of them

    def cancel(self, session_id: str, stream_id: str | None, owner: str) -> bool:
        """See `Service.abort`."""
        with self._cancelling(session_id, stream_id, owner) as answers:
            stopped = self.bus.cancel(owner, session_id, stream_id)
            answers.append("stopped" if stopped else "not_found")
            return stopped

    def sessions(self, owner: str | None) -> Listing:
        """See `Service.sessions`."""
        self.join()
        with self._bus_faults():
            return self.bus.list(owner)

    def cancel_all(self, owner: str | None) -> Listing:
        """See `Service.cancel_all`."""
        with self._cancelling(None, None, owner) as answers:
            listing = self.bus.cancel_all(owner)
            stopped = any(each.streams for each in listing.workers)
            silent = not all(each.answered for each in listing.workers)
            answers.append(Unconfirmed.code if silent else "stopped" if stopped else "not_found")
            return listing

    def check(self) -> None:
        """See `Service.check_bus`."""
        self.join()
        with self._bus_faults():
            self.bus.check()

    @contextlib.contextmanager
    def _cancelling(
        self, session_id: str | None, stream_id: str | None, owner: str | None
    ) -> Iterator[list[str]]:
        """Tells who listens of a cancel: its answer is put into the list, or raised."""
        begin = monotonic()
        answers: list[str] = []
        try:
            self.join()
            with self._bus_faults():
                yield answers
        except StreamError as error:
            answers = [error.code]
            raise
        finally:
            answer = answers[0] if answers else "failed"
            seconds = monotonic() - begin
            self._on_cancel(Cancelled(session_id, stream_id, owner, answer, seconds))

    @contextlib.contextmanager
    def _bus_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("[bus] %s: %s", self.bus.name, error)
            raise BusUnavailable from error

    def claim(self, stream: Stream) -> bool:
        """Has `stream` found by them; an older one of its session makes way. See `Bus.claim`.

        Returns:
            Whether it has been cancelled already.

        Raises:
            Refused: 409 and 429.
            Unconfirmed: Streams of this session are in workers that hang.
        """
        settings = self._settings()
        reject = settings.on_conflict == "reject"
        limit = settings.max_streams_per_owner
        try:
            return self.bus.claim(_claim_of(stream), reject=reject, limit=limit)
        except OSError as error:  # the bus is broken; the stream need not be
            log.warning("[bus] %s: %s", self.bus.name, error)
            return False

    def release(self, stream: Stream) -> None:
        """`stream` has ended: its names and its place are free."""
        with contextlib.suppress(OSError):  # the bus is broken, and has said so
            self.bus.release(_claim_of(stream))

    # What they ask of us

    def receive(self, request: Request) -> Answer:
        """What the bus's requests do here. See `Receive` for its contract."""
        stream = self._registry.find(request.owner, request.session_id, request.stream_id)
        if stream is None:
            return Answer.ABSENT
        if request.action is Action.PROBE:
            return Answer.LIVE
        if request.before is not None and stream.started > request.before:  # the next one
            return Answer.ABSENT if request.action is Action.CANCEL else Answer.LIVE
        cause = Cause.CANCEL if request.action is Action.CANCEL else Cause.SUPERSEDED
        return Answer.STOPPED if stream.abort(cause) else Answer.ABSENT

    def lives(self, enquiry: Enquiry) -> Iterator[Live]:
        """What the bus says of this process, and what it stops; see `Lives`."""
        now = monotonic()
        for stream in self._registry.live():  # in the order of their numbers
            if (
                stream.number > enquiry.after
                and enquiry.owner in (None, stream.owner)
                and (enquiry.before is None or stream.started <= enquiry.before)
            ):
                seconds, phase = now - stream.started, stream.phase.value
                if not enquiry.stop or stream.abort(Cause.CANCEL):
                    yield Live(_claim_of(stream).name, stream.number, phase, seconds, stream.events)


def _claim_of(stream: Stream) -> Claim:
    return Claim(Name(stream.owner, stream.session_id, stream.stream_id), stream.number)
