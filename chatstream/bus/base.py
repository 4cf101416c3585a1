"""What every bus does, and how its messages look on the wire.

A bus knows which process has a stream, and carries a stop there. What crosses a process boundary is
a request and its reply, each one JSON object (RFC 8259, UTF-8):

    request                                           reply
    ┌────────────────────────────────────────────┐     ┌──────────────────────────────────────┐
    │ "chatstream": 1            the format      │     │ "chatstream": 1                      │
    │ "id": "5f0c…"              this exchange   │     │ "id": "5f0c…"      the request's     │
    │ "origin": "4711"           who sent it     │ ──> │ "origin": "4712"                     │
    │ "action": "cancel" | "supersede" | "probe" │     │ "answer": "stopped" | "live" |       │
    │           | "vacate"                       │     │           "absent"                   │
    │ "owner": "7"                               │     └──────────────────────────────────────┘
    │ "session": "s1" | null                     │
    │ "stream": "a1" | null                      │
    │ "before": 81.25 | null                     │
    └────────────────────────────────────────────┘

`cancel` and `supersede` abort the stream of these names; a null matches any. `probe` asks whether
there is one. `vacate` has the worker give up the places that the owner's ended streams still have
there. Streams that began after `before` are not meant, where both sides have one monotonic
clock: a request that is read late must not hit the next stream of its session. A worker replies
when it is done: `stopped` means that the provider has been told.

What lives is asked for page by page, since a message has its longest:

    enquiry                                           page
    ┌────────────────────────────────────────────┐     ┌──────────────────────────────────────┐
    │ "chatstream": 1, "id", "origin"            │     │ "chatstream": 1, "id", "origin"      │
    │ "action": "list" | "cancel-all"            │ ──> │ "streams": [[owner, session, stream, │
    │ "owner": "7" | null                        │     │   number, phase, seconds, events],…] │
    │ "after": 0                 a number        │     │ "more": true | false                 │
    │ "before": 81.25 | null     as above        │     └──────────────────────────────────────┘
    └────────────────────────────────────────────┘

A page has the worker's live streams in the order of their numbers, those above `after`; where there
are `more`, the next enquiry names the last one. A null owner means everybody's. `cancel-all` aborts
what would be listed, and its page has what it has stopped; where nobody waits for that page any
more, the worker stops all, and does not wait to be asked for the rest.

Anything else that arrives is dropped, with one warning.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Found,
    Listing,
    Live,
    Page,
    Request,
    Worker,
    listed,
)

REMEMBER = 30.0
"""Seconds that a cancel is kept for a stream that has not started, wherever it then starts."""

REMEMBER_PER_OWNER = 64

PATIENCE = 0.8
"""Seconds that a worker has to reply. A cancel's own answer is promised within one second."""

MOST = 10_000
"""Live streams of a listing, about: then no worker is asked for more."""

PAGE = 48 * 1024
"""Bytes of a page's streams."""

Lives = Callable[[Enquiry], Iterable[Live]]
"""The live streams of this process that an enquiry is for, in the order of their numbers.

Of one that stops: those that it has aborted, each in the moment in which it is asked for the next.
Safe from any thread, never blocks, never logs.
"""

Receive = Callable[[Request], Answer]
"""Does in this process what a request says. Safe from any thread, never blocks, never logs.

A stream that is newer than the request's `before` is left alone: `absent` for a cancel, and `live`
for the rest.
"""


class Bus(ABC):
    """Which process has a stream, and a stop's way there. Safe from any thread.

    A fault of what carries the bus ends no stream and keeps none from starting. Until it is over,
    the stops that other workers are asked for cannot be confirmed.
    """

    name = ""
    """What the log calls it."""

    def __init__(self, receive: Receive, lives: Lives | None = None) -> None:
        """
        Args:
            receive: Does what other processes ask for.
            lives: What this one has; None where it is no worker, and in no listing.
        """
        self._receive = receive
        self._lives = lives

    @abstractmethod
    def start(self) -> None:
        """Joins the other processes. Once per process, after its fork, before anything else.

        Where that fails it is tried again later.

        Raises:
            Busy: The process has no thread or descriptor left.
        """

    @abstractmethod
    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        """Makes a stream findable under its name; the registry has it already.

        A live stream of the session in another process is superseded. A stream that has ended, by
        now or while it waits, supersedes nothing.

        Where there is a `limit`, an owner has so many places, in all processes together, and a live
        stream has one. The place is its session's: who supersedes a stream has its place. One whose
        stream has ended is given back with `release`, or when another stream of the owner needs it,
        whichever is first: so a stream does not count for longer than it lives, and its end costs
        nothing.

        Args:
            claim: The stream's.
            reject: Whether a live stream of the session refuses this one instead.
            limit: Live streams that an owner may have; None for no bound. The same for all claims.

        Returns:
            Whether a cancel for this stream came before it.

        Raises:
            Refused: 409, another process has a live stream of this stream id or, with `reject`, of
                this session. 429, the owner has `limit` live streams. Nothing is claimed.
        """

    def _is_live(self, claim: Claim) -> bool:
        """Whether what is claimed is worth it: else a late claim would end what came after it."""
        return self._receive(Request(Action.PROBE, *claim.name)) is Answer.LIVE

    def _session_is_live(self, owner: str, session_id: str) -> bool:
        """Whether this process has a live stream of the session, and so needs a place for it."""
        return self._receive(Request(Action.PROBE, owner, session_id)) is Answer.LIVE

    @abstractmethod
    def release(self, claim: Claim) -> None:
        """Gives a claimed stream's name back; a newer stream's claim of it stays."""

    def cancel(self, owner: str, session_id: str, stream_id: str | None = None) -> bool:
        """Stops the live stream of these names, wherever it is: here first, then elsewhere.

        Returns:
            Whether this call stopped one. When True, its provider has been told.

        Raises:
            Unconfirmed: The process that has it does not answer.
            BusUnavailable: Which process has it cannot be found out.
        """
        request = Request(Action.CANCEL, owner, session_id, stream_id)
        return self._receive(request) is Answer.STOPPED or self.cancel_elsewhere(request)

    @abstractmethod
    def cancel_elsewhere(self, request: Request) -> bool:
        """Stops the live stream of a cancel's names, after this process was found not to have it.

        Where there is none, a cancel that names a stream is remembered for it: `REMEMBER` seconds,
        `REMEMBER_PER_OWNER` of one owner, and not for a stream that is known to have been. A stream
        that has begun here since that look may be stopped, too.

        Returns:
            Whether this call stopped one. When True, its provider has been told.

        Raises:
            Unconfirmed: The process that has it does not answer.
            BusUnavailable: Which process has it cannot be found out.
        """

    def list(self, owner: str | None = None) -> Listing:
        """What lives, in whichever worker. Waits `PATIENCE` seconds for each page at most.

        Args:
            owner: Whose streams; None for everybody's.

        Raises:
            BusUnavailable: Which workers there are cannot be found out.
        """
        return self._ask_all(Enquiry(owner))

    def cancel_all(self, owner: str | None) -> Listing:
        """Stops every live stream of an owner, in whichever worker. Waits as `list` does.

        All workers are told before the first is waited for. One that does not answer stops what
        lived when it was told, as soon as it wakes.

        Args:
            owner: Whose streams; None for everybody's.

        Returns:
            What this call stopped; their providers have been told.

        Raises:
            BusUnavailable: Which other workers there are cannot be found out. The streams of this
                one have been stopped.
        """
        return self._ask_all(Enquiry(owner, stop=True))

    @abstractmethod
    def check(self) -> None:
        """Looks whether the other processes can be reached now. Waits a second at most.

        Raises:
            BusUnavailable: They cannot.
        """

    def _ask_all(self, enquiry: Enquiry) -> Listing:
        """What all workers say to an enquiry."""
        found: dict[Worker, Found] = {}
        if self._lives is not None:  # first: it needs no bus
            here = self._here()
            found[here] = Found(here, [*self._lives(enquiry)], True)
        asked = dict.fromkeys(self._others(), 0)
        found |= {worker: Found(worker, [], False) for worker in asked}
        # A stop is not cut: it goes on while workers have more.
        while asked and (enquiry.stop or sum(len(each.streams) for each in found.values()) < MOST):
            asked = self._turn(enquiry, asked, found)
        for worker in asked:  # it would go on
            found[worker] = found[worker]._replace(answered=True)
        return Listing([*found.values()], bool(asked))

    def _turn(
        self, enquiry: Enquiry, asked: dict[Worker, int], found: dict[Worker, Found]
    ) -> dict[Worker, int]:
        """Asks each worker for a page, and notes what is `found`. Returns whom to ask for more."""
        pages = self._pages({worker: _next(enquiry, after) for worker, after in asked.items()})
        more = {}
        for worker in asked:
            page = pages.get(worker)
            if page is not None:
                found[worker].streams.extend(page.streams)
                found[worker] = found[worker]._replace(answered=not page.more)
                if page.more:
                    more[worker] = page.streams[-1].number
            elif worker not in pages:  # it has ended, and its streams with it
                del found[worker]
        return more

    @abstractmethod
    def _here(self) -> Worker:
        """This process."""

    @abstractmethod
    def _others(self) -> Iterable[Worker]:
        """The other workers. Raises BusUnavailable."""

    @abstractmethod
    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        """What each of these workers says: None if it is silent, nothing if it has ended.

        Raises:
            BusUnavailable: They cannot be asked.
        """

    def _page(self, enquiry: Enquiry, origin: str, *, awaited: bool = True) -> Page:
        """This process's answer.

        Args:
            enquiry: To what.
            origin: This process.
            awaited: Whether somebody waits for it, who would ask for what does not fit in.
        """
        streams: list[Live] = []
        size = 0
        for live in self._lives(enquiry) if self._lives is not None else ():
            streams.append(live)  # also the one that is too much: it may just have been stopped
            size += len(json.dumps(listed(live)))
            if size > PAGE and (awaited or not enquiry.stop):
                return Page(tuple(streams), True, enquiry.id, origin)
        return Page(tuple(streams), False, enquiry.id, origin)

    @abstractmethod
    def close(self) -> None:
        """Leaves. Idempotent."""


def _next(enquiry: Enquiry, after: int) -> Enquiry:
    """The same enquiry, for a page of its own."""
    return dataclasses.replace(enquiry, after=after, id=uuid.uuid4().hex)


def absent(request: Request) -> Answer:
    """What a process says that has no stream."""
    return Answer.ABSENT
