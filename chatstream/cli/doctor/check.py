"""Check: one thing that was looked at, and what is to change. Pure."""

from __future__ import annotations

import enum
from typing import NamedTuple


class State(enum.Enum):
    """How it stands."""

    OK = "ok"
    NOTE = "note"  # nothing is wrong; somebody should know
    WARN = "warn"
    FAIL = "fail"


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: What, in a word or two.
        state: How it stands.
        says: A sentence: what is there, and what to change where it is not right. Without secrets.
    """

    name: str
    state: State
    says: str
