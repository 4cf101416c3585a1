"""cli.answer: events to text. Tables."""

from __future__ import annotations

import json

import pytest

from chatstream.cli.answer import Piece, Reader
from chatstream.dialects import sse


def event(**delta: object) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode()


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (event(content="a"), [Piece("a")]),
        (event(content="a") + event(content="b"), [Piece("a"), Piece("b")]),
        (event(reasoning_content="hm"), [Piece("hm", True)]),
        (event(reasoning_content="hm", content="a"), [Piece("hm", True), Piece("a")]),
        (event(role="assistant", content=""), []),
        (event(content=None, reasoning_content=None), []),
        (b": ping\n\n", []),
        (b"data: [DONE]\n\n", []),
        (b"data: no json\n\n", []),
        (b"data: " + b"[" * 100_000 + b"\n\n", []),
        (b'data: {"choices": []}\n\n', []),
        (b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n', []),
        (b'data: {"choices": [7]}\n\n', []),
        (b'data: {"choices": {"delta": {}}}\n\n', []),
        (b'data: {"choices": [{"delta": {"content": 7}}]}\n\n', []),
        (
            b'data: {"choices":\ndata: [{"delta": {"content": "two lines"}}]}\n\n',
            [Piece("two lines")],
        ),
    ],
)
def test_what_an_event_says(data: bytes, pieces: list[Piece]) -> None:
    """Text and reasoning; of what is none of these, nothing."""
    reader = Reader()
    assert reader.feed(data) == pieces
    assert reader.error == ""


def test_events_are_put_together() -> None:
    """Wherever they are cut."""
    data = event(content="ž") + event(content="b")
    for cut in range(len(data)):
        reader = Reader()
        assert reader.feed(data[:cut]) + reader.feed(data[cut:]) == [Piece("ž"), Piece("b")]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (sse.error_event("The provider is tired.", "x", "y"), "The provider is tired."),
        (b'data: {"error": "tired"}\n\n', "tired"),
        (b'data: {"error": {"code": 7}}\n\n', "The provider failed."),
        (b'data: {"error": null}\n\n', ""),
    ],
)
def test_an_error_is_kept(data: bytes, error: str) -> None:
    """The service's own, and the provider's."""
    reader = Reader()
    assert reader.feed(data) == []
    assert reader.error == error
