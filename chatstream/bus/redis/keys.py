"""What keys and values are called."""

from __future__ import annotations

from chatstream.bus.messages import Claim, digest


class Keys:
    """The keys of a service, and those of one of its workers. They are drawn in `redis_bus`."""

    def __init__(self, prefix: str, worker: str) -> None:
        """
        Args:
            prefix: What all keys begin with; a service's own.
            worker: What this worker is called.
        """
        self._prefix = prefix
        self.worker = worker
        self.since = f"{prefix}:since"
        self.workers = f"{prefix}:workers"

    def of(self, kind: str, *words: str) -> str:
        """The key of something whose name has these words, of any content."""
        return f"{self._prefix}:{kind}:{digest(*words)}"

    def of_worker(self, worker: str) -> str:
        return f"{self._prefix}:worker:{worker}"

    def mail_of(self, worker: str) -> str:
        return f"{self._prefix}:mail:{worker}"

    def of_claim(self, claim: Claim, *, places: bool) -> tuple[list[str], list[str]]:
        """A claim's keys, its owner's places among them if they are counted, and two values."""
        (owner, session_id, stream_id), number = claim
        keys = [
            self.of("session", owner, session_id),
            self.of("stream", owner, stream_id),
            self.of("early", owner),
        ]
        if places:
            keys.append(self.of("places", owner))
        mine = f"{self.worker} {number}"
        return keys, [f"{mine} {stream_id}", f"{mine} {session_id}"]


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
