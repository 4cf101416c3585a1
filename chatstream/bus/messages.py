"""What crosses a process boundary: the messages, and how they look on the wire. Pure."""

from __future__ import annotations

import enum
import hashlib
import json
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class Malformed(ValueError):
    """Bytes that are neither a request nor a reply of this format."""


def encode(message: Message) -> bytes:
    """A message as it goes over the wire."""
    fields: dict[str, Any] = {"chatstream": _FORMAT, "id": message.id, "origin": message.origin}
    if isinstance(message, Reply):
        fields["answer"] = message.answer.value
    elif isinstance(message, Page):
        fields |= {"streams": [listed(live) for live in message.streams], "more": message.more}
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


def listed(live: Live) -> list[Any]:
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
