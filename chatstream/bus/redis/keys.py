"""What keys and values are called."""

from __future__ import annotations

from chatstream.bus.messages import Claim, digest


def place_of(claim: Claim) -> str:
    """Its session's field among the owner's places."""
    return digest(claim.name.owner, claim.name.session_id)


def worker_of(value: bytes) -> str:
    return value.split(b" ", 1)[0].decode()


def contest_id(claim: Claim) -> str:
    return f"contest-{claim.number}"


def name_of(value: bytes) -> str:
    """The stream id in a session's value."""
    return value.decode().split(" ", 2)[2]


def ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
