"""Cause, Phase and Outcome: the values that say how a stream ended. And how it started."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from chatstream.dialects.base import Usage


class Cause(enum.Enum):
    """Why a stream was aborted. The first recorded cause wins."""

    CLIENT = "client"  # the client's connection went away
    CANCEL = "cancel"  # the cancel endpoint
    SUPERSEDED = "superseded"  # the session asked again
    SHUTDOWN = "shutdown"  # the worker is going away
    STALLED = "stalled"  # the client takes no bytes
    DEADLINE = "deadline"  # CHATSTREAM_STREAM_DEADLINE

    @property
    def words(self) -> str:
        """How the log says it: `aborted by <words>`."""
        return "client/cancel" if self in (Cause.CLIENT, Cause.CANCEL) else self.value


class Phase(enum.Enum):
    """What a stream was doing, for the log and for figures."""

    NEW = "new"
    CONNECTING = "connecting"
    HEADERS = "headers"
    BODY = "body"
    SENDING = "sending"


class Kind(enum.Enum):
    """The three ways a stream can end."""

    COMPLETED = "completed"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True)
class Started:
    """A stream that was started. See `Outcome` for what they are."""

    session_id: str
    stream_id: str
    owner: str


@dataclass(frozen=True)
class Cancelled:
    """What became of one cancel.

    Attributes:
        session_id: The chat that was to be stopped; None for all of the owner's.
        stream_id: The stream it named, if it did.
        owner: Whose; None for everybody's.
        answer: "stopped", "not_found", "unconfirmed" or "bus_unavailable"; "failed" for a fault of
            ours.
        seconds: Until it had its answer.
    """

    session_id: str | None
    stream_id: str | None
    owner: str | None
    answer: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How one stream ended. Exactly one per stream.

    Attributes:
        session_id: The chat.
        stream_id: This one answer.
        owner: Whose it is, as `identify` said.
        cause: Set when `kind` is ABORTED.
        code: The error's code when `kind` is FAILED.
        detail: What more the log may say of that error; not for clients.
        phase: What the stream was doing when it was decided.
        duration: Seconds from the request to the end of the client's body.
        events: Whole SSE events handed to the server; comments do not count. An answer in one
            piece is one.
        bytes: Bytes of the provider handed to the server, its comments included.
        stop_ms: For ABORTED: milliseconds from noticing the stop to the upstream socket's shutdown.
        time_to_headers: Seconds from the request to the provider's headers; None without any.
        time_to_first_event: Seconds from the request to the first event; None without any.
        text: What the client was sent of the answer, as text: the events that its connection took
            whole. None where nobody listened when the stream began.
        reasoning: The same of what the model thought aloud.
        model: Who answered, as the provider says. As `text`.
        usage: Tokens. None where the provider was not asked, and as `text`.
        client_left: Whether the client was gone before the end, and the stream went on without it
            (CHATSTREAM_ON_DISCONNECT=finish). Then `text` is all that the provider sent.
    """

    kind: Kind
    session_id: str
    stream_id: str
    owner: str
    cause: Cause | None
    code: str | None
    detail: str
    phase: Phase
    duration: float
    events: int
    bytes: int
    stop_ms: float | None
    time_to_headers: float | None = None
    time_to_first_event: float | None = None
    text: str | None = None
    reasoning: str | None = None
    model: str | None = None
    usage: Usage | None = None
    client_left: bool = False

    @property
    def facts(self) -> dict[str, object]:
        """What the log says, for whoever writes it otherwise: nothing of what people wrote."""
        facts: dict[str, object] = {
            "session_id": self.session_id,
            "stream_id": self.stream_id,
            "kind": self.kind.value,
            "cause": self.cause and self.cause.value,
            "code": self.code,
            "detail": self.detail or None,
            "phase": self.phase.value,
            "events": self.events,
            "bytes": self.bytes,
            "duration": round(self.duration, 6),
            "stop_ms": self.stop_ms and round(self.stop_ms, 3),
            "client_left": self.client_left or None,
        }
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def words(self) -> str:
        """How the log says it: `completed`, `aborted by <cause>`, `failed: <code>`."""
        if self.cause is not None:
            return f"aborted by {self.cause.words}"
        return f"failed: {self.code}" if self.kind is Kind.FAILED else "completed"
