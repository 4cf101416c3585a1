"""openai_chat: what a block is, what an answer says and used, how a failure is put."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.dialects import sse
from chatstream.dialects.base import Kind, Usage
from chatstream.dialects.openai_chat import (
    cancelled,
    classify,
    error_object,
    plain_events,
    prompt_tokens,
    usage_of,
    words,
)
from chatstream.dialects.sse import Splitter
from chatstream.errors import Refused, UpstreamError
from tests.dialects.test_sse import pieces_of

DEEP = b"[" * 200_000
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":%s},"finish_reason":%s}]}\n\n'

CLASSES = {
    # nothing a client would dispatch
    "comment": (b": keep-alive\n\n", Kind.COMMENT),
    "ping": (sse.PING, Kind.COMMENT),
    "blank": (b"\n\n", Kind.COMMENT),
    "comment that looks like data": (b":data: [DONE]\n\n", Kind.COMMENT),
    "event without data": (b"event: error\n\n", Kind.COMMENT),
    "id and retry only": (b"id: 7\nretry: 100\n\n", Kind.COMMENT),
    "unknown field": (b"dat: [DONE]\n\n", Kind.COMMENT),
    "name with a space": (b"data : [DONE]\n\n", Kind.COMMENT),
    # the terminal word
    "done": (b"data: [DONE]\n\n", Kind.DONE),
    "done without space": (b"data:[DONE]\n\n", Kind.DONE),
    "done with spaces": (b"data:  [DONE] \n\n", Kind.DONE),
    "done with CRLF": (b"data: [DONE]\r\n\r\n", Kind.DONE),
    "done with CR": (b"data: [DONE]\r\r", Kind.DONE),
    "done after a comment": (b": bye\ndata: [DONE]\n\n", Kind.DONE),
    "done after a lone LF": (b"\ndata: [DONE]\r\r", Kind.DONE),
    "done in a text": (CHUNK % (b'"[DONE]"', b"null"), Kind.EVENT),
    "done in a second line": (b"data: [DONE]\ndata: x\n\n", Kind.EVENT),
    # finish_reason
    "finish null": (CHUNK % (b'"a"', b"null"), Kind.EVENT),
    "finish stop": (CHUNK % (b'""', b'"stop"'), Kind.FINISH),
    "finish length": (CHUNK % (b"null", b'"length"'), Kind.FINISH),
    "finish empty": (CHUNK % (b'"a"', b'""'), Kind.EVENT),
    "finish with spaces": (b'data: {"choices": [{"finish_reason" : "stop"}]}\n\n', Kind.FINISH),
    "finish of the second choice": (
        b'data: {"choices":[{"finish_reason":null},{"finish_reason":"stop"}]}\n\n',
        Kind.FINISH,
    ),
    "finish over two lines": (
        b'data: {"choices":\r\ndata: [{"finish_reason": "stop"}]}\r\n\r\n',
        Kind.FINISH,
    ),
    "finish quoted in a text": (CHUNK % (rb'"\"finish_reason\": \"stop\""', b"null"), Kind.EVENT),
    "finish in a nested object": (
        b'data: {"choices":[{"delta":{"finish_reason":"stop"},"finish_reason":null}]}\n\n',
        Kind.EVENT,
    ),
    "finish outside choices": (b'data: {"finish_reason":"stop"}\n\n', Kind.EVENT),
    "finish, choices no list": (b'data: {"choices":{"finish_reason":"stop"}}\n\n', Kind.EVENT),
    "finish, choice no object": (b'data: {"choices":["finish_reason" :"stop"]}\n\n', Kind.EVENT),
    "finish, broken JSON": (b'data: {"choices":[{"finish_reason":"stop"}\n\n', Kind.EVENT),
    # the provider's own error
    "error object": (b'data: {"error":{"message":"overloaded"}}\n\n', Kind.ERROR),
    "error text": (b'data: {"error": "overloaded"}\n\n', Kind.ERROR),
    "error with choices": (b'data: {"choices":[],"error":{"code":1}}\n\n', Kind.ERROR),
    "error null": (b'data: {"error":null,"choices":[]}\n\n', Kind.EVENT),
    "error null at the finish": (
        b'data: {"error":null,"choices":[{"finish_reason":"stop"}]}\n\n',
        Kind.FINISH,
    ),
    "error as content": (CHUNK % (b'"error"', b"null"), Kind.EVENT),
    "error as content at the finish": (CHUNK % (b'"error"', b'"stop"'), Kind.FINISH),
    "error deeper down": (b'data: {"choices":[{"error":"x"}]}\n\n', Kind.EVENT),
    "error in a list": (b'data: [{"error":"x"}]\n\n', Kind.EVENT),
    "error event": (b"event: error\ndata: overloaded\n\n", Kind.ERROR),
    "error event without spaces": (b"event:error\rdata:x\r\r", Kind.ERROR),
    "error event, lines of two kinds": (b"data: x\revent: error\n\n", Kind.ERROR),
    "error event named last": (b"data: x\nevent: error\n\n", Kind.ERROR),
    "another event": (b"event: errors\ndata: x\n\n", Kind.EVENT),
    # what is not JSON is an event like any other
    "text": (b"data: hello\n\n", Kind.EVENT),
    "bare data": (b"data\n\n", Kind.EVENT),
    "not UTF-8": (b'data: {"error": "\xff"}\n\n', Kind.EVENT),
    "error in deep nesting": (b'data: {"error":' + DEEP + b"\n\n", Kind.EVENT),
    "finish in deep nesting": (
        b'data: {"finish_reason":"x","choices":' + DEEP + b"\n\n",
        Kind.EVENT,
    ),
}


@pytest.mark.parametrize(("block", "kind"), CLASSES.values(), ids=CLASSES)
def test_classify(block: bytes, kind: Kind) -> None:
    """Each block is what a reader of the standard and of the provider's API would call it."""
    assert kind is classify(block)


def kind_of(block: bytes) -> Kind:
    """What the rules, written out plainly, call a block."""
    lines = [line.partition(b":") for line in re.split(rb"\r\n|\n|\r", block)]
    fields = [(name, value.removeprefix(b" ")) for name, _, value in lines]
    data = [value for name, value in fields if name == b"data"]
    if not data:
        return Kind.COMMENT
    if b"\n".join(data).strip() == b"[DONE]":
        return Kind.DONE
    try:
        value = json.loads(b"\n".join(data))
    except ValueError:
        value = None
    value = value if isinstance(value, dict) else {}
    if value.get("error") or dict(fields).get(b"event") == b"error":
        return Kind.ERROR
    finished = any(choice.get("finish_reason") for choice in value.get("choices", []))
    return Kind.FINISH if finished else Kind.EVENT


ONE_LINE = [
    CHUNK % (b'"a"', b"null"),
    CHUNK % (b'" [DONE] error data: {"', b"null"),
    b": keep-alive\n\n",
    b"data: {}\n\n",
    b'data: {"choices":[{"finish_reason" : ""},{"finish_reason":null}]}\n\n',
]
OTHERS = [
    CHUNK % (b'"error"', b"null"),
    CHUNK % (b'"a"', b'"stop"'),
    b'data: {"choices":[{"finish_reason":\t"stop"},{"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"finish_reason":\ndata: "stop"}]}\n\n',
    b'data: {"error": {"code": 1}}\n\n',
    b"event: error\ndata: {}\n\n",
    b"data: {}\nevent: error\n\n",
    b": a comment\ndata: {}\n\n",
    b"data: [DONE]\n\n",
    b"data: text\n\n",
    b"id: 7\n\n",
    b"\n",
    b"\n\n",
    b"data: {}\r\n\r\n",
    b"data: {}\r\r",
    b"data: {\rdata: }\n\n",
    b"\r",
    sse.BOM,
]
blocks_mostly_plain = st.lists(
    st.sampled_from(ONE_LINE) | st.sampled_from(ONE_LINE) | st.sampled_from(OTHERS), max_size=8
).map(b"".join)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(
    data=blocks_mostly_plain | blocks_mostly_plain.map(sse.BOM.__add__),
    cuts=st.lists(st.integers(0, 600), max_size=4),
)
def test_plain_blocks_are_those_that_feed_returns(data: bytes, cuts: list[int]) -> None:
    """What `plain` takes is what `feed` would return, with none but events and comments in it."""
    quick, slow = Splitter(), Splitter()
    for piece in pieces_of(data, cuts):
        taken, blocks = quick.plain(piece, plain_events), slow.feed(piece)
        kinds = [kind_of(block) for block in blocks]
        if taken is None:
            assert blocks == quick.feed(piece)
        else:
            assert (b"".join(blocks), kinds.count(Kind.EVENT)) == taken
            assert {Kind.EVENT, Kind.COMMENT} >= set(kinds)
        assert quick._buffer == slow._buffer
        assert kinds == [classify(block) for block in blocks]


def begun(max_event: int = sse.MAX_EVENT) -> Splitter:
    """One that has seen how its stream begins."""
    splitter = Splitter(max_event)
    assert splitter.plain(sse.PING, plain_events) is None
    assert splitter.feed(sse.PING) == [sse.PING]
    return splitter


@pytest.mark.parametrize("cut", [0, 1, 9, 70])
def test_plain_takes_what_providers_send(cut: int) -> None:
    """Events of one line and comments go on as one piece, alone or many, however they are cut."""
    splitter, head, event = begun(), b"".join(ONE_LINE), ONE_LINE[0]
    assert splitter.plain(head + event[:cut], plain_events) == (head, 4)
    assert splitter.plain(event[cut:] + event, plain_events) == (event * 2, 2)
    assert splitter.plain(ONE_LINE[2], plain_events) == (ONE_LINE[2], 0)


def test_plain_leaves_an_event_too_long_to_feed() -> None:
    """Where an event may be longer than the bound, each is looked at."""
    splitter = begun(30)
    assert splitter.plain(b"data: {}\n\n" * 3, plain_events) == (b"data: {}\n\n" * 3, 3)
    assert splitter.plain(b"data: {}\n\n" * 3 + b"x", plain_events) is None
    assert splitter.plain(b"data: {%b}\n\n" % (b" " * 21), plain_events) is None
    assert splitter.plain(b"data: {}\n\n" + b"x" * 20, plain_events) == (b"data: {}\n\n", 1)
    assert splitter.plain(b"x\n\n" + b"data: {}\n\n", plain_events) is None


# What it says


def answer(*said: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A chunk whose choices say these things."""
    return {
        "choices": [{"index": number, "delta": each} for number, each in enumerate(said)],
        **more,
    }


@pytest.mark.parametrize(
    ("value", "text", "reasoning", "pieces"),
    [
        (answer({"content": "a"}), "a", "", 1),
        (answer({"reasoning_content": "hm", "content": None}), "", "hm", 1),
        (answer({"reasoning": "hm", "content": "so"}), "so", "hm", 2),
        (answer({"role": "assistant", "content": ""}), "", "", 0),
        (answer({"content": "a"}, {"content": "of another choice"}), "a", "", 1),
        ({"choices": [{"index": 1, "delta": {"content": "of another choice"}}]}, "", "", 0),
        ({"choices": [{"delta": {"content": "no index"}}]}, "no index", "", 1),
        ({"choices": [None, {"delta": None}, {"delta": {"content": 7}}]}, "", "", 0),
        ({"choices": [{"message": {"content": "another form's"}}]}, "", "", 0),
        ({"choices": None}, "", "", 0),
        ({"error": {"message": "x"}}, "", "", 0),
    ],
)
def test_what_an_event_says(value: Any, text: str, reasoning: str, pieces: int) -> None:
    """The first choice's words, and what is thought before them; whatever else is there is none."""
    assert words(value, whole=False) == (text, reasoning, pieces, None, None)


def test_what_an_answer_in_one_piece_says() -> None:
    """Its message; and who said it, and what that took."""
    value = {
        "model": "m",
        "choices": [{"index": 0, "message": {"content": "so", "reasoning_content": "hm"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
    }
    assert words(value, whole=True) == ("so", "hm", 2, "m", Usage(3, 5))
    assert words({"model": 7, "usage": [7]}, whole=True) == ("", "", 0, None, None)


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
    assert expected == usage_of(usage)


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


# What we say in its words


@pytest.mark.parametrize("said", [{"delta": {}}, {"message": {"content": ""}}])
def test_a_stop_as_openai_would_put_it(said: dict[str, Any]) -> None:
    """An answer with a reason why there is no more. Its cost nobody knows, so none is said."""
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": "cancelled"}
    assert cancelled("a kind", "t", "m", 17, said) == {
        "id": "chatcmpl-t",
        "object": "a kind",
        "created": 17,
        "model": "m",
        "choices": [choice],
        "usage": None,
    }


ERRORS = {
    "ours": (Refused("No.", code="conflict", status=409), "invalid_request_error", None),
    "a field": (Refused("No.", code="bad_messages"), "invalid_request_error", "messages"),
    "another field": (Refused("No.", code="bad_stream"), "invalid_request_error", "stream"),
    "nobody": (Refused("No.", code="unauthenticated", status=401), "authentication_error", None),
    "rate": (UpstreamError("No.", code="x", status=429), "rate_limit_error", None),
    "theirs": (UpstreamError("No.", code="x", status=502), "upstream_error", None),
}


@pytest.mark.parametrize(("error", "kind", "param"), ERRORS.values(), ids=ERRORS)
def test_an_error_as_openai_puts_it(error: Any, kind: str, param: str | None) -> None:
    """Four fields, always; the code is ours."""
    told = {"message": "No.", "type": kind, "param": param, "code": error.code}
    assert error_object(error) == {"error": told}
