"""How many tokens a text is, about. Pure."""

from __future__ import annotations

import math
import re

A_CHARACTER = 0.3

A_WIDE_CHARACTER = 0.6
"""Tokens of a character, and of a Chinese one: what DeepSeek's documentation says of its models.

https://api-docs.deepseek.com/quick_start/token_usage
"""

_WIDE = re.compile("[\u2e80-\U0003ffff]+")


def estimate(text: str) -> int:
    """How many tokens `text` is, about. At least one where there is any."""
    wide = sum(map(len, _WIDE.findall(text)))
    return math.ceil(wide * A_WIDE_CHARACTER + (len(text) - wide) * A_CHARACTER)
