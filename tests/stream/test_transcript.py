"""transcript: what a client was sent, as text; and what it cost, or may have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatstream.dialects.base import Usage
from chatstream.dialects.sse import BOM
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
    ("pieces", "text"),
    [
        ([], ""),
        ([event(content="a"), event(content="b")], "ab"),
        ([event(content="a") + event(content="b")], "ab"),
        ([event(content="žluť 🙂\n\n")], "žluť 🙂\n\n"),
        ([b": ping\n\n", event(content="a"), b": c\n\n"], "a"),
        ([event(content="a").replace(b"\n", b"\r\n")], "a"),
        ([event(content="a").replace(b"\n", b"\r")], "a"),
        ([b'data: {"choices":[{"delta":\ndata: {"content":"two lines"}}]}\n\n'], "two lines"),
        ([b"data: [DONE]\n\n"], ""),
        ([b"data: no json\n\n", event(content="a")], "a"),
        ([chunk([]), chunk(None)], ""),
        ([b'event: error\ndata: {"error":{"message":"x"}}\n\n'], ""),
        ([BOM + event(content="a"), event(content="b")], "ab"),
        ([event(content="a"), BOM + event(content="no browser's")], "a"),
        ([event(content="a" * 2 * BATCH), BOM + event(content="no browser's")], "a" * 2 * BATCH),
    ],
)
def test_the_text(pieces: list[bytes], text: str) -> None:
    """The deltas of its events, joined; whatever else comes is no text and no fault."""
    assert text == said(*pieces).text


def test_what_is_thought_aloud_is_kept_apart() -> None:
    pieces = (event(reasoning_content="h"), event(reasoning_content="m"), event(content="so"))
    assert said(*pieces)[:2] == ("so", "hm")


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
