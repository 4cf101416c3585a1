"""The forms that OpenAI's clients know an answer in: chunks, and one piece of JSON.

What is different is the form; how it is called, moved and stopped is as with any stream. A stop is
said in both: to these clients an answer without a finish_reason is broken, and an error is a reason
to ask again.
"""

from __future__ import annotations

import json
from time import time
from typing import Any

from chatstream.dialects.base import parsed
from chatstream.dialects.openai_chat import CANCELLED, DONE, error_object
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
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": CANCELLED}
        value = {
            "id": f"chatcmpl-{self.stream_id}",
            "object": kind,
            "created": int(time()),
            "model": self._model,
            "choices": [choice],
            "usage": None,  # nobody knows, and zero would be a fact
        }
        return json.dumps(value).encode()


class ChunkStream(_Completion):
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
    return {} if data[:1] == b"{" and data.rstrip(_SPACE)[-1:] == b"}" else None
