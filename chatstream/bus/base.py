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
import enum
import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REMEMBER = 30.0
"""Seconds that a cancel is kept for a stream that has not started, wherever it then starts."""

REMEMBER_PER_OWNER = 64

PATIENCE = 0.8
"""Seconds that a worker has to reply. A cancel's own answer is promised within one second."""

MOST = 10_000
"""Live streams of a listing, about: then no worker is asked for more."""

PAGE = 48 * 1024
"""Bytes of a page's streams."""

_FORMAT = 1
_LIST, _CANCEL_ALL = "list", "cancel-all"


class Name(NamedTuple):
    """A stream's whole name."""

    owner: str
    session_id: str
    stream_id: str


class Claim(NamedTuple):
    """A stream's name, and which of its process's streams it is.

    Of two streams of a process the one with the higher number is the newer.
    """

    name: Name
    number: int


class Live(NamedTuple):
    """A live stream, as a listing shows it.

    Attributes:
        name: Its whole name.
        number: Which of its process's streams it is.
        phase: What it is doing: a `Phase`'s value.
        seconds: Since it began.
        events: That its client was given.
    """

    name: Name
    number: int
    phase: str
    seconds: float
    events: int


class Worker(NamedTuple):
    """A process that is on the bus.

    Attributes:
        id: What the bus calls it.
        pid: Its number, in its own pid namespace.
        host: The machine's name.
    """

    id: str
    pid: int
    host: str


class Found(NamedTuple):
    """What lives in one worker.

    Attributes:
        worker: Which.
        streams: Its live streams, oldest first; where it has not answered, those known by then.
        answered: Whether it has said all it was asked for in time.
    """

    worker: Worker
    streams: list[Live]
    answered: bool


class Listing(NamedTuple):
    """What lives in all workers.

    Attributes:
        workers: Each worker there is, also those that do not answer.
        cut: Whether there may be more than `MOST`, and the rest was not asked for.
    """

    workers: list[Found]
    cut: bool


class Action(enum.Enum):
    """What a request asks for."""

    CANCEL = "cancel"
    SUPERSEDE = "supersede"
    PROBE = "probe"
    VACATE = "vacate"


class Answer(enum.Enum):
    """What a worker says of the stream that a request names."""

    STOPPED = "stopped"  # by this request, and the provider has been told
    LIVE = "live"
    ABSENT = "absent"


@dataclass(frozen=True)
class Request:
    """Something to do in another process; see the drawing."""

    action: Action
    owner: str
    session_id: str | None = None
    stream_id: str | None = None
    origin: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    before: float | None = None


@dataclass(frozen=True)
class Reply:
    """The answer to the request with the same `id`."""

    answer: Answer
    id: str
    origin: str = ""


@dataclass(frozen=True)
class Enquiry:
    """What lives there? See the drawing.

    Attributes:
        owner: Whose streams; None for everybody's.
        after: Only those with a higher number.
        stop: Whether they are to be aborted, too.
        before: Only those that began before this instant; None for all.
    """

    owner: str | None = None
    after: int = 0
    origin: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    stop: bool = False
    before: float | None = None


@dataclass(frozen=True)
class Page:
    """The answer to the enquiry with the same `id`.

    Attributes:
        streams: In the order of their numbers.
        more: Whether there are others above.
    """

    streams: tuple[Live, ...]
    more: bool
    id: str
    origin: str = ""


Message = Request | Reply | Enquiry | Page

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
        """Stops the live stream of these names, wherever it is.

        Where there is none, a cancel that names a stream is remembered for it: `REMEMBER` seconds,
        `REMEMBER_PER_OWNER` of one owner, and not for a stream that is known to have been.

        Returns:
            Whether this call stopped one. When True, its provider has been told.

        Raises:
            Unconfirmed: The process that has it does not answer.
            BusUnavailable: Which process has it cannot be found out.
        """
        request = Request(Action.CANCEL, owner, session_id, stream_id)
        return self._receive(request) is Answer.STOPPED or self._cancel_elsewhere(request)

    @abstractmethod
    def _cancel_elsewhere(self, request: Request) -> bool:
        """`cancel`, after this process was found not to have it."""

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
            size += len(json.dumps(_listed(live)))
            if size > PAGE and (awaited or not enquiry.stop):
                return Page(tuple(streams), True, enquiry.id, origin)
        return Page(tuple(streams), False, enquiry.id, origin)

    @abstractmethod
    def close(self) -> None:
        """Leaves. Idempotent."""


class Malformed(ValueError):
    """Bytes that are neither a request nor a reply of this format."""


def encode(message: Message) -> bytes:
    """A message as it goes over the wire."""
    fields: dict[str, Any] = {"chatstream": _FORMAT, "id": message.id, "origin": message.origin}
    if isinstance(message, Reply):
        fields["answer"] = message.answer.value
    elif isinstance(message, Page):
        fields |= {"streams": [_listed(live) for live in message.streams], "more": message.more}
    elif isinstance(message, Enquiry):
        fields |= {"action": _CANCEL_ALL if message.stop else _LIST, "owner": message.owner}
        fields |= {"after": message.after, "before": message.before}
    else:
        fields |= {"action": message.action.value, "owner": message.owner}
        fields |= {"session": message.session_id, "stream": message.stream_id}
        fields["before"] = message.before
    return json.dumps(fields).encode()


def decode(data: bytes) -> Message:
    """The message that `data` is.

    Raises:
        Malformed: It is none.
    """
    try:
        fields = json.loads(data, parse_constant=_no_constant)
        if fields["chatstream"] != _FORMAT:
            raise Malformed("another format")
        if "answer" in fields:
            return _reply(fields)
        if "streams" in fields:
            return _page(fields)
        asks = fields["action"] in (_LIST, _CANCEL_ALL)
        return _enquiry(fields) if asks else _request(fields)
    except Malformed:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(type(error).__name__) from None


def _next(enquiry: Enquiry, after: int) -> Enquiry:
    """The same enquiry, for a page of its own."""
    return dataclasses.replace(enquiry, after=after, id=uuid.uuid4().hex)


def _listed(live: Live) -> list[Any]:
    """A stream as it stands in a page."""
    return [*live.name, live.number, live.phase, round(live.seconds, 3), live.events]


def _no_constant(name: str) -> None:
    raise Malformed(f"{name} is not JSON")


def _reply(fields: dict[str, Any]) -> Reply:
    return Reply(Answer(fields["answer"]), _text(fields["id"]), _text(fields["origin"]))


def _request(fields: dict[str, Any]) -> Request:
    return Request(
        Action(fields["action"]),
        _text(fields["owner"]),
        _text_or_none(fields["session"]),
        _text_or_none(fields["stream"]),
        _text(fields["origin"]),
        _text(fields["id"]),
        _number_or_none(fields["before"]),
    )


def _enquiry(fields: dict[str, Any]) -> Enquiry:
    return Enquiry(
        _text_or_none(fields["owner"]),
        _whole(fields["after"]),
        _text(fields["origin"]),
        _text(fields["id"]),
        fields["action"] == _CANCEL_ALL,
        _number_or_none(fields["before"]),
    )


def _page(fields: dict[str, Any]) -> Page:
    streams = tuple(_live(*stream) for stream in fields["streams"])
    return Page(
        streams,
        fields["more"] is True and bool(streams),
        _text(fields["id"]),
        _text(fields["origin"]),
    )


def _live(
    owner: Any, session: Any, stream: Any, number: Any, phase: Any, seconds: Any, events: Any
) -> Live:
    name = Name(_text(owner), _text(session), _text(stream))
    since = _number_or_none(seconds)
    if since is None:
        raise Malformed("a field is not a number")
    return Live(name, _whole(number), _text(phase), since, _whole(events))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Malformed("a field is not a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Malformed("a field is not a text")
    return value


def _number_or_none(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise Malformed("a field is not a number")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def digest(*words: str) -> str:
    """A name for `words` of any content, in 32 hexadecimal digits."""
    text = "\0".join(words).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()
