"""directory: the private directory of a service. With real processes for the other workers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatstream.bus.unix import directory
from chatstream.bus.unix.directory import (
    LONGEST,
    NAMES,
    Directory,
    VisitedDirectory,
    check_base,
    check_writable,
    default_base,
    gunicorn_service,
    living,
    service_directory,
)
from chatstream.bus.unix.record_locks import RecordLocks
from chatstream.errors import ConfigError
from tests.bus.peer import Peer
from tests.bus.unix.conftest import MakePeer
from tests.conftest import descriptors, eventually

Enter = Callable[..., Directory]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The directory of a service; nothing is there yet."""
    return service_directory(tmp_path, "7", "a1")


@pytest.fixture
def short_base() -> Iterator[Path]:
    """A base that is not too long, wherever the tests run."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="é") as folder:
        yield Path(folder)


@pytest.fixture
def enter(path: Path) -> Iterator[Enter]:
    """This process enters `path`, or another. A test that leaves a file open fails."""
    before = descriptors()
    entered: list[Directory] = []

    def enter(where: Path = path) -> Directory:
        entered.append(Directory(where))
        return entered[-1]

    yield enter
    for one in entered:
        with contextlib.suppress(OSError):  # the test had it leave
            one.leave()
    assert descriptors() <= before


@pytest.fixture
def peer(path: Path, make_peer: MakePeer) -> MakePeer:
    """Makes a process that knows the directory's path; `d = Directory(path)` enters."""
    return partial(
        make_peer,
        "import os",
        "from pathlib import Path",
        "from chatstream.bus.unix.directory import Directory",
        f"path = Path({str(path)!r})",
        "touch = lambda d: os.close(os.open(d.socket_of(os.getpid()), os.O_CREAT))",
    )


def worker(peer: MakePeer) -> Peer:
    """A process that is in, with a socket (here a file) of its own."""
    one = peer()
    one.do("d = Directory(path)")
    one.do("touch(d)")
    return one


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def sockets(path: Path) -> set[int]:
    """The pids that have something in the directory."""
    return {int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who enters gives up soon."""
    monkeypatch.setattr(directory, "_ENTER", 0.05)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long this process has waited, each time that it had to."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(directory, "time", SimpleNamespace(sleep=sleep))
    return waits


# Entering


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_it_is_made_for_its_user_only(path: Path, enter: Enter, mask: int) -> None:
    """0700, the user's directory and the service's in it, whatever the umask."""
    before = os.umask(mask)
    try:
        enter()
    finally:
        os.umask(before)
    assert (mode(path.parent), mode(path)) == (0o700, 0o700)
    assert {mode(entry) for entry in path.iterdir() if not entry.is_symlink()} == {0o600}


def test_names_are_spread_over_files(enter: Enter, peer: MakePeer) -> None:
    """Each process has all of them open, and two processes' are the same in the same order."""
    other = worker(peer)
    us = enter()
    assert len(us.names) == NAMES
    for part, names in enumerate(us.names):
        names.take(part)
    held = other.do("[names.holder(part) for part, names in enumerate(d.names)]")
    assert held == [os.getpid()] * NAMES
    assert other.do(f"[names.holder({NAMES}) for names in d.names]") == [0] * NAMES
    us.leave()
    assert other.do("[names.holder(part) for part, names in enumerate(d.names)]") == [0] * NAMES


def test_its_name_has_the_users_the_services_and_the_apps(tmp_path: Path) -> None:
    """Two users do not meet, nor do two services of one user, nor two apps of one service."""
    path = service_directory(tmp_path, "7", "a1")
    assert path == tmp_path / f"chatstream-{os.geteuid()}" / "7-a1"


def test_the_base_is_not_made(tmp_path: Path, enter: Enter, soon: None) -> None:
    """A base that is not there is an error of whoever set it; the error names it."""
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/none is not there"):
        enter(service_directory(tmp_path / "none", "7", "a1"))
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_there_is_entered(path: Path, enter: Enter, peer: MakePeer) -> None:
    """The second worker meets the first one: each sees that the other's pid is held.

    That is also its socket's name.
    """
    other = worker(peer)
    us = enter()
    assert us.path == path
    assert us.socket_of(other.pid) == str(path / str(other.pid))
    assert us.locks.holder(other.pid) == other.pid
    assert other.do(f"d.locks.holder({os.getpid()})") == os.getpid()


@pytest.mark.parametrize("open_mode", [0o701, 0o710, 0o750, 0o755, 0o777])
@pytest.mark.parametrize("whose", ["user", "service"])
def test_one_that_others_may_enter_is_refused(
    path: Path, enter: Enter, open_mode: int, whose: str
) -> None:
    """Who may enter could stop streams: it is not made private, since it may be in use."""
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    wrong = path.parent if whose == "user" else path
    wrong.chmod(open_mode)
    with pytest.raises(PermissionError, match="not a directory that only this user can enter"):
        enter()
    assert open_mode == mode(wrong)
    wrong.chmod(0o700)
    assert enter().path == path


def test_one_of_another_user_is_refused(
    path: Path, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that somebody else made, in a place where everybody may."""
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    somebody = os.geteuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: somebody)
        with pytest.raises(PermissionError, match=str(path.parent)):
            enter()
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "file"])
@pytest.mark.parametrize("whose", ["user", "service"])
def test_what_is_no_directory_is_refused(
    path: Path, enter: Enter, tmp_path: Path, kind: str, whose: str
) -> None:
    """Nor is a link followed to a directory elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    wrong = path.parent if whose == "user" else path
    wrong.parent.mkdir(exist_ok=True, mode=0o700)
    if kind == "link":
        wrong.symlink_to(elsewhere)
    else:
        wrong.touch(mode=0o600)
    with pytest.raises(OSError, match=str(wrong)):
        enter()
    assert list(elsewhere.iterdir()) == []


def test_a_killed_workers_pid_can_come_again(path: Path, enter: Enter, peer: MakePeer) -> None:
    """What an earlier process with this pid has left keeps nobody out."""
    worker(peer).kill()
    (path / str(os.getpid())).touch()
    us = enter()
    assert us.path == path
    us.sweep()
    assert (path / str(os.getpid())).exists()


# Leaving


def test_the_last_one_removes_it(path: Path, enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is in it; the user's directory stays.

    In one step: nobody can enter what is half removed, since by then it has lost its name.
    """
    seen: list[tuple[bool, bool]] = []

    def rmtree(remains: Path, ignore_errors: bool = False) -> None:
        seen.append((path.exists(), (remains / "locks").exists()))
        real(remains, ignore_errors)

    real = shutil.rmtree
    monkeypatch.setattr(directory, "shutil", SimpleNamespace(rmtree=rmtree))
    us = enter()
    (path / str(os.getpid())).touch()
    (path / "early" / "owner").mkdir(parents=True)
    (path / "early" / "owner" / "link").symlink_to("1.0")
    us.leave()
    assert seen == [(False, True)]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("hangs", [False, True])
def test_one_that_is_not_the_last_takes_its_own_away(
    path: Path, enter: Enter, peer: MakePeer, hangs: bool
) -> None:
    """The others' sockets and the locks stay, and its pid is free. One that hangs is still in."""
    other = worker(peer)
    us = enter()
    (path / str(os.getpid())).touch()
    if hangs:
        other.stop()
    us.leave()
    assert sockets(path) == {other.pid}
    assert (path / "locks").exists()
    other.go_on()
    assert other.do("d.locks.is_the_file()") is True
    assert other.do(f"d.locks.holder({os.getpid()})") == 0
    other.do("d.leave()")
    assert not path.exists()


def test_of_two_that_leave_at_once_one_is_the_last(
    path: Path, enter: Enter, peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first finds the other one in, the other leaves before it is out: nothing stays behind."""
    other, us = worker(peer), enter()

    def remove_if_last(where: Path, locks: RecordLocks) -> None:
        real(where, locks)
        assert path.exists()
        other.do("d.leave()")

    real = directory._remove_if_last
    monkeypatch.setattr(directory, "_remove_if_last", remove_if_last)
    us.leave()
    assert list(path.parent.iterdir()) == []


def test_who_leaves_last_removes_no_new_one(
    path: Path, enter: Enter, peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one was the last, and a third has entered since: that one's directory stays."""
    other, third, us = worker(peer), peer(), enter()

    def remove_if_last(where: Path, locks: RecordLocks) -> None:
        other.do("d.leave()")
        third.do("d = Directory(path)")
        real(where, locks)

    real = directory._remove_if_last
    monkeypatch.setattr(directory, "_remove_if_last", remove_if_last)
    us.leave()
    assert third.do("d.is_there()") is True


def test_it_is_there_while_others_enter_it(path: Path, enter: Enter, peer: MakePeer) -> None:
    """Removed underneath it is not, nor when another worker has made a new one.

    Who leaves then takes nothing of the new one away.
    """
    us = enter()
    assert us.is_there()
    shutil.rmtree(path)
    assert not us.is_there()
    other = worker(peer)
    (path / str(os.getpid())).touch()
    assert not us.is_there()
    us.leave()
    assert sockets(path) == {other.pid, os.getpid()}
    assert other.do("d.is_there()") is True


def test_who_was_removed_enters_again(path: Path, enter: Enter, peer: MakePeer) -> None:
    """Before it leaves, or after: the old locks are another file's and drop none of the new."""
    old = enter()
    shutil.rmtree(path)
    new = enter()
    new.names[3].take(5)
    old.leave()
    assert new.is_there()
    other = worker(peer)
    assert other.do(f"d.locks.holder({os.getpid()})") == os.getpid()
    assert other.do("d.names[3].take(5)") == os.getpid()


# Entering while the last one removes it


def test_who_enters_while_it_is_removed_makes_a_new_one(
    path: Path, enter: Enter, peer: MakePeer, waits: list[float]
) -> None:
    """It waits for the one that removes, sees that its file is gone, and begins again."""
    last = peer()
    last.do("import shutil")
    last.do("d = Directory(path)")
    assert last.do("d.locks.take(0, 2**63 - 1)") == 0
    entered: list[Directory] = []
    thread = threading.Thread(target=lambda: entered.append(enter()))
    thread.start()
    eventually(lambda: waits, "one that waits to enter")
    last.do("shutil.rmtree(path)")
    last.do("d.locks.close()")
    thread.join(10)
    assert not thread.is_alive()
    assert entered[0].path == path
    assert entered[0].locks.is_the_file()
    assert mode(path) == 0o700
    again = worker(peer)
    assert entered[0].locks.holder(again.pid) == again.pid


def test_who_enters_does_not_wait_for_ever(
    path: Path, enter: Enter, peer: MakePeer, soon: None
) -> None:
    """A worker that hangs in the middle of removing keeps nobody: it is an error, and soon."""
    last = peer()
    last.do("d = Directory(path)")
    assert last.do("d.locks.take(0, 2**63 - 1)") == 0
    last.stop()
    began = time.monotonic()
    with pytest.raises(OSError, match=f"the number of pid {os.getpid()}$") as caught:
        enter()
    assert caught.value.errno == errno.EBUSY
    assert time.monotonic() - began < 1
    last.kill()
    assert enter().is_there()


COME_AND_GO = """
def same(lock):
    return os.path.samestat(os.stat(lock._path), os.fstat(lock._fd))

def come_and_go(times, where):
    strangers = 0
    for _ in range(times):
        d = Directory(where)
        d.sweep()
        strangers += not all(same(lock) for lock in [d.locks, *d.names])
        d.leave()
    return strangers
"""


@pytest.mark.parametrize("services", [("7", "7", "7"), ("7", "7", "8")], ids=["one", "two"])
def test_many_that_come_and_go_always_meet(
    path: Path, peer: MakePeer, services: tuple[str, ...]
) -> None:
    """Whoever is in has the very files that the next one opens, whatever is removed and swept.

    A lock on another file would be known to nobody.
    """
    peers = [peer() for _ in services]
    for one in peers:
        one.do(f"exec({COME_AND_GO!r}, globals())")
    for one, service in zip(peers, services, strict=True):
        one.begin(f"come_and_go(100, path.with_name('{service}-a1'))")
    assert [one.result() for one in peers] == [0, 0, 0]
    assert list(path.parent.iterdir()) == []


# In containers


def test_workers_of_one_pid_namespace_meet(path: Path, enter: Enter) -> None:
    """The first one notes whose pids its names are."""
    enter()
    assert os.readlink(path / "pids") == os.readlink("/proc/self/ns/pid")


def test_workers_of_another_pid_namespace_are_refused(path: Path, enter: Enter) -> None:
    """Two containers that share a directory have other processes' pids: an error that says so."""
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    (path / "pids").symlink_to("pid:[4026531835]")
    with pytest.raises(OSError, match=r"another pid namespace; .* each container, or redis://$"):
        enter()
    assert [entry.name for entry in path.iterdir()] == ["pids"]
    (path / "pids").unlink()
    assert enter().is_there()


# Sweeping


def test_a_sweep_removes_what_killed_workers_left(path: Path, enter: Enter, peer: MakePeer) -> None:
    """A killed worker's socket goes; those of one that lives and one that hangs stay.

    Its pid is not held: a new worker may get it, and must not have to wait for who swept.
    """
    live, hung, killed = worker(peer), worker(peer), worker(peer)
    hung.stop()
    killed.kill()
    us = enter()
    us.sweep()
    assert sockets(path) == {live.pid, hung.pid}
    assert us.locks.holder(killed.pid) == live.do(f"d.locks.holder({killed.pid})") == 0


@pytest.mark.parametrize("state", ["live", "hung"])
def test_a_sweep_leaves_other_services(
    path: Path, enter: Enter, peer: MakePeer, state: str
) -> None:
    """One worker of a service, live or stopped, keeps its directory; what is none stays, too."""
    other = peer()
    other.do("d = Directory(path.with_name('8-a1'))")
    other.do("touch(d)")
    if state == "hung":
        other.stop()
    us = enter()
    (path.parent / "notes").touch()
    us.sweep()
    assert {entry.name for entry in path.parent.iterdir()} == {"7-a1", "8-a1", "notes"}
    assert (path.parent / "8-a1" / str(other.pid)).exists()
    other.go_on()
    assert other.do("d.locks.is_the_file()") is True


# Two apps in one process


def test_a_sweep_opens_nothing_of_its_own_service(path: Path, enter: Enter, peer: MakePeer) -> None:
    """Another app's may be this process's: to close its locks would drop all that it holds."""
    one, two = enter(), enter(path.with_name("7-b1"))
    two.names[0].take(5)
    one.sweep()
    other = peer()
    other.do("d = Directory(path.with_name('7-b1'))")
    assert other.do(f"d.locks.holder({os.getpid()})") == os.getpid()
    assert other.do("d.names[0].take(5)") == os.getpid()
    assert two.is_there()


def test_two_apps_leave_one_by_one(path: Path, enter: Enter) -> None:
    """The one's end is not the other's."""
    one, two = enter(), enter(path.with_name("7-b1"))
    one.leave()
    assert list(path.parent.iterdir()) == [two.path]
    assert two.is_there()


def test_another_service_sweeps_all_apps(path: Path, enter: Enter, peer: MakePeer) -> None:
    """What its killed workers left, whom no other would enter; for each app.

    A name that only begins alike is another's.
    """
    dead = peer()
    names = ["8-a1", "8-b1", "77-a1", "removed-1-8-a1"]
    dead.do(f"all_ = [Directory(path.with_name(name)) for name in {names!r}]")
    dead.do("touch(all_[0])")
    dead.kill()
    us = enter()
    before = descriptors()
    us.sweep()
    assert list(path.parent.iterdir()) == [path]
    assert us.locks.is_the_file()
    assert descriptors() == before


def test_a_sweep_closes_what_it_cannot_remove(
    path: Path, enter: Enter, peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the system says to it, no file stays open, and the rest is swept."""
    dead = peer()
    dead.do("d = Directory(path.with_name('8-a1'))")
    dead.kill()
    us = enter()
    before = descriptors()

    def refused(locks: RecordLocks, number: int, length: int = 1) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(RecordLocks, "take", refused)
        us.sweep()
    assert descriptors() == before
    assert {entry.name for entry in path.parent.iterdir()} == {"7-a1", "8-a1"}


# Where


def test_a_base_has_to_be_a_directory(short_base: Path) -> None:
    """A sentence that says what to make."""
    check_base(short_base)
    (short_base / "file").touch()
    for missing in (short_base / "none", short_base / "file"):
        with pytest.raises(ConfigError) as caught:
            check_base(missing)
        message = str(caught.value)
        assert message == f"CHATSTREAM_BUS: {str(missing)!r} is not a directory. Please make it."


LONGEST_NAMES = ("4294967295", "0123456799")
"""A socket's inode is a number of 32 bits; an app's name is eight digits and a count."""


@pytest.fixture
def longest_base(short_base: Path) -> Path:
    """A base as long as one may be."""
    below = len(str(service_directory(Path("x"), *LONGEST_NAMES) / "4194304")) - 1
    base = short_base / ("x" * (LONGEST - below - len(os.fsencode(short_base)) - 1))
    base.mkdir()
    return base


def test_a_base_may_be_so_long(longest_base: Path) -> None:
    """As long as a socket can be made below it, in bytes; else it says how many are too many."""
    check_base(longest_base)
    with pytest.raises(ConfigError, match=r"too long by 3 bytes: .* may have 107\. Choose a short"):
        check_base(longest_base.with_name(f"{longest_base.name}xyz"))


def test_the_kernel_agrees(longest_base: Path) -> None:
    """Below the longest base a socket can be bound, for the longest pid of the longest service."""
    path = service_directory(longest_base, *LONGEST_NAMES) / "4194304"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
        pytest.raises(OSError, match="too long"),
    ):
        sock.bind(f"{path}x")


def test_the_default_base_can_be_used() -> None:
    """It is there, it is writable, and it is short enough."""
    assert os.access(default_base(), os.W_OK | os.X_OK)
    check_base(default_base())


# Which service


Sockets = Callable[[Any], None]


@pytest.fixture
def worker_of(monkeypatch: pytest.MonkeyPatch) -> Sockets:
    """Makes this process gunicorn's worker that has these listening sockets."""

    def worker_of(sockets: Any) -> None:
        worker = SimpleNamespace(sockets=sockets)
        monkeypatch.setattr(directory, "gunicorn_worker", lambda: worker)

    return worker_of


def test_without_gunicorn_there_is_no_service() -> None:
    """In any other process there is nothing to tell one service from another."""
    assert gunicorn_service() is None


def test_a_service_is_named_by_its_socket(worker_of: Sockets) -> None:
    """The listening socket's inode: the same in each worker, and in those after a reload."""
    with socket.create_server(("127.0.0.1", 0)) as listener, listener.dup() as in_another_worker:
        worker_of([listener])
        name = gunicorn_service()
        assert name == str(os.fstat(listener.fileno()).st_ino)
        worker_of([in_another_worker])
        assert gunicorn_service() == name
        with socket.create_server(("127.0.0.1", 0)) as another_service:
            worker_of([another_service, listener])
            assert gunicorn_service() not in (name, None)


def test_what_has_no_socket_is_no_service(worker_of: Sockets) -> None:
    """What an app's own signal handler is a method of; a worker that leaves, and has closed it."""
    closed = socket.socket()
    closed.close()
    for sockets in ((), [None], "nothing", [closed]):
        worker_of(sockets)
        assert gunicorn_service() is None


# Who is there


def test_the_others_that_have_entered(path: Path, enter: Enter, peer: MakePeer) -> None:
    """Not this process, and none that was killed, though its socket is there yet."""
    us, other = enter(), worker(peer)
    (path / str(os.getpid())).touch()
    assert us.workers() == [other.pid]
    other.kill()
    assert us.workers() == []


def test_what_is_being_removed_is_no_service(path: Path, tmp_path: Path, peer: MakePeer) -> None:
    """Though whoever removes it may hold its numbers."""
    other = worker(peer)
    other.do("removed = Directory(path.with_name('removed-a1'))")
    assert living(tmp_path, "a1") == living(tmp_path, "") == [path]


# Who only looks


def test_a_look_changes_nothing(path: Path, peer: MakePeer) -> None:
    """No number is taken, no file made; what it leaves is as it was."""
    other = worker(peer)
    before = sorted(path.rglob("*"))
    look = VisitedDirectory(path)
    assert look.locks.holder(other.pid) == other.pid
    assert len(look.names) == NAMES
    assert look.is_there()
    look.leave()
    assert sorted(path.rglob("*")) == before
    assert other.do("d.is_there()") is True


def test_a_look_where_nobody_was(path: Path) -> None:
    """It is an error, and still nobody was there."""
    with pytest.raises(FileNotFoundError):
        VisitedDirectory(path)
    assert not path.parent.exists()


def test_a_look_does_not_keep_a_service_from_its_end(path: Path, peer: MakePeer) -> None:
    """The last worker takes the directory away; who looked in sees that it is gone."""
    other = worker(peer)
    look = VisitedDirectory(path)
    other.do("d.leave()")
    assert not path.exists()
    assert not look.is_there()
    look.leave()


def test_a_look_into_a_directory_that_others_can_enter(path: Path, enter: Enter) -> None:
    """It may be anybody's."""
    path.parent.mkdir(mode=0o755)
    with pytest.raises(PermissionError):
        VisitedDirectory(path)


@pytest.mark.parametrize("mode", [0o700, 0o755, None])
def test_whether_a_base_can_be_used(tmp_path: Path, mode: int | None) -> None:
    """Also where nobody has used it yet."""
    if mode is not None:
        (tmp_path / f"chatstream-{os.geteuid()}").mkdir(mode=mode)
    if mode == 0o755:
        with pytest.raises(PermissionError, match="only this user"):
            check_writable(tmp_path)
    else:
        check_writable(tmp_path)


def test_a_base_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="not writable"):
        check_writable(tmp_path)
