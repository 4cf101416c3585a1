"""Transcript: what a client was sent, as text. Pure; kept only where somebody listens.

    provider's events ──> add ──> pending ──> read, some 16 KB at a time ──> text, reasoning, usage
                                     └─ what the client did not take: dropped

JSON is read in batches: many events in a row cost a few microseconds each, one at a time several
times that. And only what was sent before is read, so what was not can still be dropped.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from chatstream.dialects import sse
from chatstream.dialects.base import Usage, parsed
from chatstream.dialects.estimate import estimate
from chatstream.dialects.openai_chat import words

BATCH = 16 * 1024
"""Bytes of events that wait to be read."""


class Said(NamedTuple):
    """What a transcript comes to.

    Attributes:
        text: The answer's text, of the first choice; None where it is not kept (`Tally`).
        reasoning: What the model thought aloud before it.
        model: Who answered, as the provider says; None if it does not.
        usage: See `Outcome`.
    """

    text: str | None
    reasoning: str | None
    model: str | None
    usage: Usage | None


class Transcript:
    """What one client was sent. Owner thread only: whoever moves its stream."""

    def __init__(self, prompt_tokens: int | None = None, *, whole: bool = False) -> None:
        """
        Args:
            prompt_tokens: What was asked, as far as that can be estimated.
            whole: Whether the answer is one piece of JSON, not events.
        """
        self._prompt_tokens = prompt_tokens
        self._whole = whole
        self._pending = bytearray()
        self._splitter = sse.Splitter()
        self._text = io.StringIO()
        self._reasoning = io.StringIO()
        self._deltas = 0
        self._model: str | None = None
        self._reported: Usage | None = None

    def add(self, data: bytes) -> None:
        """Whole events, or a whole answer, are about to be sent. All that came before was."""
        if len(self._pending) >= BATCH:
            self._read()
        self._pending += data

    def drop(self, count: int) -> None:
        """The last `count` bytes of what was added last were not sent."""
        if count > 0:
            del self._pending[-count:]

    def said(self, *, asked: bool, whole: bool) -> Said:
        """What it comes to.

        Args:
            asked: Whether the provider got the request; else nothing was used.
            whole: Whether the provider has said all it had to.
        """
        self._read()
        text, reasoning = _joined(self._text.getvalue()), _joined(self._reasoning.getvalue())
        estimated = estimate(text) + estimate(reasoning)
        usage = self._usage(estimated, whole) if asked else None
        return Said(text, reasoning, self._model and _joined(self._model), usage)

    def _usage(self, estimated: int, whole: bool) -> Usage:
        """The provider's figures, or what can be made of what is known."""
        reported = self._reported
        if reported is not None:
            return reported if whole else reported._replace(estimated=True)
        tokens = None  # a model that has said nothing may have thought for long
        if self._deltas:
            tokens = max(self._deltas, estimated)
        return Usage(self._prompt_tokens, tokens, estimated=True)

    def _read(self) -> None:
        data = bytes(self._pending)
        self._pending.clear()
        if self._whole:
            self._note(parsed(data))
            return
        for block in self._splitter.feed(data):
            value, _ = sse.fields(block)
            if value is not None:
                self._note(parsed(value))

    def _note(self, value: Any) -> None:
        """One event's JSON, or the whole answer's."""
        if not isinstance(value, dict):
            return
        text, reasoning, pieces, model, usage = words(value, whole=self._whole)
        self._text.write(text)
        self._reasoning.write(reasoning)
        self._deltas += pieces
        if self._model is None:
            self._model = model
        if usage is not None:
            self._reported = usage


def _joined(text: str) -> str:
    """Text that can be encoded.

    JSON may have the halves of a surrogate pair in two events (RFC 8259, section 8.2); a browser
    joins them, and shows a half that stays alone as U+FFFD.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
