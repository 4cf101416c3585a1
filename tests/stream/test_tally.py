"""tally: what is counted of an answer whose text nobody wants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.dialects.base import Usage
from chatstream.stream.tally import Tally
from chatstream.stream.transcript import BATCH, Transcript


def event(value: Any, **options: Any) -> bytes:
    return b"data: " + json.dumps(value, **options).encode() + b"\n\n"


def delta(**said: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": said, "finish_reason": None}]}


def both(events: list[bytes], *, whole: bool = False) -> tuple[Usage | None, Usage | None]:
    """What a tally and a transcript come to."""
    found = []
    for kept in (Tally(), Transcript()):
        for each in events:
            kept.add(each)
        found.append(kept.said(asked=True, whole=whole).usage)
    return found[0], found[1]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [event(delta(role="assistant", content=""))],
        [event(delta(content="Hello")), event(delta(content=" world, and all that is in it."))],
        [event(delta(reasoning_content="Hm.")), event(delta(content="Yes."))],
        [event(delta(reasoning="Hm, "))],
        [event(delta(content='a "quoted" word, a \\ and a\nline'))],
        [event(delta(content="你好世界"))],
        [event(delta(content="你好世界"), ensure_ascii=False)],
        [event(delta(content="😀 both 你好"))],
        [event(delta(content='{"content": "not said", "usage": {"completion_tokens": 9}}'))],
        [event(delta(content="a"), separators=(",", ":"))],
        [event(delta(content="x" * 100)) for _ in range(BATCH // 50)],
        [b": keep-alive\n\n", event(delta(content="a")), b"data: [DONE]\n\n"],
        [b"data: no JSON\n\n"],
        [b'data: {"choices": 3, "usage": {\n\n'],
        [event({"usage": None, "choices": []})],
    ],
)
def test_it_counts_as_a_transcript_does(events: list[bytes]) -> None:
    """Where the provider says nothing of usage, both estimate the same."""
    tally, transcript = both(events)
    assert transcript == tally


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=20), st.booleans())
def test_any_text_counts_alike(words: list[str], ascii_only: bool) -> None:
    """Whatever is said, escaped or not."""
    usable = [word for word in words if word.isprintable()]
    tally, transcript = both(
        [event(delta(content=word), ensure_ascii=ascii_only) for word in usable]
    )
    assert tally == transcript


USAGE = {"prompt_tokens": 7, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}


@pytest.mark.parametrize(("whole", "estimated"), [(True, False), (False, True)])
def test_the_providers_word_is_taken(whole: bool, estimated: bool) -> None:
    """The last one it gives, and of an answer that was stopped as an estimate."""
    events = [
        event({**delta(content="a"), "usage": {"prompt_tokens": 7, "completion_tokens": 1}}),
        event({**delta(content="b"), "usage": None}),
        event({"choices": [], "usage": USAGE}),
        b"data: [DONE]\n\n",
    ]
    tally, transcript = both(events, whole=whole)
    assert Usage(7, 12, estimated) == tally == transcript


def test_what_was_not_sent_does_not_count() -> None:
    """As in a transcript: the last bytes can be taken back."""
    tally = Tally()
    tally.add(event(delta(content="sent")))
    last = event(delta(content="never sent " * 20))
    tally.add(last)
    tally.drop(len(last))
    assert Usage(None, 2, estimated=True) == tally.said(asked=True, whole=False).usage


def test_no_words_are_kept() -> None:
    """Nor is anything said of a provider that was not asked."""
    tally = Tally()
    tally.add(event(delta(content="secret")))
    said = tally.said(asked=False, whole=False)
    assert said == (None, None, None, None)
    assert b"secret" not in bytes(tally._pending)
