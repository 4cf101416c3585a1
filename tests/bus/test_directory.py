"""bus.directory: the private directory of a service. With real processes for the other workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatstream.bus import directory
from chatstream.bus.directory import (
    LONGEST,
    NAMES,
    Directory,
    check_base,
    default_base,
    gunicorn_service,
    service_directory,
)
from chatstream.errors import ConfigError
from tests.bus.peer import Peer, is_waiting
from tests.conftest import eventually

MakePeer = Callable[[], Peer]
Enter = Callable[..., Directory]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The directory of a service; nothing is there yet."""
    return service_directory(tmp_path, "7")


@pytest.fixture
def enter(path: Path) -> Iterator[Enter]:
    """This process enters `path`, or another. A test that leaves a reservation behind fails."""
    entered: list[Directory] = []

    def enter(where: Path = path) -> Directory:
        entered.append(Directory(where))
        return entered[-1]

    yield enter
    for one in entered:
        with contextlib.suppress(OSError):  # the test had it leave
            one.leave()
    assert directory._open == set()


@pytest.fixture
def peer(path: Path) -> Iterator[MakePeer]:
    """Makes a process that knows the directory's path; `d = Directory(path)` enters."""
    made: list[Peer] = []

    def make() -> Peer:
        made.append(
            Peer(
                "import os",
                "from pathlib import Path",
                "from chatstream.bus.directory import Directory",
                f"path = Path({str(path)!r})",
                "touch = lambda d: os.close(os.open(d.socket_of(os.getpid()), os.O_CREAT))",
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.kill()


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
    assert {mode(entry) for entry in path.iterdir()} == {0o600}


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


def test_its_name_has_the_users_and_the_services(tmp_path: Path) -> None:
    """Two users do not meet, nor do two services of one user."""
    path = service_directory(tmp_path, "7")
    assert path == tmp_path / f"chatstream-{os.geteuid()}" / "7"


def test_the_base_is_not_made(tmp_path: Path, enter: Enter) -> None:
    """A base that is not there is an error of whoever set it, and nothing stays reserved."""
    with pytest.raises(FileNotFoundError):
        enter(service_directory(tmp_path / "none", "7"))


def test_one_that_is_there_is_entered(path: Path, enter: Enter, peer: MakePeer) -> None:
    """The second worker meets the first one: each sees that the other's pid is held."""
    other = worker(peer)
    us = enter()
    assert us.path == path
    assert us.locks.holder(other.pid) == other.pid
    assert other.do(f"d.locks.holder({os.getpid()})") == os.getpid()


def test_each_worker_has_an_address(path: Path, enter: Enter) -> None:
    """A socket's name is its worker's pid."""
    assert enter().socket_of(4711) == str(path / "4711")


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


def test_the_last_one_removes_it(path: Path, enter: Enter) -> None:
    """With all that is in it; the user's directory stays."""
    us = enter()
    (path / str(os.getpid())).touch()
    (path / "early" / "owner").mkdir(parents=True)
    (path / "early" / "owner" / "link").symlink_to("1.0")
    us.leave()
    assert list(path.parent.iterdir()) == []


def test_one_that_is_not_the_last_takes_its_own_away(
    path: Path, enter: Enter, peer: MakePeer
) -> None:
    """The others' sockets and the locks stay, and its pid is free."""
    other = worker(peer)
    us = enter()
    (path / str(os.getpid())).touch()
    us.leave()
    assert sockets(path) == {other.pid}
    assert (path / "locks").exists()
    assert other.do(f"d.locks.holder({os.getpid()})") == 0
    other.do("d.leave()")
    assert not path.exists()


def test_a_worker_that_hangs_is_in_it(path: Path, enter: Enter, peer: MakePeer) -> None:
    """Stopped is not gone: nothing is removed under its feet."""
    other = worker(peer)
    us = enter()
    other.stop()
    us.leave()
    assert (path / str(other.pid)).exists()
    other.go_on()
    assert other.do("d.locks.is_the_file()") is True


def test_after_the_last_one_it_is_made_again(path: Path, enter: Enter) -> None:
    """A service that ends and begins again has the same place."""
    for _ in range(3):
        us = enter()
        assert us.path == path
        assert us.locks.is_the_file()
        us.leave()


# Entering while the last one removes it


def test_who_enters_while_it_is_removed_makes_a_new_one(
    path: Path, enter: Enter, peer: MakePeer
) -> None:
    """It waits for the one that removes, sees that its file is gone, and begins again."""
    last = peer()
    last.do("import shutil")
    last.do("d = Directory(path)")
    assert last.do("d.locks.take(0, 2**63 - 1)") == 0
    entered: list[Directory] = []
    thread = threading.Thread(target=lambda: entered.append(enter()))
    thread.start()
    eventually(lambda: is_waiting(os.getpid()), "one that waits to enter")
    last.do("shutil.rmtree(path)")
    last.do("d.locks.close()")
    thread.join(10)
    assert not thread.is_alive()
    assert entered[0].path == path
    assert entered[0].locks.is_the_file()
    assert mode(path) == 0o700
    again = worker(peer)
    assert entered[0].locks.holder(again.pid) == again.pid


# Sweeping


def test_a_sweep_removes_what_killed_workers_left(path: Path, enter: Enter, peer: MakePeer) -> None:
    """A killed worker's socket goes; those of one that lives and one that hangs stay."""
    live, hung, killed = worker(peer), worker(peer), worker(peer)
    hung.stop()
    killed.kill()
    us = enter()
    us.sweep()
    assert sockets(path) == {live.pid, hung.pid}
    assert us.locks.holder(killed.pid) == 0


def test_a_sweep_holds_no_pid(path: Path, enter: Enter, peer: MakePeer) -> None:
    """A new worker may get a killed one's pid, and must not have to wait for who swept it."""
    killed, live = worker(peer), worker(peer)
    killed.kill()
    enter().sweep()
    assert live.do(f"d.locks.holder({killed.pid})") == 0


def test_a_sweep_removes_dead_services(path: Path, enter: Enter, peer: MakePeer) -> None:
    """A service whose every worker was killed leaves a directory that no other would enter."""
    dead = peer()
    dead.do("d = Directory(path.with_name('8'))")
    dead.do("touch(d)")
    dead.kill()
    (path.parent / "9").mkdir(mode=0o700)
    us = enter()
    us.sweep()
    assert list(path.parent.iterdir()) == [path]
    assert us.locks.is_the_file()


@pytest.mark.parametrize("state", ["live", "hung"])
def test_a_sweep_leaves_other_services(
    path: Path, enter: Enter, peer: MakePeer, state: str
) -> None:
    """One worker of a service, live or stopped, keeps its directory."""
    other = peer()
    other.do("d = Directory(path.with_name('8'))")
    other.do("touch(d)")
    if state == "hung":
        other.stop()
    us = enter()
    us.sweep()
    assert {entry.name for entry in path.parent.iterdir()} == {"7", "8"}
    assert (path.parent / "8" / str(other.pid)).exists()
    other.go_on()
    assert other.do("d.locks.is_the_file()") is True


def test_a_sweep_leaves_what_is_no_service(path: Path, enter: Enter) -> None:
    """A file that lies beside the services is not ours to remove."""
    us = enter()
    (path.parent / "notes").touch()
    us.sweep()
    assert (path.parent / "notes").exists()


# Two services in one process


def test_two_services_of_a_process_have_two_directories(path: Path, enter: Enter) -> None:
    """Two apps in one process: record locks are the process's, so in one place they would mix."""
    one, two, three = enter(), enter(), enter()
    assert [one.path, two.path, three.path] == [path, Path(f"{path}-2"), Path(f"{path}-3")]
    two.leave()
    assert enter().path == Path(f"{path}-2")


def test_the_same_two_services_of_two_processes_meet(
    path: Path, enter: Enter, peer: MakePeer
) -> None:
    """Made in the same order, the first ones share a directory, and so do the second ones."""
    other = peer()
    other.do("d, e = Directory(path), Directory(path)")
    for ours in (enter(), enter()):
        assert ours.locks.holder(other.pid) == other.pid


def test_a_sweep_spares_the_other_services_of_the_process(
    path: Path, enter: Enter, peer: MakePeer
) -> None:
    """Nor does it open their locks: to close them would drop all that the process holds there."""
    one, two = enter(), enter()
    two.names[0].take(5)
    one.sweep()
    assert two.path.is_dir()
    other = peer()
    other.do("d = Directory(path.with_name('7-2'))")
    assert other.do(f"d.locks.holder({os.getpid()})") == os.getpid()
    assert other.do("d.names[0].take(5)") == os.getpid()


# Where


def test_a_base_has_to_be_a_directory(tmp_path: Path) -> None:
    """A sentence that says what to make."""
    check_base(tmp_path)
    (tmp_path / "file").touch()
    for missing in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ConfigError) as caught:
            check_base(missing)
        message = str(caught.value)
        assert message == f"CHATSTREAM_BUS: {str(missing)!r} is not a directory. Please make it."


@pytest.fixture
def longest_base() -> Iterator[Path]:
    """A base as long as one may be."""
    below = len(str(service_directory(Path("x"), "4294967295-2") / "4194304")) - 1
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="é") as folder:
        base = Path(folder) / ("x" * (LONGEST - below - len(os.fsencode(folder)) - 1))
        base.mkdir()
        yield base


def test_a_base_may_be_so_long(longest_base: Path) -> None:
    """As long as a socket can be made below it, in bytes; else it says how many are too many."""
    check_base(longest_base)
    with pytest.raises(ConfigError, match=r"too long by 3 bytes: .* may have 107\. Choose a short"):
        check_base(longest_base.with_name(f"{longest_base.name}xyz"))


def test_the_kernel_agrees(longest_base: Path) -> None:
    """Below the longest base a socket can be bound, for the longest pid of the longest service."""
    path = service_directory(longest_base, "4294967295-2") / "4194304"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        pytest.raises(OSError, match="too long"),
    ):
        sock.bind(f"{path}x")


def test_the_default_base_can_be_used() -> None:
    """It is there, it is writable, and it is short enough."""
    assert os.access(default_base(), os.W_OK | os.X_OK)
    check_base(default_base())


# Which service


SIGNALS = [signal.SIGTERM, signal.SIGQUIT, signal.SIGABRT, signal.SIGUSR1]
"""Some of those that gunicorn's workers handle."""


class Worker:
    """As gunicorn's: its signal handlers are methods, and it has the listening sockets."""

    def __init__(self, sockets: Any) -> None:
        self.sockets = sockets

    def handle(self, signum: int, frame: object) -> None:
        raise AssertionError("no signal was sent")


@pytest.fixture
def handled_by() -> Iterator[Callable[..., None]]:
    """Makes a worker's method the handler of a signal."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handled_by(worker: Worker, number: int = signal.SIGTERM) -> None:
        signal.signal(number, worker.handle)

    yield handled_by
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_gunicorn_there_is_no_service() -> None:
    """In any other process there is nothing to tell one service from another."""
    assert gunicorn_service() is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_service_is_named_by_its_socket(handled_by: Callable[..., None], number: int) -> None:
    """The listening socket's inode: the same in each worker, and in those after a reload."""
    with socket.create_server(("127.0.0.1", 0)) as listener, listener.dup() as in_another_worker:
        handled_by(Worker([listener]), number)
        name = gunicorn_service()
        assert name == str(os.fstat(listener.fileno()).st_ino)
        handled_by(Worker([in_another_worker]), number)
        assert gunicorn_service() == name
        with socket.create_server(("127.0.0.1", 0)) as another_service:
            handled_by(Worker([another_service, listener]), number)
            assert gunicorn_service() not in (name, None)


@pytest.mark.parametrize("taken", SIGNALS)
def test_an_app_may_have_handlers_of_its_own(
    handled_by: Callable[..., None], taken: signal.Signals
) -> None:
    """Whichever of the signals it has taken over, the others tell the worker."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for number in SIGNALS:
            handled_by(Worker([listener]), number)
        name = gunicorn_service()
        handled_by(Worker(None), taken)
        assert gunicorn_service() == name is not None


@pytest.mark.parametrize("sockets", [None, (), [None], "nothing"])
def test_what_is_no_worker_is_no_service(handled_by: Callable[..., None], sockets: Any) -> None:
    """An app's own signal handler, whatever it is a method of."""
    handled_by(Worker(sockets))
    assert gunicorn_service() is None


def test_a_worker_that_leaves_has_no_service(handled_by: Callable[..., None]) -> None:
    """Its listening sockets are closed already."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.close()
    handled_by(Worker([listener]))
    assert gunicorn_service() is None
