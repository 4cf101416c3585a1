"""What a request may ask for: the keys of its ``simulate``, checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from chatstream.simulator.wire import BODY_LIMIT, BadRequest

SECOND = 1_000_000_000  # ns

_CUTS = ("reset_after", "truncate_after", "error_after")

# What a key takes follows from its annotation in `Plan`. Numbers go from 0 to a million, except:
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str | float": ((str, int, float), "text or a number"),
}

_LIMITS = {"status": (200, 599), "queue_interval": (0.001, 1e6), "split": (1, BODY_LIMIT)}

_HEADER_KEYS = ("retry_after", "content_type", "content_encoding", "location", "set_cookie")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How one answer behaves: the request's ``simulate`` over the server's defaults.

    Times are in seconds.
    """

    id: str | None = None  # the request's name in the figures (else req-N)
    tokens: int = 200  # of the whole answer
    rate: float = 20  # tokens per second; 0: as fast as the socket takes them
    headers_after: float = 0  # until the response headers; tokens are being made meanwhile
    silent_after: int | None = None  # tokens before a silence; others are being made meanwhile
    silent_for: float | None = None  # length of the silence; then the backlog goes out. None: ever
    reasoning: int = 0  # first tokens that come as delta.reasoning_content
    status: int | None = None  # refuse with this status (and `raw`, if set, as the body)
    retry_after: str | float | None = None  # a refusal's Retry-After header
    message: str = "The simulator was told to refuse."  # a refusal's
    reset_after: int | None = None  # tokens, then RST instead of the next; 0: RST before any byte
    truncate_after: int | None = None  # tokens, then a clean end without finish_reason and [DONE]
    no_done: bool = False  # end with finish_reason but without [DONE]
    error_after: int | None = None  # tokens, then an error event and a clean end
    queue: float = 0  # of ": keep-alive" (not streamed: empty lines) before any token is made
    queue_interval: float = 1.0  # between two comments
    chunked: bool = True  # False: a body that ends with the connection
    hold_open: float = 0  # between a stream's last event and the end of its body
    content_type: str | None = None  # these four: response headers
    content_encoding: str | None = None  # (the body stays as it is)
    location: str | None = None
    set_cookie: str | None = None
    raw: str | None = None  # the body, instead of events; U+DC80..U+DCFF stand for the bytes 80..FF
    split: int | None = None  # bytes of `raw` per write; each such piece takes the place of a token
    text: str | None = None  # what it says, a word a token, over and over; None: its own prose
    pad: int = 0  # extra bytes of content per token
    stamp: bool = False  # a token's content is "@" and the ns, 20 digits, at which it was sent

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Plan:
        """Checks keys, types and ranges.

        Raises:
            BadRequest: It names the key and says what it takes.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in fields:
                raise bad_key(key, f"is not known; known are: {', '.join(fields)}")
            kind = str(fields[key].type)
            if value is not None or not kind.endswith(" | None"):
                _check(key, kind.removesuffix(" | None"), value)
        return cls(**values)

    def interval_ns(self) -> float:
        """Returns the time between two tokens, within what an instant can hold."""
        return min(SECOND / self.rate, 1e15) if self.rate else 0

    def pieces(self) -> int:
        """Returns of how many tokens, or pieces of `raw`, the whole answer consists."""
        if self.raw is None:
            return self.tokens
        size = len(raw_bytes(self.raw))
        return math.ceil(size / (self.split or size)) if size else 0

    def ending(self) -> tuple[int, str]:
        """Returns after how many tokens it ends, and how: "finished" or the key that ends it."""
        if self.status is not None:
            return 0, "status"
        whole = (self.pieces(), "finished")
        cuts = [(after, key) for key in _CUTS if (after := getattr(self, key)) is not None]
        return min(*cuts, whole, key=lambda cut: cut[0]) if cuts else whole


def bad_key(key: str, fault: str) -> BadRequest:
    return BadRequest(f"simulate.{key} {fault}", param=f"simulate.{key}")


def _check(key: str, kind: str, value: object) -> None:
    kinds, words = _KINDS[kind]
    # bool is a kind of int in Python, but not in JSON.
    if not isinstance(value, kinds) or isinstance(value, bool) is not (kind == "bool"):
        raise bad_key(key, f"must be {words}")
    if isinstance(value, str):
        _check_text(key, value)
        return
    low, high = _LIMITS.get(key, (0, 1_000_000))
    if isinstance(value, int | float) and not low <= value <= high:
        raise bad_key(key, f"must be from {low:g} to {high:g}")


def _check_text(key: str, value: str) -> None:
    if key in _HEADER_KEYS and not (value.isascii() and value.isprintable()):
        raise bad_key(key, "must be printable ASCII")  # else it could start another header
    try:
        raw_bytes(value)
    except UnicodeEncodeError:
        raise bad_key(key, "has a lone surrogate") from None


def raw_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def ns(seconds: float) -> int:
    return int(seconds * SECOND)


def parse_chat(data: bytes) -> tuple[dict[str, object], dict[str, object]]:
    """Returns the body without ``simulate``, and ``simulate``."""
    try:
        body = json.loads(data)
        # What cannot be written again (NaN, too deep a nest) would spoil the answer to /requests.
        json.dumps([[[[body]]]], allow_nan=False)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    if not isinstance(body.get("stream", False), bool | None):
        raise BadRequest("stream must be true or false.", param="stream")
    values = body.pop("simulate", {})
    if not isinstance(values, dict):
        raise BadRequest("simulate must be an object.", param="simulate")
    return body, values
