"""What a request of ours says: its names, its query, its JSON."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

from flask import request
from werkzeug.exceptions import RequestEntityTooLarge

from chatstream.errors import Refused
from chatstream.stream.stream import ID


def session_and_stream(given: Iterable[Any], places: tuple[str, str]) -> tuple[str, str]:
    """The names of a request's session and stream; made up where it gives none.

    Args:
        given: The two, as they are in the request.
        places: Where in it they are.

    Raises:
        Refused: One has not the form of a name.
    """
    session, stream = (named(*pair) for pair in zip(given, places, strict=True))
    return session or uuid.uuid4().hex, stream or uuid.uuid4().hex


def argument(name: str) -> str | None:
    """The query string's. Not werkzeug's `args`: bytes that are no UTF-8 would be a 500."""
    query = parse_qs(request.query_string.decode("latin-1"), keep_blank_values=True)
    return query.get(name, [None])[0]


def named(value: Any, place: str) -> str | None:
    """The name that a request gives at `place`, or None.

    Raises:
        Refused: It has not the form of one.
    """
    if value is not None and not (isinstance(value, str) and ID.fullmatch(value)):
        raise Refused(f"{place} must be 1 to 128 of A-Z a-z 0-9 . _ : -", code="bad_id")
    return value


def json_body(limit: int) -> dict[str, Any]:
    """The request's body, an object of at most `limit` bytes.

    Raises:
        Refused: It is something else, too long, or broke off.
    """
    if request.mimetype != "application/json":
        raise Refused(
            "Send JSON, with Content-Type: application/json.",
            code="unsupported_media_type",
            status=415,
        )
    try:
        body = _DECODER.decode(_bytes_body(limit).decode())
    except (ValueError, RecursionError):
        raise Refused("The body is not JSON (RFC 8259, in UTF-8).", code="bad_json") from None
    if not isinstance(body, dict):
        raise Refused("The body must be a JSON object.", code="bad_json")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # `json.loads` would make one each time


def _bytes_body(limit: int) -> bytes:
    announced = request.content_length or 0
    if announced > limit:
        raise _too_large(limit)
    try:
        # What a hook of the app's has read already, werkzeug has kept.
        data = _read(limit + 1) or request.get_data()
    except RequestEntityTooLarge:  # the app's own MAX_CONTENT_LENGTH
        raise _too_large(limit) from None
    except Exception:  # werkzeug's, the socket's, and each server's own for chunks that are none
        raise _broken_off() from None
    if len(data) > limit:
        raise _too_large(limit)
    if len(data) < announced:
        raise _broken_off()
    return data


def _read(most: int) -> bytes:
    """The body, up to `most` bytes. A single `read` may return less, and more may follow."""
    data = bytearray()
    while len(data) < most and (piece := request.stream.read(most - len(data))):
        data += piece
    return bytes(data)


def _broken_off() -> Refused:
    return Refused("The body broke off.", code="bad_json")


def _too_large(limit: int) -> Refused:
    return Refused(f"The body is longer than {limit} bytes.", code="too_large", status=413)
