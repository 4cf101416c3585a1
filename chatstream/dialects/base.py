"""What every dialect has to know: what a block is to the relay, and what was used."""

from __future__ import annotations

import enum
import json
from typing import Any, NamedTuple


def parsed(data: bytes) -> Any:
    """What `data` says, or None: nothing that is whole."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class Usage(NamedTuple):
    """Tokens of one call to the provider.

    A provider says at the end of its answer what was used, so of a stopped one nobody knows.

    Attributes:
        prompt_tokens: Of what was asked; None if that is not known.
        completion_tokens: Of the answer, its reasoning included; None if that is not known: of
            a provider that had not said a word when it was stopped.
        estimated: Whether it is our estimate, made of what was sent, and not the provider's word.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    estimated: bool = False


Words = tuple[str, str, int, str | None, Usage | None]
"""What one piece of an answer says. Nothing with names: one is made of every event.

Text; what the model thinks aloud before it; in how many pieces these came; who answers; what the
provider says was used.
"""


class Kind(enum.Enum):
    """What a block is to the relay."""

    COMMENT = "comment"  # nothing a client would dispatch: comments, blank lines, bare fields
    EVENT = "event"
    FINISH = "finish"  # an event whose choice has a finish_reason
    DONE = "done"  # data: [DONE]
    ERROR = "error"  # the provider's own {"error": ...}
