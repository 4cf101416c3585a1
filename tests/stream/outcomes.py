"""Outcomes that a test makes up."""

from __future__ import annotations

from typing import Any

from chatstream.stream.outcome import Kind, Outcome, Phase


def outcome(**facts: Any) -> Outcome:
    """Of a whole answer, but for these facts."""
    some: dict[str, Any] = {
        "kind": Kind.COMPLETED,
        "session_id": "s",
        "stream_id": "t",
        "owner": "",
        "cause": None,
        "code": None,
        "detail": "",
        "phase": Phase.BODY,
        "duration": 1.0,
        "events": 2,
        "bytes": 30,
        "stop_ms": None,
    }
    return Outcome(**{**some, **facts})
