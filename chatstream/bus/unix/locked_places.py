"""The places of owners that have a limit, as record locks that all workers of a host see.

An owner has a range of bytes of its own, at an offset that is a hash of its name:

    base                     base + limit             base + _SPARE           base + _ROOM
      │ places, one byte each  │ never used             │ spare places          │
      ├──┬──┬──┬──┬──┬─────────┼────────────────────────┼──┬──┬─────────────────┤
      │A │A │  │B │  │ …       │                        │  │C │ …               │
      └──┴──┴──┴──┴──┴─────────┴────────────────────────┴──┴──┴─────────────────┘

A session holds a byte through its worker: the kernel gives it to one, and takes it back from a
worker that is killed. A spare one is for a stream that is about to supersede one in another worker,
and must not find the place that this frees taken by somebody else. So whoever takes a place looks
for spare ones afterwards, and where there are some, counts: of the places that are held, of both
kinds, there may be no more than the limit. Of two that do so at once each may find the other, and
give up; never do both stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from chatstream.bus.messages import Claim, digest
from chatstream.bus.places import Place, Places
from chatstream.bus.unix.record_locks import RecordLocks

_ROOM = 1 << 15
"""Bytes of an owner."""

_SPARE = 1 << 14
"""Where its spare places begin: more than a limit may be (`CHATSTREAM_MAX_STREAMS_PER_OWNER`)."""

_TRIES = 100
"""How often a byte is looked for that another worker has not taken meanwhile."""


class LockedPlaces(Places):
    """This process's places, each of them a byte that it holds. Not locked; never blocks.

    Attributes:
        locks_of: The record locks of an owner's bytes; None while there are none to be had.
    """

    def __init__(self, is_live: Callable[[str, str], bool]) -> None:
        """
        Args:
            is_live: See `Places`.
        """
        super().__init__(is_live)
        self.locks_of: Callable[[str], RecordLocks] | None = None

    def take_everywhere(self, claim: Claim, limit: int) -> bool:
        """As `take`, where all workers are counted, but for sessions of others that have ended.

        A session that is known to be live keeps a spare place if there is no other.

        Raises:
            OSError: The kernel cannot be asked.
        """
        self._limit = limit
        place = self._place_of(claim)
        if place is None or place.spare:
            byte = self._take_byte(claim.name.owner, limit, instead=place is not None)
            if byte is not None:
                self._drop(claim.name.owner, place)
                claims = place.claims if place is not None else set()
                place = self._enter(claim, Place(claims, byte))
        if place is None or not place.settled:
            return False
        place.claims.add(claim)
        return True

    def take_spare(self, claim: Claim) -> None:
        """Gives a claim's session a spare place until it is settled, unless it has one.

        Raises:
            OSError: The kernel cannot be asked.
        """
        place = self._place_of(claim)
        if place is None:
            owner = claim.name.owner
            byte = self._take_free(owner, base_of(owner) + _SPARE, _ROOM - _SPARE)
            if byte is None:
                return
            place = self._enter(claim, Place(byte=byte, spare=True, settled=False))
        place.claims.add(claim)

    def settle(self, claim: Claim) -> bool:
        """Lets a claim's session keep the spare place that it has. Whether it has one."""
        place = self._place_of(claim)
        if place is not None:
            place.settled = True
        return place is not None

    def move(self, locks_of: Callable[[str], RecordLocks]) -> None:
        """Takes as many bytes elsewhere: what lives counts there, too, whatever is free.

        Raises:
            OSError: The kernel cannot be asked.
        """
        self.locks_of = locks_of
        places = [(owner, place) for owner, mine in self._of.items() for place in mine.values()]
        for _, place in places:
            place.byte = None
        for owner, place in places:
            first = base_of(owner)
            place.byte = self._take_free(owner, first, self._limit)
            place.spare = place.byte is None
            if place.spare:
                place.byte = self._take_free(owner, first + _SPARE, _ROOM - _SPARE)

    def clear(self) -> None:
        super().clear()
        self.locks_of = None

    def _take_byte(self, owner: str, limit: int, *, instead: bool) -> int | None:
        """Takes a byte of an owner's, maybe `instead` of a spare one. None: all are taken."""
        base = base_of(owner)
        byte = self._take_free(owner, base, limit)
        if byte is None or instead:
            return byte
        # After it was taken: of two that do so at once, one sees the other.
        mine = {byte, *self._bytes(owner)}
        spare = self._count(owner, base + _SPARE, _ROOM - _SPARE, mine)
        if spare and spare + self._count(owner, base, _SPARE, mine) > limit:
            self._locks(owner).drop(byte)
            return None
        return byte

    def _take_free(self, owner: str, first: int, length: int) -> int | None:
        """Takes the first byte that nobody has. None: all are taken."""
        locks, mine = self._locks(owner), self._bytes(owner)
        for _ in range(_TRIES):
            held = locks.held(first, length)
            byte = next(_gaps(held, mine, first, first + length), None)
            if byte is None or not locks.take(byte):
                return byte
        return None

    def _count(self, owner: str, first: int, length: int, mine: set[int]) -> int:
        """How many of these bytes are held, here and elsewhere."""
        here = sum(first <= byte < first + length for byte in mine)
        held = self._locks(owner).held(first, length)
        return here + sum(end - begin for _, begin, end in held)

    def _bytes(self, owner: str) -> set[int]:
        return {place.byte for place in self._of.get(owner, {}).values() if place.byte is not None}

    def _locks(self, owner: str) -> RecordLocks:
        if self.locks_of is None:
            raise FileNotFoundError("there is no directory")
        return self.locks_of(owner)

    def _remove(self, owner: str, session_id: str) -> Place:
        place = super()._remove(owner, session_id)
        self._drop(owner, place)
        return place

    def _drop(self, owner: str, place: Place | None) -> None:
        if place is not None and place.byte is not None and self.locks_of is not None:
            self.locks_of(owner).drop(place.byte)


def base_of(owner: str) -> int:
    """Where an owner's bytes begin: below those of names, at 47 bits of a hash."""
    return (int(digest("owner", owner)[:12], 16) >> 1) * _ROOM


def part_of(owner: str, parts: int) -> int:
    """In which of so many files an owner's bytes are."""
    return base_of(owner) // _ROOM % parts


def holders(locks: RecordLocks, owner: str) -> set[int]:
    """The pids of the other workers that have places of an owner."""
    return {pid for pid, _, _ in locks.held(base_of(owner), _ROOM)}


def _gaps(held: list[tuple[int, int, int]], mine: set[int], first: int, end: int) -> Iterator[int]:
    """The bytes from `first` to `end` that are neither `held` nor `mine`."""
    at = first
    for _, begin, after in [*sorted(held, key=lambda each: each[1]), (0, end, end)]:
        yield from (byte for byte in range(at, begin) if byte not in mine)
        at = max(at, after)
