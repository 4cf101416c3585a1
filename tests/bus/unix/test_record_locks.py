"""record_locks: numbers that belong to processes. With real second processes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from chatstream.bus.unix.record_locks import RecordLocks
from tests.bus.unix.conftest import MakePeer

LARGEST = 2**63 - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@pytest.fixture
def locks(path: Path) -> Iterator[RecordLocks]:
    """This process's."""
    locks = RecordLocks(path)
    yield locks
    locks.close()


@pytest.fixture
def peer(path: Path, make_peer: MakePeer) -> MakePeer:
    """Makes another process that has the file open, as `locks`."""
    return partial(
        make_peer,
        "import os",
        "from pathlib import Path",
        "from chatstream.bus.unix.record_locks import RecordLocks",
        f"locks = RecordLocks(Path({str(path)!r}))",
    )


# Taken and given back


def test_a_free_number_is_taken(locks: RecordLocks, peer: MakePeer) -> None:
    """0 says that it is this process's now, and every other process knows."""
    other = peer()
    assert other.do("locks.holder(5)") == 0
    assert locks.take(5) == 0
    assert other.do("locks.holder(5)") == os.getpid()


def test_a_held_number_is_refused_with_its_holder(locks: RecordLocks, peer: MakePeer) -> None:
    """At once, by the pid of who has it; nothing changes hands, and neighbours do not meet."""
    other, third = peer(), peer()
    assert other.do("locks.take(5)") == 0
    assert locks.take(5) == other.pid
    assert third.do("locks.take(5)") == other.pid
    assert third.do("locks.holder(5)") == other.pid
    assert (locks.take(4), locks.take(6)) == (0, 0)
    assert (locks.holder(4), locks.holder(5), locks.holder(6)) == (0, other.pid, 0)


def test_a_number_of_ones_own_looks_free(locks: RecordLocks) -> None:
    """Locks are the process's: what it holds it may take again, and `holder` names others only."""
    assert (locks.take(5), locks.take(5)) == (0, 0)
    assert locks.holder(5) == 0


def test_a_dropped_number_is_free(locks: RecordLocks, peer: MakePeer) -> None:
    """Once is enough however often it was taken; its neighbours stay, and what is another's."""
    other = peer()
    for number in (4, 5, 5, 6):
        locks.take(number)
    locks.drop(5)
    assert other.do("locks.take(5)") == 0
    assert other.do("[locks.take(4), locks.take(6)]") == [os.getpid(), os.getpid()]
    locks.drop(5)
    locks.drop(7)
    assert locks.take(5) == other.pid


@pytest.mark.parametrize("number", [0, 2**31, 2**32, 2**62, LARGEST])
def test_numbers_may_be_as_large_as_offsets(
    locks: RecordLocks, peer: MakePeer, number: int
) -> None:
    """From 0 to 2**63 - 1: none is cut to 32 bits, and the file stays empty."""
    other = peer()
    assert locks.take(number) == 0
    assert other.do(f"locks.take({number})") == os.getpid()
    assert other.do(f"locks.take({number ^ 1})") == 0
    assert locks.holder(number ^ 1) == other.pid
    locks.drop(number)
    assert other.do(f"locks.take({number})") == 0


# Several at once


def test_several_are_taken_together(locks: RecordLocks, peer: MakePeer) -> None:
    """`length` numbers from the first on, and not one more."""
    other = peer()
    assert locks.take(10, 3) == 0
    taken = other.do("[locks.take(number) for number in range(9, 14)]")
    assert taken == [0, os.getpid(), os.getpid(), os.getpid(), 0]


def test_several_are_taken_all_or_none(locks: RecordLocks, peer: MakePeer) -> None:
    """One that is another's refuses all, and leaves those before it free; `holder` names it."""
    other, third = peer(), peer()
    other.do("locks.take(12)")
    assert locks.take(10, 5) == other.pid
    assert (locks.holder(10, 5), locks.holder(13, 5)) == (other.pid, 0)
    assert third.do("[locks.take(10), locks.take(11), locks.take(14)]") == [0, 0, 0]


def test_all_at_once(locks: RecordLocks, peer: MakePeer) -> None:
    """Whoever takes everything is alone."""
    other = peer()
    other.do("locks.take(4711)")
    assert locks.take(0, LARGEST) == other.pid
    other.do("locks.drop(4711)")
    assert locks.take(0, LARGEST) == 0
    assert other.do("locks.take(4711)") == os.getpid()


# However it ended


def test_a_killed_process_holds_nothing(locks: RecordLocks, peer: MakePeer) -> None:
    """With SIGKILL it had no time to give anything back, and yet nothing is left of it."""
    other = peer()
    other.do("[locks.take(number) for number in range(100)]")
    assert locks.take(50) == other.pid
    other.kill()
    assert [locks.take(number) for number in range(100)] == [0] * 100


def test_a_process_that_hangs_keeps_what_it_has(locks: RecordLocks, peer: MakePeer) -> None:
    """Stopped, it still is the holder: its stream may go on when it does."""
    other = peer()
    other.do("locks.take(5)")
    other.stop()
    assert locks.take(5) == other.pid
    assert locks.holder(5) == other.pid
    other.go_on()
    other.do("locks.drop(5)")
    assert locks.take(5) == 0


def test_close_drops_all(locks: RecordLocks, peer: MakePeer) -> None:
    """Every number, and a second `close` is nothing."""
    other = peer()
    locks.take(5)
    locks.take(7, 100)
    locks.close()
    locks.close()
    assert other.do("locks.take(0, 200)") == 0


def test_a_child_holds_nothing(locks: RecordLocks, peer: MakePeer) -> None:
    """A fork takes no lock along, and a child that closes the file takes none from its parent."""
    other = peer()
    other.do("locks.take(5)")
    other.do(
        "child = lambda: os._exit(7 if locks.holder(5) != os.getppid() else locks.close() or 0)"
    )
    other.do("run = lambda: os.waitstatus_to_exitcode(os.waitpid(os.fork() or child(), 0)[1])")
    assert other.do("run()") == 0
    assert locks.take(5) == other.pid


# The file


def test_the_file_is_its_owners(path: Path) -> None:
    """Made where it is missing, for nobody else to lock; not handed on to programs."""
    mask = os.umask(0)
    try:
        locks = RecordLocks(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not os.get_inheritable(locks._fd)
    locks.close()


def test_it_is_the_file_while_the_path_leads_to_it(path: Path) -> None:
    """Removed or replaced, the open file is not the one that others lock."""
    locks = RecordLocks(path)
    assert locks.is_the_file()
    path.unlink()
    assert not locks.is_the_file()
    path.touch()
    assert not locks.is_the_file()
    locks.close()


def test_a_link_is_not_followed(path: Path) -> None:
    """Nobody can have another file opened in its place."""
    path.with_name("elsewhere").touch()
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(OSError, match="locks"):
        RecordLocks(path)


@pytest.mark.parametrize(("name", "make"), [("none/locks", True), ("locks", False)])
def test_what_is_missing_is_an_error(tmp_path: Path, name: str, make: bool) -> None:
    """The directory, which says that it has just been removed; a file, for who only looks."""
    with pytest.raises(FileNotFoundError):
        RecordLocks(tmp_path / name, make=make)
    assert list(tmp_path.iterdir()) == []


# What others have


def test_what_others_have_is_listed(locks: RecordLocks, peer: MakePeer) -> None:
    """Each stretch with its holder, cut to what was asked for; what is this process's is not."""
    one, other = peer(), peer()
    for number in (3, 4, 9):
        assert one.do(f"locks.take({number})") == 0
    assert other.do("locks.take(5)") == 0
    assert locks.take(7) == 0
    assert sorted(locks.held(0, 100)) == sorted(
        [(one.pid, 3, 5), (one.pid, 9, 10), (other.pid, 5, 6)]
    )
    assert sorted(locks.held(4, 2)) == sorted([(one.pid, 4, 5), (other.pid, 5, 6)])
    assert locks.held(6, 3) == []
    assert locks.held(10, 5) == []
    one.kill()
    assert locks.held(0, 100) == [(other.pid, 5, 6)]


def test_what_reaches_to_the_end_is_listed(locks: RecordLocks, peer: MakePeer) -> None:
    """A stretch without an end has one where nobody asked for more."""
    one = peer()
    assert one.do(f"locks.take(5, {LARGEST - 5})") == 0
    assert locks.held(0, 20) == [(one.pid, 5, 20)]
    assert one.do("__import__('fcntl').lockf(locks._fd, 2 | 4, 0, 3)") is None
    assert locks.held(0, 20) == [(one.pid, 3, 20)]


def test_nothing_is_listed_of_closed_locks(locks: RecordLocks) -> None:
    locks.close()
    with pytest.raises(OSError, match="closed"):
        locks.held(0, 1)
