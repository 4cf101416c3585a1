"""outcome: the values that say how a stream ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from chatstream.stream.outcome import Cause, Kind
from tests.stream.outcomes import outcome

STOPPED = outcome(kind=Kind.ABORTED, cause=Cause.CANCEL, stop_ms=0.1)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause.CLIENT, "client/cancel"),
        (Cause.CANCEL, "client/cancel"),
        (Cause.SUPERSEDED, "superseded"),
        (Cause.SHUTDOWN, "shutdown"),
        (Cause.STALLED, "stalled"),
        (Cause.DEADLINE, "deadline"),
    ],
)
def test_the_words_of_a_cause(cause: Cause, words: str) -> None:
    """A client's close and a cancel share the log's literal text; the others have their own."""
    assert words == cause.words


def test_every_cause_is_in_the_table_above() -> None:
    """A new cause has to choose its words: there are six."""
    assert {"client", "cancel", "superseded", "shutdown", "stalled", "deadline"} == {
        cause.value for cause in Cause
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "aborted by client/cancel"),
        ({"cause": Cause.SHUTDOWN}, "aborted by shutdown"),
        ({"kind": Kind.FAILED, "cause": None, "code": "busy"}, "failed: busy"),
        ({"kind": Kind.COMPLETED, "cause": None}, "completed"),
    ],
)
def test_the_words_of_an_outcome(changes: dict[str, Any], words: str) -> None:
    """Those of the log's terminal line."""
    assert words == dataclasses.replace(STOPPED, **changes).words


def test_an_outcome_cannot_be_changed() -> None:
    """An outcome is a value: nothing overwrites how a stream ended."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        STOPPED.cause = Cause.CLIENT  # type: ignore[misc]
    assert dataclasses.replace(STOPPED) == STOPPED


def test_a_stop_that_took_no_time_has_its_figure() -> None:
    """Zero is a figure; what is not known is left out."""
    assert outcome(stop_ms=0.0).facts["stop_ms"] == 0.0
    assert "stop_ms" not in outcome(stop_ms=None).facts
