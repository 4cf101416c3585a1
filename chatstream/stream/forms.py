"""The forms of an answer: events, and for OpenAI's clients chunks or one piece of JSON.

What is different is the form; how it is called, moved and stopped is as with any stream. A stop is
said in both of OpenAI's: to these clients an answer without a finish_reason is broken, and an error
is a reason to ask again.
"""

from __future__ import annotations

import json
from time import time
from typing import Any

from chatstream.dialects import base, openai_chat, sse
from chatstream.dialects.base import parsed
from chatstream.dialects.openai_chat import DONE, error_object
from chatstream.errors import ProviderEvent, UpstreamError, not_whole
from chatstream.stream.stream import Stream

MAX_ANSWER = 16 * 1024 * 1024
"""Longest answer, in bytes: all of it is gathered before any of it goes on."""

EXAMINED = 64 * 1024
"""Longest answer, in bytes, that is parsed to see that it is whole.

On our workers the thread that moves all streams does that, and it takes up to 40 ms a MB. Of a
longer one, which is no error, the framing has checked the length, and the braces are looked at.
"""

_SPACE = b" \t\r\n"
"""JSON's (RFC 8259, section 2)."""


_SLICE = 4096
"""Bytes that are looked at event by event, where not all events are plain ones."""

_COMMENT, _EVENT = base.Kind.COMMENT, base.Kind.EVENT


class EventStream(Stream):
    """One provider call that is answered in events: those that the provider sends, as it does."""

    media_type = sse.MEDIA_TYPE
    ping = sse.PING

    def __init__(self, session_id: str, stream_id: str, owner: str = "") -> None:
        super().__init__(session_id, stream_id, owner)
        self._splitter = sse.Splitter()

    def feed(self, data: bytes) -> bytes:
        """The whole events that `data` completes, for the client. May end the stream."""
        out, events = self._splitter.plain(data, openai_chat.plain_events) or self._examined(data)
        if self._verdict is not None and self.cause is not None:
            return b""
        self._passed(out, events)
        return out

    def _examined(self, data: bytes) -> tuple[bytes, int]:
        """The whole events that `data` completes, up to a terminal one, and how many they are.

        In slices, so that only the events around one that needs a closer look get it too.
        """
        out: list[bytes] = []
        events = 0
        for start in range(0, len(data), _SLICE):
            piece = data[start : start + _SLICE]
            plain = (
                self._splitter.plain(piece, openai_chat.plain_events) if piece is not data else None
            )
            some, count = plain or self._classified(piece)
            out.append(some)
            events += count
            if self._verdict is not None:
                break
        return b"".join(out), events

    def _classified(self, data: bytes) -> tuple[bytes, int]:
        """Like `_examined`, block by block."""
        blocks = self._splitter.feed(data)
        events = 0
        for number, block in enumerate(blocks, 1):
            kind = openai_chat.classify(block)
            if kind is not _COMMENT:
                events += 1
                if kind is not _EVENT and self._terminal(kind):
                    blocks = [*blocks[: number - 1], self.without_key(block)]
                    break
        if self._splitter.overflow:
            self.fail(
                UpstreamError(
                    f"The provider sent an event of more than {sse.MAX_EVENT} bytes.",
                    code="event_too_large",
                )
            )
        return b"".join(blocks), events

    def _terminal(self, kind: base.Kind) -> bool:
        """What a block that is more than an event means; whether it is the last one."""
        if kind is base.Kind.DONE:
            self.complete()
        elif kind is base.Kind.ERROR:
            self.fail(ProviderEvent("The provider reported an error."))
        else:
            self._finish_reason = True
        return kind is not base.Kind.FINISH

    def eof(self) -> bytes:
        """The provider's body has ended. Returns as `feed` does: b""."""
        if self._finish_reason:
            self.complete()
        else:
            self.fail(not_whole())
        return b""

    def last_words(self) -> bytes:
        """What is left to say when it has ended: an error event, or nothing."""
        error = self.error
        if error is None or isinstance(error, ProviderEvent):
            return b""
        return sse.error_event(error.message, error.code, error.type)


class _Completion(Stream):
    """One provider call in a form of OpenAI's."""

    def __init__(
        self, session_id: str, stream_id: str, owner: str = "", *, model: str = ""
    ) -> None:
        """
        Args:
            session_id: See `Stream`.
            stream_id: See `Stream`.
            owner: See `Stream`.
            model: Who was to answer, for what is said of a stop.
        """
        super().__init__(session_id, stream_id, owner)
        self._model = model

    def _cancelled(self, kind: str, said: dict[str, Any]) -> bytes:
        """An answer of ours: a stop, and what was `said` before it."""
        value = openai_chat.cancelled(kind, self.stream_id, self._model, int(time()), said)
        return json.dumps(value).encode()


class ChunkStream(_Completion, EventStream):
    """One provider call that is answered in events, OpenAI's chunks."""

    def last_words(self) -> bytes:
        """An error event; for a stop the chunk that says so, and OpenAI's last event.

        That event alone where the provider has said why there is no more.
        """
        if self.error is not None or self.cause is None:
            return super().last_words()
        if self._finish_reason:
            return DONE
        chunk = self._cancelled("chat.completion.chunk", {"delta": {}})
        return b"data: %b\n\n%b" % (chunk, DONE)


class WholeStream(_Completion):
    """One provider call that is answered in one piece.

    The provider's bytes are gathered, and handed out when they are whole. Until then newlines are
    the sign of life, on both sides: JSON allows them before it begins.
    """

    media_type = "application/json"
    ping = b"\n"

    def __init__(
        self, session_id: str, stream_id: str, owner: str = "", *, model: str = ""
    ) -> None:
        """
        Args:
            session_id: See `Stream`.
            stream_id: See `Stream`.
            owner: See `Stream`.
            model: See `_Completion`.
        """
        super().__init__(session_id, stream_id, owner, model=model)
        self._gathered = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Keeps `data`. Returns b"": nothing is whole before the end. May end the stream."""
        self._gathered += data if self._gathered else data.lstrip(_SPACE)
        if len(self._gathered) > MAX_ANSWER:
            self._gathered.clear()
            self.fail(
                UpstreamError(
                    f"The provider's answer is longer than {MAX_ANSWER} bytes.",
                    code="answer_too_large",
                )
            )
        return b""

    def eof(self) -> bytes:
        """The provider's body has ended. Returns it, if it is a whole answer."""
        answer = bytes(self._gathered)
        value = _outline(answer) if len(answer) > EXAMINED else parsed(answer)
        if value is None:
            self.fail(not_whole())
        elif not isinstance(value, dict):
            self.fail(
                UpstreamError(
                    "The provider answered with something else than a JSON object.",
                    code="upstream_not_json",
                )
            )
        elif value.get("error"):
            self.fail(ProviderEvent("The provider reported an error."))
        elif self.complete():
            self._gathered.clear()
            self._passed(answer, 1)
            return answer
        return b""

    def last_words(self) -> bytes:
        """The whole answer of a stream that has none of the provider's: always JSON.

        An error, the provider's own or ours; for a stop an answer in which nothing is said.
        """
        error = self.error
        if isinstance(error, ProviderEvent):
            return self.without_key(bytes(self._gathered))
        if error is not None:
            return json.dumps(error_object(error)).encode()
        if self.cause is None:
            return b""
        message = {"role": "assistant", "content": ""}
        return self._cancelled("chat.completion", {"message": message})


def _outline(data: bytes) -> dict[str, Any] | None:
    """The same of a long answer, as far as it is seen from without."""
    begins = data[:4].removeprefix(sse.BOM).startswith(b"{")
    return {} if begins and data.rstrip(_SPACE)[-1:] == b"}" else None
