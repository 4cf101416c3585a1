"""Cause, Phase and Outcome: the values that say how a stream ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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
class Outcome:
    """How one stream ended. Exactly one per stream.

    Attributes:
        cause: Set when `kind` is ABORTED.
        code: The error's code when `kind` is FAILED.
        detail: What more the log may say of that error; not for clients.
        phase: What the stream was doing when it was decided.
        duration: Seconds from the request to the end of the client's body.
        events: Whole SSE events handed to the server; comments do not count. An answer in one
            piece is one.
        bytes: Bytes of the provider handed to the server, its comments included.
        stop_ms: For ABORTED: milliseconds from noticing the stop to the upstream socket's shutdown.
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

    @property
    def words(self) -> str:
        """How the log says it: `completed`, `aborted by <cause>`, `failed: <code>`."""
        if self.cause is not None:
            return f"aborted by {self.cause.words}"
        return f"failed: {self.code}" if self.kind is Kind.FAILED else "completed"
