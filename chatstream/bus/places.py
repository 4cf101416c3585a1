"""The places of owners that have a limit, as far as one process has them.

A place is a session's, not a stream's: who supersedes a stream of this process has its place. One
whose session is not live any more is given back when its stream is released or when another needs
it, whichever is first. So the end of a stream costs nothing, and frees its place at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from chatstream.bus.messages import Claim


@dataclass
class Place:
    """A session's.

    Attributes:
        claims: Those of the session's streams that have not been given back.
        byte: What other processes know it by; None where they do not.
        spare: Whether that is a spare one; see `chatstream.bus.unix.locked_places`.
        settled: Whether it is the session's, and not only taken to supersede another stream.
    """

    claims: set[Claim] = field(default_factory=set)
    byte: int | None = None
    spare: bool = False
    settled: bool = True


class Places:
    """Places by owner and session. Not locked; never blocks."""

    def __init__(self, is_live: Callable[[str, str], bool]) -> None:
        """
        Args:
            is_live: Whether this process has a live stream of an owner's session.
        """
        self._is_live = is_live
        self._of: dict[str, dict[str, Place]] = {}
        self._limit = 0  # the last one

    def __bool__(self) -> bool:
        return bool(self._of)

    def take(self, claim: Claim, limit: int) -> bool:
        """Gives a claim's session a place, unless it has one. False if `limit` others have theirs.

        Only those of this process are counted.
        """
        self._limit = limit
        if self._place_of(claim) is None and len(self._of.get(claim.name.owner, ())) >= limit:
            self.vacate(claim.name.owner)
            if len(self._of.get(claim.name.owner, ())) >= limit:
                return False
        self.note(claim)
        return True

    def note(self, claim: Claim) -> None:
        """Gives a claim's session a place; it has been counted elsewhere."""
        (self._place_of(claim) or self._enter(claim, Place())).claims.add(claim)

    def has(self, claim: Claim) -> bool:
        """Whether a claim's session has a place that is its own."""
        place = self._place_of(claim)
        return place is not None and place.settled

    def leave(self, claim: Claim, *, refused: bool = False) -> None:
        """Has a claim need its place no more. The last one of a session gives it back.

        Args:
            claim: Whose.
            refused: Whether it has not become one; else its session may be live in another stream,
                that has yet to claim.
        """
        owner, session_id, _ = claim.name
        place = self._place_of(claim)
        if place is not None:
            place.claims.discard(claim)
            if not place.claims and (refused or not self._is_live(owner, session_id)):
                self._remove(owner, session_id)

    def vacate(self, owner: str) -> bool:
        """Gives back the places of an owner's sessions that are not live. Whether it had any."""
        ended = [one for one in self._of.get(owner, ()) if not self._is_live(owner, one)]
        for session_id in ended:
            self._remove(owner, session_id)
        return bool(ended)

    def clear(self) -> None:
        """Forgets all."""
        self._of.clear()

    def _place_of(self, claim: Claim) -> Place | None:
        return self._of.get(claim.name.owner, {}).get(claim.name.session_id)

    def _enter(self, claim: Claim, place: Place) -> Place:
        self._of.setdefault(claim.name.owner, {})[claim.name.session_id] = place
        return place

    def _remove(self, owner: str, session_id: str) -> Place:
        place = self._of[owner].pop(session_id)
        if not self._of[owner]:
            del self._of[owner]
        return place
