"""The bytes of names."""

from __future__ import annotations

from chatstream.bus.messages import Claim, Name, Request, digest

_SLOTS = 4
"""Bytes of a session. A claim takes the first; where a worker that hangs has it, the next one."""


def bytes_of(request: Request) -> list[int]:
    """The bytes of what a request names: a stream of a session, a stream of any, or a session."""
    owner, session_id, stream_id = request.owner, request.session_id, request.stream_id
    if stream_id is None:
        return _session_bytes(owner, session_id or "")
    if session_id is None:
        return [_number("stream", owner, stream_id)]
    return [name_byte(Name(owner, session_id, stream_id))]


def bytes_of_claim(claim: Claim) -> tuple[int, int, list[int]]:
    """Its stream's byte, its whole name's, and its session's."""
    owner, session_id, stream_id = claim.name
    stream = _number("stream", owner, stream_id)
    return stream, name_byte(claim.name), _session_bytes(owner, session_id)


def name_byte(name: Name) -> int:
    return _number("name", *name)


def _session_bytes(owner: str, session_id: str) -> list[int]:
    first = _number("session", owner, session_id)
    return list(range(first, first + _SLOTS))


def _number(*words: str) -> int:
    """A number for a name: 60 bits of a hash, above all pids, with room for slots."""
    return 1 << 62 | int(digest(*words)[:15], 16) << 2
