"""early_cancels: as files. Two objects on one folder are two processes here."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatstream.bus.base import REMEMBER, REMEMBER_PER_OWNER
from chatstream.bus.messages import Name
from chatstream.bus.unix.early_cancels import EarlyCancels
from tests.bus.unix.conftest import MakePeer

NAME = Name("me", "s", "t")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "early"


@pytest.fixture
def early(folder: Path) -> EarlyCancels:
    return EarlyCancels(folder)


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The host's clock, in the test's hand."""
    now = [1000.0]
    monkeypatch.setattr("chatstream.bus.unix.early_cancels.monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def links(folder: Path) -> list[Path]:
    """All that is remembered, or has not been swept yet."""
    return [link for owner in folder.iterdir() for link in owner.iterdir()]


def test_nothing_is_remembered_at_first(early: EarlyCancels, folder: Path) -> None:
    """There is a folder, for nobody else to look into, and no cancel in it."""
    assert early.pop(NAME) is False
    early.remove(NAME)
    early.sweep()
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_folder_has_its_place(folder: Path) -> None:
    """The service's directory is there before: here is no place to make it."""
    with pytest.raises(FileNotFoundError):
        EarlyCancels(folder / "none" / "early")
    assert not folder.exists()


def test_nobody_else_looks_into_an_owners_folder(early: EarlyCancels, folder: Path) -> None:
    """0700, whatever the umask."""
    before = os.umask(0)
    try:
        early.add(NAME)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(owner.stat().st_mode) for owner in folder.iterdir()} == {0o700}


def test_a_cancel_is_remembered_once(early: EarlyCancels) -> None:
    """The stream that takes it is born cancelled; the next of the same names lives."""
    early.add(NAME)
    assert early.pop(NAME) is True
    assert early.pop(NAME) is False


def test_another_process_knows_it(folder: Path, make_peer: MakePeer) -> None:
    """What one process adds another one pops, by a clock that is the host's.

    The folder is made once, and what is in it stays.
    """
    EarlyCancels(folder).add(NAME)
    peer = make_peer(
        "from pathlib import Path",
        "from chatstream.bus.messages import Name",
        "from chatstream.bus.unix.early_cancels import EarlyCancels",
        f"early = EarlyCancels(Path({str(folder)!r}))",
    )
    assert peer.do(f"early.pop(Name{tuple(NAME)!r})") is True
    peer.do("early.add(Name('you', 's', 't'))")
    assert EarlyCancels(folder).pop(NAME) is False
    assert EarlyCancels(folder).pop(Name("you", "s", "t")) is True


@pytest.mark.parametrize(
    "other",
    [
        Name("you", "s", "t"),
        Name("me", "s2", "t"),
        Name("me", "s", "t2"),
        Name("me", "t", "s"),
        Name("", "s", "t"),
        Name("mes", "", "t"),
        Name("me", "st", ""),
    ],
)
def test_it_hits_nobody_else(early: EarlyCancels, other: Name) -> None:
    """Owner, session and stream all have to be those of the cancel; the right one still comes."""
    early.add(NAME)
    assert early.pop(other) is False
    early.remove(other)
    assert early.pop(NAME) is True


@pytest.mark.parametrize("owner", ["", ".", "..", "../../etc", "a/b", "\0", "žluť 🙂", "\ud83d"])
@pytest.mark.parametrize("stream", ["..", "t" * 128])
def test_names_are_no_paths(early: EarlyCancels, folder: Path, owner: str, stream: str) -> None:
    """Whatever an owner or a stream is called, it is one link in the folder."""
    name = Name(owner, "s", stream)
    early.add(name)
    assert len(links(folder)) == 1
    assert [folder] == list(folder.parent.iterdir())
    assert early.pop(name) is True


def test_nobodys_name_is_on_the_disk(early: EarlyCancels, folder: Path) -> None:
    """Folders and links have hashes for names."""
    early.add(Name("alice", "secret-session", "secret-stream"))
    (link,) = links(folder)
    assert "alice" not in str(link)
    assert "secret" not in f"{link} {link.readlink()}"


def test_a_removed_cancel_is_forgotten(early: EarlyCancels) -> None:
    """Where it found its stream after all, it is not kept for the next."""
    early.add(NAME)
    early.remove(NAME)
    assert early.pop(NAME) is False
    early.remove(NAME)


# For thirty seconds


@pytest.mark.parametrize(("seconds", "remembered"), [(0, True), (29.9, True), (30.1, False)])
def test_it_is_kept_for_thirty_seconds(
    early: EarlyCancels, pass_time: Callable[[float], None], seconds: float, remembered: bool
) -> None:
    """Remembered for 30 s, and forgotten then, also when nothing has swept it."""
    early.add(NAME)
    pass_time(seconds)
    assert remembered is early.pop(NAME)


def test_a_repeated_cancel_counts_from_the_last(
    early: EarlyCancels, pass_time: Callable[[float], None]
) -> None:
    """A user who presses Stop twice is remembered from the second time."""
    early.add(NAME)
    pass_time(20)
    early.add(NAME)
    pass_time(20)
    assert early.pop(NAME) is True


def test_each_has_its_own_thirty_seconds(
    early: EarlyCancels, pass_time: Callable[[float], None]
) -> None:
    """A later cancel of the same owner neither lengthens nor shortens an earlier one's time."""
    one, two, three = (Name("me", "s", f"t-{n}") for n in range(3))
    early.add(one)
    pass_time(20)
    early.add(two)
    pass_time(15)
    early.add(three)
    assert early.pop(one) is False
    pass_time(16)
    assert early.pop(two) is False
    assert early.pop(three) is True


# As many as there may be


def test_an_owner_has_sixty_four(
    early: EarlyCancels, folder: Path, pass_time: Callable[[float], None]
) -> None:
    """The 65th pushes the owner's oldest out, whatever it is called, and nobody else's."""
    early.add(Name("you", "s", "yours"))
    for n in range(REMEMBER_PER_OWNER + 6):
        pass_time(0.01)
        early.add(Name("me", "s", f"t-{n}"))
    assert len(links(folder)) == 64 + 1
    found = [n for n in range(REMEMBER_PER_OWNER + 6) if early.pop(Name("me", "s", f"t-{n}"))]
    assert found == list(range(6, 70))
    assert early.pop(Name("you", "s", "yours")) is True


def test_the_same_one_many_times_is_one(early: EarlyCancels, folder: Path) -> None:
    """Repeating one cancel does not push another out."""
    early.add(NAME)
    for _ in range(200):
        early.add(Name("me", "s", "again"))
    assert len(links(folder)) == 2
    assert early.pop(NAME) is True


def test_a_repeated_one_is_the_owners_newest(
    early: EarlyCancels, pass_time: Callable[[float], None]
) -> None:
    """Repeated, a cancel is the last to be pushed out."""
    for n in range(REMEMBER_PER_OWNER):
        pass_time(0.01)
        early.add(Name("me", "s", f"t-{n}"))
    pass_time(0.01)
    early.add(Name("me", "s", "t-0"))
    early.add(Name("me", "s", "one more"))
    assert early.pop(Name("me", "s", "t-1")) is False
    assert early.pop(Name("me", "s", "t-0")) is True


# Swept


def test_a_sweep_removes_what_has_expired(
    early: EarlyCancels, folder: Path, pass_time: Callable[[float], None]
) -> None:
    """What nobody came for goes, with the folders of owners that have nothing else; no other."""
    for n in range(5):
        early.add(Name(f"owner-{n}", "s", "t"))
    early.add(NAME)
    pass_time(20)
    early.add(Name("me", "s", "young"))
    pass_time(20)
    early.sweep()
    assert len(links(folder)) == 1
    assert len(list(folder.iterdir())) == 1
    assert early.pop(Name("me", "s", "young")) is True
    early.sweep()
    assert list(folder.iterdir()) == []


def test_an_owner_sweeps_its_own(
    early: EarlyCancels, folder: Path, pass_time: Callable[[float], None]
) -> None:
    """One that cancels for ever, a second apart, keeps only what is young enough."""
    for n in range(100):
        early.add(Name("me", "s", f"t-{n}"))
        pass_time(1.0)
    assert len(links(folder)) == REMEMBER


def test_adding_sweeps_from_time_to_time(
    early: EarlyCancels, folder: Path, pass_time: Callable[[float], None]
) -> None:
    """What many owners left does not wait for the next worker's start or their next cancel."""
    for n in range(5):
        early.add(Name(f"owner-{n}", "s", "t"))
    pass_time(REMEMBER - 0.1)
    early.add(NAME)
    assert len(links(folder)) == 5 + 1
    pass_time(0.2)
    early.add(Name("you", "s", "t"))
    assert len(links(folder)) == 2
    assert len(list(folder.iterdir())) == 2
    assert early.pop(NAME) is True
    assert early.pop(Name("you", "s", "t")) is True


def test_what_is_removed_underneath_is_an_error(early: EarlyCancels, folder: Path) -> None:
    """A cancel that cannot be kept is not taken for kept; where there is none, none is found."""
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        early.add(NAME)
    assert early.pop(NAME) is False
    early.remove(NAME)
    early.sweep()


# At once


def in_threads(*targets: Callable[[], object]) -> None:
    """Runs all, from one instant on. Raises what one has raised."""
    barrier = threading.Barrier(len(targets))

    def run(target: Callable[[], object]) -> None:
        barrier.wait(5)
        target()

    with ThreadPoolExecutor(len(targets)) as pool:
        for future in [pool.submit(run, target) for target in targets]:
            future.result(20)


def test_of_many_that_pop_one_has_it(folder: Path) -> None:
    """A cancel makes one stream be born cancelled, however many begin at once."""
    for _ in range(50):
        EarlyCancels(folder).add(NAME)
        found: list[bool] = []
        in_threads(*[lambda found=found: found.append(EarlyCancels(folder).pop(NAME))] * 4)
        assert sorted(found) == [False, False, False, True]


def test_of_many_that_add_all_are_remembered(folder: Path) -> None:
    """Several workers remember cancels of one owner at once, the same ones and others."""
    names = [Name("me", "s", f"t-{n}") for n in range(REMEMBER_PER_OWNER)]

    def add() -> None:
        for name in names:
            EarlyCancels(folder).add(name)

    in_threads(add, add, add)
    assert all(EarlyCancels(folder).pop(name) for name in names)


def test_a_sweep_takes_nothing_that_is_being_added(folder: Path) -> None:
    """Workers that start sweep, and take a folder away that another is about to use."""
    here, there = EarlyCancels(folder), EarlyCancels(folder)
    lost: list[Name] = []
    done = threading.Event()

    def add() -> None:
        try:
            for name in (Name(f"owner-{n}", "s", "t") for n in range(300)):
                here.add(name)
                if not here.pop(name):
                    lost.append(name)
        finally:
            done.set()

    def sweep() -> None:
        while not done.wait(0.005):
            there.sweep()

    in_threads(add, sweep)
    assert lost == []
