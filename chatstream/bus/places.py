"""The places of owners with a limit, as record locks that all workers of a host see.

An owner has a range of bytes of its own, at an offset that is a hash of its name:

    base                     base + limit             base + _SPARE           base + _ROOM
      │ places, one byte each  │ never used             │ spare places          │
      ├──┬──┬──┬──┬──┬─────────┼────────────────────────┼──┬──┬─────────────────┤
      │A │A │  │B │  │ …       │                        │  │C │ …               │
      └──┴──┴──┴──┴──┴─────────┴────────────────────────┴──┴──┴─────────────────┘

A live stream holds a byte, through its worker: the kernel gives it to one, and takes it back from a
worker that is killed. A spare one is for a stream that is about to supersede one in another worker,
and must not find the place that it frees taken by somebody else. So whoever takes a place looks for
spare ones afterwards, and where there are some counts: of the places that are held, both kinds,
there may be no more than the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from chatstream.bus.base import Claim, digest
from chatstream.bus.record_locks import RecordLocks

_ROOM = 1 << 15
"""Bytes of an owner."""

_SPARE = 1 << 14
"""Where its spare places begin: more than a limit may be (`CHATSTREAM_MAX_STREAMS_PER_OWNER`)."""

_TRIES = 100


@dataclass
class _Place:
    """A session's.

    Attributes:
        byte: The one that is held.
        spare: Whether it is a spare one.
        settled: Whether it is the session's, and not only taken to supersede another stream.
        claims: Those of the session's streams that have not been given back.
    """

    byte: int
    spare: bool
    settled: bool = True
    claims: set[Claim] = field(default_factory=set)


class Places:
    """Those that this process has, by owner and session. Not locked; the calls do not block."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, _Place]] = {}
        self._limit = 0

    def __bool__(self) -> bool:
        return bool(self._of)

    def take(self, locks: RecordLocks, claim: Claim, limit: int) -> bool:
        """Gives a claim's session a place, unless it has one. False if all are taken."""
        owner, session_id, _ = claim.name
        self._limit = limit
        place = self._of.get(owner, {}).get(session_id)
        if place is None or place.spare:
            byte = self._take_one(locks, owner, limit, instead=place is not None)
            if byte is not None:
                if place is not None:
                    locks.drop(place.byte)
                place = self._enter(owner, session_id, byte)
        if place is None or not place.settled:
            return False
        place.claims.add(claim)
        return True

    def take_spare(self, locks: RecordLocks, claim: Claim) -> None:
        """Gives a claim's session a spare place, unless it has one."""
        owner, session_id, _ = claim.name
        place = self._of.get(owner, {}).get(session_id)
        if place is None:
            first = base_of(owner) + _SPARE
            byte = self._free(locks, owner, first, _ROOM - _SPARE)
            if byte is None:
                return
            place = self._enter(owner, session_id, byte, spare=True, settled=False)
        place.claims.add(claim)

    def settle(self, claim: Claim) -> bool:
        """Lets a claim's session keep the spare place that it has. Whether it has one."""
        place = self._of.get(claim.name.owner, {}).get(claim.name.session_id)
        if place is not None:
            place.settled = True
        return place is not None

    def leave(self, locks: RecordLocks | None, claim: Claim, *, needed: bool = False) -> None:
        """Has a claim need its place no more. The last one of a session gives it back.

        Args:
            locks: The owner's; None where there are none any more.
            claim: Whose.
            needed: Whether the session is live all the same, and will claim.
        """
        owner, session_id, _ = claim.name
        place = self._of.get(owner, {}).get(session_id)
        if place is not None:
            place.claims.discard(claim)
            if not place.claims and not needed:
                self._give_back(locks, owner, session_id)

    def vacate(
        self, locks: RecordLocks | None, owner: str, is_live: Callable[[str, str], bool]
    ) -> bool:
        """Gives the places of sessions back that are not live. Whether the owner had any."""
        ended = [one for one in self._of.get(owner, ()) if not is_live(owner, one)]
        for session_id in ended:
            self._give_back(locks, owner, session_id)
        return bool(ended)

    def take_again(self, locks_of: Callable[[str], RecordLocks]) -> None:
        """Takes as many places in another directory. What lives counts, whatever is free there."""
        before, self._of = self._of, {}
        for owner, sessions in before.items():
            for session_id, old in sessions.items():
                locks = locks_of(owner)
                byte = self._take_one(locks, owner, self._limit)
                spare = byte is None
                if byte is None:
                    byte = self._free(locks, owner, base_of(owner) + _SPARE, _ROOM - _SPARE)
                if byte is not None:
                    self._enter(owner, session_id, byte, spare=spare).claims |= old.claims

    def clear(self) -> None:
        """Forgets all; the directory has been left."""
        self._of.clear()

    def _take_one(
        self, locks: RecordLocks, owner: str, limit: int, *, instead: bool = False
    ) -> int | None:
        """Takes a place of an owner, maybe `instead` of a spare one. None: all are taken."""
        base = base_of(owner)
        byte = self._free(locks, owner, base, limit)
        if byte is None:
            return None
        # After it was taken: of two that do so at once, one sees the other.
        mine = self._bytes(owner) | {byte}
        spares = _taken(locks, base + _SPARE, _ROOM - _SPARE, mine)
        if spares and not instead and spares + _taken(locks, base, limit, mine) > limit:
            locks.drop(byte)
            return None
        return byte

    def _free(self, locks: RecordLocks, owner: str, first: int, length: int) -> int | None:
        """Takes the first byte that nobody has. None: all are taken."""
        mine = self._bytes(owner)
        for _ in range(_TRIES):  # another worker may be faster
            held = locks.held(first, length)
            byte = next(_gaps(held, mine, first, first + length), None)
            if byte is None or not locks.take(byte):
                return byte
        return None

    def _bytes(self, owner: str) -> set[int]:
        return {place.byte for place in self._of.get(owner, {}).values()}

    def _enter(
        self, owner: str, session_id: str, byte: int, *, spare: bool = False, settled: bool = True
    ) -> _Place:
        sessions = self._of.setdefault(owner, {})
        old = sessions.get(session_id)
        claims = old.claims if old is not None else set()
        sessions[session_id] = _Place(byte, spare, settled, claims)
        return sessions[session_id]

    def _give_back(self, locks: RecordLocks | None, owner: str, session_id: str) -> None:
        place = self._of[owner].pop(session_id)
        if not self._of[owner]:
            del self._of[owner]
        if locks is not None:
            locks.drop(place.byte)


def base_of(owner: str) -> int:
    """Where an owner's bytes begin: below those of names, at 47 bits of a hash."""
    return (int(digest("owner", owner)[:12], 16) >> 1) * _ROOM


def part_of(owner: str, parts: int) -> int:
    """In which of so many files an owner's bytes are."""
    return base_of(owner) // _ROOM % parts


def holders(locks: RecordLocks, owner: str) -> set[int]:
    """The pids of the other workers that have places of an owner."""
    return {pid for pid, _, _ in locks.held(base_of(owner), _ROOM)}


def _taken(locks: RecordLocks, first: int, length: int, mine: set[int]) -> int:
    """How many of these bytes are held, here and elsewhere."""
    here = sum(first <= byte < first + length for byte in mine)
    return here + sum(end - begin for _, begin, end in locks.held(first, length))


def _gaps(held: list[tuple[int, int, int]], mine: set[int], first: int, end: int) -> Iterator[int]:
    """The bytes from `first` to `end` that are neither `held` nor `mine`."""
    at = first
    for _, begin, after in [*sorted(held, key=lambda each: each[1]), (0, end, end)]:
        yield from (byte for byte in range(at, begin) if byte not in mine)
        at = max(at, after)
