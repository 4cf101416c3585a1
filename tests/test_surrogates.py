"""transcript: what a provider cuts in the middle of a character can be kept, in any database."""

from __future__ import annotations

import json

import pytest

from chatstream.transcript import Said, Transcript


def said(*contents: str) -> Said:
    """What deltas come to that are written as JSON in ASCII: with surrogates where need be."""
    transcript = Transcript()
    for content in contents:
        delta = {"content": content, "reasoning_content": content}
        value = {"model": content, "choices": [{"index": 0, "delta": delta}]}
        transcript.add(b"data: %b\n\n" % json.dumps(value).encode())
    return transcript.said(asked=True, whole=True)


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        (["a\ud83d", "\ude42b"], "a🙂b"),
        (["a\ud83d"], "a\ufffd"),
        (["\ude42b"], "\ufffdb"),
        (["\ud83d", "a", "\ude42"], "\ufffda\ufffd"),
        (["\ud83d", "\ud83d\ude42"], "\ufffd🙂"),
        (["žluť ", "🙂", "\ufeff\x00"], "žluť 🙂\ufeff\x00"),
    ],
)
def test_halves_of_a_character(contents: list[str], text: str) -> None:
    """Joined where they meet, U+FFFD where one stays alone: as a browser shows it."""
    got = said(*contents)
    assert (got.text, got.reasoning) == (text, text)
    assert str(got.model).encode()
