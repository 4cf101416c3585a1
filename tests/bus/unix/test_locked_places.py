"""locked_places: the places of all workers, as bytes. With real second processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from chatstream.bus.messages import Claim, Name
from chatstream.bus.unix.locked_places import LockedPlaces, base_of, holders, part_of
from chatstream.bus.unix.record_locks import RecordLocks
from tests.bus.unix.conftest import MakePeer

OWNER = "me"

MakeWorker = Callable[[], "Worker"]


class Worker:
    """Another process with places in the same file. All its sessions are live, but for `ended`."""

    def __init__(self, path: Path, make_peer: MakePeer) -> None:
        self.peer = make_peer(
            "from pathlib import Path",
            "from chatstream.bus.messages import Claim, Name",
            "from chatstream.bus.unix.locked_places import LockedPlaces",
            "from chatstream.bus.unix.record_locks import RecordLocks",
            "ended = set()",
            f"locks = RecordLocks(Path({str(path)!r}))",
            "places = LockedPlaces(lambda owner, session: session not in ended)",
            "places.locks_of = lambda owner: locks",
            f"claim = lambda session, number=1: Claim(Name({OWNER!r}, session, session), number)",
        )

    def take(self, session: str, limit: int) -> bool:
        return bool(self.peer.do(f"places.take_everywhere(claim({session!r}), {limit})"))

    def take_spare(self, session: str) -> None:
        self.peer.do(f"places.take_spare(claim({session!r}))")

    def settle(self, session: str) -> bool:
        return bool(self.peer.do(f"places.settle(claim({session!r}))"))

    def leave(self, session: str) -> None:
        self.peer.do(f"ended.add({session!r})")
        self.peer.do(f"places.leave(claim({session!r}))")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "names-0"


@pytest.fixture
def locks(path: Path) -> Iterator[RecordLocks]:
    with contextlib.closing(RecordLocks(path)) as locks:
        yield locks


@pytest.fixture
def ended() -> set[str]:
    """The sessions of this process that are not live."""
    return set()


@pytest.fixture
def places(locks: RecordLocks, ended: set[str]) -> LockedPlaces:
    """This process's."""
    places = LockedPlaces(lambda owner, session: session not in ended)
    places.locks_of = lambda owner: locks
    return places


@pytest.fixture
def worker(path: Path, make_peer: MakePeer) -> MakeWorker:
    return partial(Worker, path, make_peer)


def claim(session: str, number: int = 1, owner: str = OWNER) -> Claim:
    return Claim(Name(owner, session, f"{session}-{number}"), number)


def test_places_are_shared(places: LockedPlaces, worker: MakeWorker) -> None:
    """So many in all processes; another owner has its own."""
    other = worker()
    assert places.take_everywhere(claim("a"), 3)
    assert other.take("b", 3)
    assert places.take_everywhere(claim("c"), 3)
    assert not other.take("d", 3)
    assert not places.take_everywhere(claim("e"), 3)
    assert places.take_everywhere(claim("a", owner="you"), 3)


def test_a_place_in_the_middle_is_found(places: LockedPlaces, worker: MakeWorker) -> None:
    """Whoever has the ones around it."""
    other = worker()
    for number in range(20):
        assert (
            (places.take_everywhere(claim(f"s{number}"), 20))
            if number % 3
            else other.take(f"s{number}", 20)
        )
    assert not places.take_everywhere(claim("a"), 20)
    other.leave("s9")
    assert places.take_everywhere(claim("a"), 20)
    assert not other.take("b", 20)


def test_a_killed_workers_are_free(places: LockedPlaces, worker: MakeWorker) -> None:
    other = worker()
    assert other.take("a", 1)
    assert not places.take_everywhere(claim("b"), 1)
    other.peer.kill()
    assert places.take_everywhere(claim("b"), 1)


def test_a_session_has_one(places: LockedPlaces, worker: MakeWorker, ended: set[str]) -> None:
    """For all its streams here; it is free when the last has left."""
    other = worker()
    assert places.take_everywhere(claim("a", 1), 1)
    assert places.take_everywhere(claim("a", 2), 1)
    places.leave(claim("a", 1))
    assert not other.take("b", 1)
    ended.add("a")
    places.leave(claim("a", 2))
    assert other.take("b", 1)


def test_who_has_ended_gives_way(places: LockedPlaces, worker: MakeWorker, ended: set[str]) -> None:
    """When it is asked to."""
    other = worker()
    places.take_everywhere(claim("a"), 1)
    ended.add("a")
    assert not other.take("b", 1)
    assert places.vacate(OWNER)
    assert other.take("b", 1)
    places.leave(claim("a"))
    assert not places.take_everywhere(claim("c"), 1)


# Spare places


def test_nobody_takes_what_a_spare_place_is_waiting_for(
    places: LockedPlaces, worker: MakeWorker
) -> None:
    """The stream that has it moves to the place that is freed."""
    holder, third = worker(), worker()
    holder.take("a", 1)
    places.take_spare(claim("a", 2))
    assert not places.take_everywhere(claim("a", 2), 1)
    holder.leave("a")
    assert not third.take("b", 1)
    assert places.take_everywhere(claim("a", 2), 1)
    assert not third.take("b", 1)
    places.leave(claim("a", 2), refused=True)
    assert third.take("b", 1)


def test_a_spare_place_counts_while_it_is_kept(
    places: LockedPlaces, worker: MakeWorker, ended: set[str]
) -> None:
    """As one of so many, whatever else is free."""
    hung, third = worker(), worker()
    hung.take("a", 2)
    assert third.take("c", 2)
    places.take_spare(claim("a", 2))
    assert not places.take_everywhere(claim("a", 2), 2)
    assert places.settle(claim("a", 2))
    assert places.take_everywhere(claim("a", 3), 2), "its own session has it"
    hung.leave("a")
    assert not third.take("d", 2)
    third.leave("c")
    assert third.take("d", 2)
    assert not third.take("e", 2)
    places.leave(claim("a", 2))
    ended.add("a")
    places.leave(claim("a", 3))
    assert third.take("e", 2)


def test_a_spare_place_is_nobodys_before_it_is_settled(
    places: LockedPlaces, worker: MakeWorker
) -> None:
    """Not the next stream's of the session either: it may be that it supersedes nothing."""
    holder = worker()
    holder.take("b", 1)
    places.take_spare(claim("a", 1))
    assert not places.take_everywhere(claim("a", 1), 1)
    assert not places.take_everywhere(claim("a", 2), 1)
    assert not places.settle(claim("z"))


def test_a_session_with_a_place_needs_no_spare_one(
    places: LockedPlaces, worker: MakeWorker
) -> None:
    places.take_everywhere(claim("a", 1), 1)
    places.take_spare(claim("a", 2))
    assert places.take_everywhere(claim("a", 2), 1)
    places.leave(claim("a", 1))
    assert not worker().take("b", 1)


# Without the others


def test_without_locks_ones_own_are_counted(places: LockedPlaces, locks: RecordLocks) -> None:
    """To ask for others' is an error, as it is for locks that are closed."""
    places.locks_of = None
    assert places.take(claim("a"), 1)
    assert not places.take(claim("b"), 1)
    with pytest.raises(OSError, match="no directory"):
        places.take_everywhere(claim("c"), 1)
    with pytest.raises(OSError, match="no directory"):
        places.take_spare(claim("c"))
    locks.close()
    places.locks_of = lambda owner: locks
    with pytest.raises(OSError, match="closed"):
        places.take_everywhere(claim("c"), 1)


def test_what_lives_is_counted_in_the_next_directory(
    places: LockedPlaces, worker: MakeWorker
) -> None:
    """Also what had been taken without one, and what is one too many there."""
    other = worker()
    places.take_everywhere(claim("a"), 2)
    locks_of, places.locks_of = places.locks_of, None
    places.take(claim("b"), 2)
    assert locks_of is not None
    assert other.take("c", 2)
    places.move(locks_of)
    assert not other.take("d", 2)
    other.leave("c")
    assert not other.take("d", 2)
    places.leave(claim("a"), refused=True)
    assert other.take("d", 2)


# Where they are


def test_owners_have_bytes_of_their_own() -> None:
    """Below those of names, in one of the files, and wide apart."""
    bases = {base_of(f"{number}") for number in range(2000)}
    assert len(bases) == 2000
    assert all(0 <= base < 1 << 62 and base % (1 << 15) == 0 for base in bases)
    assert {part_of(f"{number}", 16) for number in range(2000)} == set(range(16))
    assert base_of("\ud83d") != base_of("")


def test_who_has_places(places: LockedPlaces, locks: RecordLocks, worker: MakeWorker) -> None:
    """The other processes, of spare ones too."""
    one, other = worker(), worker()
    places.take_everywhere(claim("a"), 5)
    assert holders(locks, OWNER) == set()
    one.take("b", 5)
    other.take_spare("c")
    assert holders(locks, OWNER) == {one.peer.pid, other.peer.pid}
    assert holders(locks, "you") == set()
