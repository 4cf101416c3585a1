"""errors: the tree, and what each error tells a client."""

from __future__ import annotations

import pytest

from chatstream.errors import (
    Busy,
    ChatStreamError,
    ConfigError,
    Ended,
    Refused,
    StreamAborted,
    StreamError,
    UpstreamError,
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
