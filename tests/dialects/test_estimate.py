"""estimate: how many tokens a text is, about."""

from __future__ import annotations

import pytest

from chatstream.dialects.estimate import estimate


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("a" * 10, 3), ("字" * 10, 6), ("ab字", 2), ("é" * 10, 3), ("🙂" * 10, 6)],
)
def test_an_estimate(text: str, tokens: int) -> None:
    """By DeepSeek's figures: 0.3 a character, 0.6 a Chinese one; rounded up."""
    assert tokens == estimate(text)
