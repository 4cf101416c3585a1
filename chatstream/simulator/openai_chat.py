"""What an answer says, in the words of OpenAI's chat completions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping

from chatstream.simulator.exchange import Exchange
from chatstream.simulator.plan import Plan
from chatstream.simulator.wire import dump, error_body

_PROSE = """
A stop button is a promise. Whoever presses it has already decided, and everything that happens
afterwards happens against their will. So the first rule is that it works at once: not when the
next word arrives, not when some buffer has been emptied, and not when a timer happens to look. The
second rule is that it works everywhere. A lamp that goes dark on the desk while the engine runs on
in the cellar has not been switched off; it has only been hidden, and the meter keeps counting. The
third rule is that it always works. Pressing it early, before the first word, is no mistake.
Pressing it late, when the last word has just been said, is no mistake either. Pressing it twice
means nothing more than pressing it once, and pressing it by accident costs no more than asking
again.

Good brakes are boring. Nobody praises the lift for halting at the right floor, or the kettle for
falling silent when the water boils, and yet we would notice within a day if they did not. The
naïve design sets a flag and hopes that somebody reads it. The patient design asks who is asleep at
that moment, and what would wake them: a worker waiting for a line that never comes, a socket
nobody reads, a queue in which the order to halt stands politely behind the very work it was meant
to halt. It then wakes them, one after the other, and counts them on the way out.

There is also the matter of honesty. When something has been stopped, say so; when it had already
ended by itself, say that instead. Do not call a broken pipe a failure if you broke it on purpose,
and do not call half an answer an answer. Keep what was said up to that point, because it was paid
for, and hand it back without losing a word — or adding one. Then put everything back where it was:
the thread, the socket, the place in the pool. A button that leaves a little litter behind each
time it is pressed will one day be the reason that nothing moves at all.

Last of all, stay calm under a crowd. One person who stops is an event; a thousand who stop at the
same second are a Tuesday. Each of them deserves the same quick answer, and the thousand and first,
who merely wants to go on reading, should not notice that anything happened. That is all there is
to it, and it is harder than it looks.
"""

STAMP = b"@" + b"0" * 20
"""Takes the place of the instant in a token with `stamp`: nobody knows it before it is sent."""

_CLOSE_EVENT = b'"},"finish_reason":null}]}\n\n'


def _words(text: str) -> list[bytes]:
    """A text's words as JSON has them, each with the space after it. At least one."""
    words = re.findall(r"\s*\S+\s*", text) or [text]
    return [json.dumps(word, ensure_ascii=False)[1:-1].encode() for word in words]


_WORDS = _words(f"{' '.join(_PROSE.split())} ")


class ChatCompletion:
    """What one answer says: as events, or in one piece. Pure, but for the instant it is made at."""

    def __init__(self, plan: Plan, exchange: Exchange, include_usage: bool) -> None:
        self._plan = plan
        self._exchange = exchange
        self._include_usage = include_usage
        self._words = _WORDS if plan.text is None else _words(plan.text)
        self._completion = {
            "id": f"chatcmpl-{exchange.id}",
            "created": int(time.time()),
            "model": _model(exchange.body),
        }
        self._open_event = b'data: %b,"choices":[{"index":0,"delta":{' % dump(self._chunk())[:-1]

    @property
    def period(self) -> int:
        """After how many tokens the text begins again."""
        return len(self._words)

    def token(self, token: int) -> bytes:
        """Returns the event of one token."""
        role = b"" if token else b'"role":"assistant",'
        name = b'"reasoning_content":"' if token < self._plan.reasoning else b'"content":"'
        return b"".join((self._open_event, role, name, self._word(token), _CLOSE_EVENT))

    def last_events(self) -> list[bytes]:
        """Returns what follows the last token of an answer that is finished."""
        events = [self._open_event + b'},"finish_reason":"stop"}]}\n\n']
        if self._include_usage:
            chunk = {**self._chunk(), "choices": [], "usage": self._usage()}
            events.append(b"data: %b\n\n" % dump(chunk))
        if not self._plan.no_done:
            events.append(b"data: [DONE]\n\n")
        return events

    def error_event(self) -> bytes:
        """Returns the event of a failure in mid-answer."""
        return b"data: %b\n\n" % dump(overloaded())

    def completed(self) -> dict[str, object]:
        """Returns the answer in one piece."""
        reasoning = min(self._plan.reasoning, self._exchange.tokens)
        message = {"role": "assistant", "content": self._text(reasoning, self._exchange.tokens)}
        if reasoning:
            message["reasoning_content"] = self._text(0, reasoning)
        reason = "stop" if self._exchange.ending == "finished" else None
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {
            **self._completion,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    def _chunk(self) -> dict[str, object]:
        return {**self._completion, "object": "chat.completion.chunk"}

    def _word(self, token: int) -> bytes:
        word = STAMP if self._plan.stamp else self._words[token % len(self._words)]
        return word + b"x" * self._plan.pad if self._plan.pad else word

    def _text(self, first: int, end: int) -> str:
        text: str = json.loads(b'"%b"' % b"".join(map(self._word, range(first, end))))
        return text

    def _usage(self) -> dict[str, int]:
        prompt, made = len(str(self._exchange.body.get("messages")).split()), self._exchange.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }


def overloaded() -> dict[str, object]:
    """Returns the error of a failure in mid-answer."""
    return error_body(
        "The simulator was told to fail here.", kind="server_error", code="overloaded"
    )


def _model(body: Mapping[str, object]) -> str:
    model = body.get("model")
    return model if isinstance(model, str) else "simulated"
