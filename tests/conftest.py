"""What all tests share: waiting for conditions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

Value = TypeVar("Value")

PATIENCE = float(os.environ.get("CHATSTREAM_TEST_PATIENCE", "10"))
"""Seconds that a condition may take to come true. Slow machines raise it; it delays no test."""


def eventually(condition: Callable[[], Value], what: str = "", patience: float = PATIENCE) -> Value:
    """The condition's first true value. Fails when there is none within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {patience} s: {what or condition}; last seen: {value!r}")
        time.sleep(0.005)
    return value
