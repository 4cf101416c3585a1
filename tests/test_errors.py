"""errors: the tree, and what each error tells a client."""

from __future__ import annotations

import pytest

from chatstream.errors import (
    BusUnavailable,
    Busy,
    ChatStreamError,
    ConfigError,
    Ended,
    Refused,
    StreamAborted,
    StreamError,
    Unconfirmed,
    UpstreamError,
    conflict,
    too_many,
)


@pytest.mark.parametrize("error", [ConfigError, StreamAborted, StreamError])
def test_one_base_catches_all(error: type[Exception]) -> None:
    """A caller can catch everything chatstream raises by its base."""
    assert issubclass(error, ChatStreamError)


def test_our_end_is_no_failure() -> None:
    """What we ended (StreamAborted) is never caught as what went wrong (StreamError)."""
    assert not issubclass(StreamAborted, StreamError)


@pytest.mark.parametrize(
    ("error", "code", "status", "type_", "retry_after"),
    [
        (Refused("x"), "bad_request", 400, "service_error", None),
        (Refused("x", code="conflict", status=409), "conflict", 409, "service_error", None),
        (
            Refused("x", code="too_many_streams", status=429, retry_after="1"),
            "too_many_streams",
            429,
            "service_error",
            "1",
        ),
        (Busy("x"), "busy", 503, "service_error", "1"),
        (Ended("x", code="deadline", status=504), "deadline", 504, "service_error", None),
        (UpstreamError("x"), "upstream_error", 502, "upstream_error", None),
        (
            UpstreamError("x", code="upstream_rate_limited", status=429, retry_after="7"),
            "upstream_rate_limited",
            429,
            "upstream_error",
            "7",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, StreamError) else "",
)
def test_what_an_error_carries(
    error: StreamError, code: str, status: int, type_: str, retry_after: str | None
) -> None:
    """Each error has the code, the status and the type that the wire promises."""
    assert (code, status, type_) == (error.code, error.status, error.type)
    assert retry_after == error.retry_after
    assert "x" == error.message == str(error)
    assert error.detail == ""


@pytest.mark.parametrize(
    ("error", "code", "status", "retry_after"),
    [(Unconfirmed(), "unconfirmed", 504, None), (BusUnavailable(), "bus_unavailable", 503, "1")],
    ids=["Unconfirmed", "BusUnavailable"],
)
def test_what_cannot_be_said_of_another_worker(
    error: StreamError, code: str, status: int, retry_after: str | None
) -> None:
    """Each has its own code and status, a type of ours, and a sentence of its own."""
    assert (code, status, "service_error") == (error.code, error.status, error.type)
    assert retry_after == error.retry_after
    assert error.message.endswith(" Please try again.")


def test_a_conflict_says_what_is_taken() -> None:
    """A streamId and a session are refused alike, a 409, each by a sentence of its own."""
    stream, session = conflict("stream"), conflict("session")
    for refusal in (stream, session):
        assert isinstance(refusal, Refused)
        assert (refusal.code, refusal.status) == ("conflict", 409)
    assert stream.message == "A stream with this streamId is live."
    assert session.message == "This session has a live stream. Cancel it first."


@pytest.mark.parametrize(("limit", "answers"), [(1, "1 answer"), (2, "2 answers")])
def test_too_many_says_what_to_do(limit: int, answers: str) -> None:
    """How many there are, and that one has to end."""
    error = too_many(limit)
    assert str(error) == f"You have {answers} running. Stop one of them first, or wait."
    assert (error.code, error.status, error.retry_after) == ("too_many_streams", 429, "1")
