"""Events to text: what a provider's answer says to a person. Pure: no I/O, no threads."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from chatstream.dialects import sse


class Piece(NamedTuple):
    """Some more of an answer.

    Attributes:
        text: What was said.
        reasoning: Whether it was thought aloud, and is not the answer itself.
    """

    text: str
    reasoning: bool = False


class Reader:
    """Reads one answer, event by event, in the form of OpenAI's chat API.

    Attributes:
        error: What an error event said, or "".
    """

    def __init__(self) -> None:
        self.error = ""
        self._splitter = sse.Splitter()

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces in the events that `data` completes."""
        pieces: list[Piece] = []
        for block in self._splitter.feed(data):
            pieces += self._read(block)
        return pieces

    def _read(self, block: bytes) -> list[Piece]:
        data, _ = sse.fields(block)
        try:
            value = json.loads(data or b"null")
        except (ValueError, RecursionError):  # [DONE], or nothing that we know
            return []
        error = _member(value, "error")
        if error:
            said = _member(error, "message") if isinstance(error, dict) else error
            self.error = said if isinstance(said, str) and said else "The provider failed."
        choices = _member(value, "choices")
        delta = _member(choices[0], "delta") if isinstance(choices, list) and choices else None
        thought, said = _member(delta, "reasoning_content"), _member(delta, "content")
        pieces = [Piece(thought, True)] if isinstance(thought, str) and thought else []
        return [*pieces, Piece(said)] if isinstance(said, str) and said else pieces


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
