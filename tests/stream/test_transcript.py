"""transcript: what a client was sent, as text; and what it cost, or may have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatstream.dialects.base import Usage
from chatstream.dialects.estimate import estimate
from chatstream.dialects.openai_chat import prompt_tokens
from chatstream.stream.transcript import BATCH, Said, Transcript


def event(**delta: Any) -> bytes:
    """A chunk of an answer."""
    return chunk({"choices": [{"index": 0, "delta": delta}]})


def chunk(value: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(value, ensure_ascii=False).encode()


def said(*pieces: bytes, asked: bool = True, whole: bool = False, **options: Any) -> Said:
    """What a transcript of these comes to."""
    transcript = Transcript(**options)
    for piece in pieces:
        transcript.add(piece)
    return transcript.said(asked=asked, whole=whole)


@pytest.mark.parametrize(
    ("pieces", "text", "reasoning"),
    [
        ([], "", ""),
        ([event(content="a")], "a", ""),
        ([event(content="a"), event(content="b")], "ab", ""),
        ([event(content="a") + event(content="b")], "ab", ""),
        ([event(reasoning_content="hm", content=None), event(content="so")], "so", "hm"),
        ([event(reasoning="hm")], "", "hm"),
        ([event(role="assistant", content="")], "", ""),
        ([event(content="žluť 🙂\n\n")], "žluť 🙂\n\n", ""),
        ([b": ping\n\n", event(content="a"), b": c\n\n"], "a", ""),
        ([event(content="a").replace(b"\n", b"\r\n")], "a", ""),
        ([event(content="a").replace(b"\n", b"\r")], "a", ""),
        ([b'data: {"choices":[{"delta":\ndata: {"content":"two lines"}}]}\n\n'], "two lines", ""),
        ([chunk({"choices": [{"index": 1, "delta": {"content": "other"}}]})], "", ""),
        ([chunk({"choices": [{"delta": {"content": "no index"}}]})], "no index", ""),
        ([b"data: [DONE]\n\n"], "", ""),
        ([b"data: no json\n\n", event(content="a")], "a", ""),
        ([b'event: error\ndata: {"error":{"message":"x"}}\n\n'], "", ""),
        ([chunk({"choices": [None, {"delta": None}, {"delta": {"content": 7}}]})], "", ""),
        ([chunk({"choices": None}), chunk([]), chunk(None)], "", ""),
    ],
)
def test_the_text(pieces: list[bytes], text: str, reasoning: str) -> None:
    """The first choice's deltas, joined; whatever else comes is no text and no fault."""
    assert (text, reasoning) == said(*pieces)[:2]


@pytest.mark.parametrize("events", [1, 50, 1000])
def test_however_much_of_it_there_is(events: int) -> None:
    """Batches lose nothing, and what has been read takes no room."""
    transcript, most = Transcript(), 0
    for number in range(events):
        transcript.add(event(content=f"{number} "))
        most = max(most, len(transcript._pending))
    assert transcript.said(asked=True, whole=True).text == "".join(f"{n} " for n in range(events))
    assert most <= BATCH + len(event(content="999 "))


@pytest.mark.parametrize(
    ("unsent", "text"),
    [(0, "abc"), (1, "ab"), (len(event(content="c")), "ab"), (len(event(content="c")) + 1, "a")],
)
def test_what_was_not_sent_is_not_in_it(unsent: int, text: str) -> None:
    """An event of which a byte is missing was not seen; those before it were."""
    transcript = Transcript()
    transcript.add(event(content="a"))
    transcript.add(event(content="b") + event(content="c"))
    transcript.drop(unsent)
    assert text == transcript.said(asked=True, whole=False).text


def test_a_batch_leaves_what_may_yet_be_dropped() -> None:
    """Of much that was just added nothing is read: all of it may turn out unsent."""
    transcript = Transcript()
    transcript.add(event(content="a"))
    long = event(content="x" * 2 * BATCH)
    transcript.add(long)
    transcript.drop(len(long))
    assert transcript.said(asked=True, whole=False).text == "a"


WHOLE = {
    "model": "m",
    "choices": [{"index": 0, "message": {"content": "so", "reasoning_content": "hm"}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 5},
}


def test_an_answer_in_one_piece() -> None:
    """Its message, its usage; of one that was cut off, nothing."""
    answer = json.dumps(WHOLE).encode()
    transcript = Transcript(whole=True)
    transcript.add(answer)
    expected = Said("so", "hm", "m", Usage(3, 5))
    assert expected == transcript.said(asked=True, whole=True)
    transcript = Transcript(9, whole=True)
    transcript.add(answer)
    transcript.drop(1)
    expected = Said("", "", None, Usage(9, None, estimated=True))
    assert expected == transcript.said(asked=True, whole=False)


REPORT = chunk({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}})


def test_the_providers_usage() -> None:
    """Its word holds for an answer that is whole; of a stopped one it is an estimate by then."""
    pieces = (event(content="a"), REPORT)
    assert said(*pieces, whole=True).usage == Usage(11, 7, estimated=False)
    assert said(*pieces, whole=False).usage == Usage(11, 7, estimated=True)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({}, Usage(None, None)),
        ({"prompt_tokens": True, "completion_tokens": -1}, Usage(None, None)),
        ({"prompt_tokens": "3", "completion_tokens": 0}, Usage(None, 0)),
        ({"prompt_tokens": 2**53, "completion_tokens": 10**400}, Usage(2**53, None)),
    ],
)
def test_a_usage_that_is_none(usage: Any, expected: Usage) -> None:
    """What is no number of tokens is not taken for one."""
    assert expected == said(chunk({"usage": usage}), whole=True).usage


def test_a_stopped_answers_usage_is_an_estimate() -> None:
    """Case 41: never zero-as-fact. Of what has said nothing, nobody knows what it has thought."""
    assert said(prompt_tokens=4).usage == Usage(4, None, estimated=True)
    assert said(event(role="assistant", content=""), prompt_tokens=4).usage == Usage(4, None, True)
    assert said(event(content="a" * 100)).usage == Usage(None, 30, estimated=True)
    assert said(event(content="a" * 50, reasoning="b" * 50)).usage == Usage(None, 30, True)
    assert said(*[event(content="a")] * 9).usage == Usage(None, 9, True), "an event is a token"


def test_nobody_who_was_not_asked_used_anything() -> None:
    """A stop before the request was sent cost nothing: there is no usage at all."""
    assert said(prompt_tokens=4, asked=False).usage is None


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("a" * 10, 3), ("字" * 10, 6), ("ab字", 2), ("é" * 10, 3), ("🙂" * 10, 6)],
)
def test_an_estimate(text: str, tokens: int) -> None:
    """By DeepSeek's figures: 0.3 a character, 0.6 a Chinese one; rounded up."""
    assert tokens == estimate(text)


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        ({"messages": [{"role": "user", "content": "a" * 10}]}, 3),
        ({"messages": [{"content": "a" * 10}, {"content": "a" * 10}]}, 6),
        ({"messages": [{"content": [{"type": "text", "text": "a" * 10}, {"image_url": "x"}]}]}, 3),
        ({"messages": [{"content": None}, {}]}, 0),
        ({"messages": "no"}, None),
        ([], None),
    ],
)
def test_a_prompts_tokens(request_: Any, tokens: int | None) -> None:
    """The text of its messages; None where there is nothing to be read."""
    assert tokens == prompt_tokens(json.dumps(request_).encode())
    assert prompt_tokens(b"no json") is None


# Halves of a character


def chunk_of(content: str) -> bytes:
    """A chunk as JSON in ASCII: with surrogates where need be."""
    delta = {"content": content, "reasoning_content": content}
    value = {"model": content, "choices": [{"index": 0, "delta": delta}]}
    return b"data: %b\n\n" % json.dumps(value).encode()


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
    """Joined where they meet, U+FFFD where one stays alone: as a browser shows it.

    So that it can be kept, in any database.
    """
    got = said(*(chunk_of(content) for content in contents))
    assert (got.text, got.reasoning) == (text, text)
    assert str(got.model).encode()
