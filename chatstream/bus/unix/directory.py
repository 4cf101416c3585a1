"""The private directory in which the workers of one service on one host find each other.

    <base>/chatstream-<uid>/<service>-<app>/    0700
        locks                                   record locks: a worker holds its pid's number
        names-0 … names-f                       record locks: sessions and streams, by their hashes
        <pid>                                   a worker's socket, 0600
        early/                                  cancels that came before their stream
        pids                                    the namespace that the pids are of

It belongs to the service, not to a process: the first worker makes it, the last one that leaves
removes it, and what killed workers left is swept by the next that starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from chatstream.bus.unix.record_locks import RecordLocks
from chatstream.errors import ConfigError
from chatstream.workers.server import gunicorn_worker

LONGEST = 107
"""Bytes that the name of a socket may have: sun_path of unix(7), less the NUL at its end."""

NAMES = 16
"""Files for names: the kernel looks through a file's locks one by one."""

_ALL = 2**63 - 1

_REMOVED = "removed-"

_AGAIN = 0.005  # seconds between two attempts to enter

_ENTER = 1.0
"""Seconds that entering may take; another worker's sweep is in the way for less."""


def gunicorn_service() -> str | None:
    """A name for the gunicorn service that this process is a worker of; None for no worker.

    Workers of one service, and of its generations, share their listening sockets and nothing else:
    a `HUP` gives them new settings, a `USR2` a new master. The socket's inode is the name.
    """
    for listener in getattr(gunicorn_worker(), "sockets", ()):
        with contextlib.suppress(OSError, AttributeError, ValueError):  # closed: it is leaving
            return str(os.fstat(listener.fileno()).st_ino)
    return None


def default_base() -> Path:
    """Where the directories are when no place is set."""
    shared = Path("/dev/shm")  # in memory, and not cleared by age as /tmp is
    return shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def service_directory(base: Path, service: str, app: str) -> Path:
    """The directory of one app of one service of this user."""
    return base / f"chatstream-{os.geteuid()}" / f"{service}-{app}"


def check_base(base: Path) -> None:
    """Looks whether sockets can be made below `base`.

    Raises:
        ConfigError: They cannot; the message says why.
    """
    longest = os.fsencode(service_directory(base, "4294967295", "0" * 10) / "4194304")
    if len(longest) > LONGEST:
        raise ConfigError(
            f"CHATSTREAM_BUS: {str(base)!r} is too long by {len(longest) - LONGEST} bytes: the name"
            f" of a socket below it may have {LONGEST}. Choose a shorter directory."
        )
    if not base.is_dir():
        raise ConfigError(f"CHATSTREAM_BUS: {str(base)!r} is not a directory. Please make it.")


def check_writable(base: Path) -> None:
    """Looks whether this user has, or can make, a private directory below `base`.

    Raises:
        OSError: It cannot; the message says why.
    """
    mine = service_directory(base, "service", "0").parent
    with contextlib.suppress(FileNotFoundError):
        _check_private(mine)
        return
    if not os.access(base, os.W_OK | os.X_OK):
        raise PermissionError(f"{base} is not writable for uid {os.geteuid()}")


class Directory:
    """One process's hold on a service's directory. A process has one for a path at a time.

    Attributes:
        path: Where it is.
        locks: The workers' record locks.
        names: The names' record locks: a number's are in the file `number // 4 % NAMES`.
    """

    def __init__(self, path: Path) -> None:
        """Makes the directory where it is missing, and enters.

        Raises:
            OSError: It cannot be made, or belongs to somebody else.
        """
        self.path = path
        deadline = monotonic() + _ENTER
        while path.parent.parent.is_dir():
            # FileNotFoundError: the last worker has just removed it.
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as files:
                self._enter(files, deadline)
                self._files = files.pop_all()
                return
            if monotonic() > deadline:
                break
            time.sleep(_AGAIN)
        raise FileNotFoundError(f"{path.parent.parent} is not there, or what is in it goes away")

    def socket_of(self, pid: int) -> str:
        """The address of a worker."""
        return str(self.path / str(pid))

    def workers(self) -> list[int]:
        """The pids of the other processes that have entered."""
        return [pid for pid in _pids(self.path) if self.locks.holder(pid) == pid]

    def is_there(self) -> bool:
        """Whether the directory is still the one that others enter."""
        return self.locks.is_the_file()

    def sweep(self) -> None:
        """Removes what workers and services that were killed have left."""
        for pid in _pids(self.path):
            if pid != os.getpid() and self.locks.take(pid) == 0:
                try:
                    (self.path / str(pid)).unlink(missing_ok=True)
                finally:
                    self.locks.drop(pid)
        # Not those of our own service: other apps of this very process may be in them, and to
        # close their files would drop their locks.
        service = self.path.name.partition("-")[0]
        for sibling in self.path.parent.iterdir():
            if sibling.name.partition("-")[0] != service:
                _remove_abandoned(sibling)

    def leave(self) -> None:
        """Takes this process's things away, and the directory when it was the last one."""
        if self.is_there():
            (self.path / str(os.getpid())).unlink(missing_ok=True)
            self.locks.drop(os.getpid())  # first: of two that leave at once, one is the last
            _remove_if_last(self.path, self.locks)
        self._files.close()

    def _enter(self, files: contextlib.ExitStack, deadline: float) -> None:
        _make_private(self.path.parent)
        _make_private(self.path)
        _check_pids(self.path / "pids")
        self.locks = _locks(files, self.path / "locks")
        _take(self.locks, os.getpid(), deadline)
        if not self.locks.is_the_file():
            raise FileNotFoundError
        self.names = [_locks(files, self.path / f"names-{part:x}") for part in range(NAMES)]


class VisitedDirectory(Directory):
    """A look into a service's directory by a process that does not enter: it leaves no trace."""

    def __init__(self, path: Path) -> None:
        """Opens what is there.

        Raises:
            OSError: There is no such directory, or it belongs to somebody else.
        """
        self.path = path
        with contextlib.ExitStack() as files:
            _check_private(path.parent)
            _check_private(path)
            _check_same_pids(path / "pids")
            self.locks = _locks(files, path / "locks", make=False)
            names = [path / f"names-{part:x}" for part in range(NAMES)]
            self.names = [_locks(files, each, make=False) for each in names]
            self._files = files.pop_all()

    def leave(self) -> None:
        self._files.close()


def living(base: Path, app: str) -> list[Path]:
    """The directories of an app of this user, below `base`, that a process has entered.

    One for each service, which is to say, for each gunicorn.

    Args:
        base: See `service_directory`.
        app: Likewise. "" for any.
    """
    parent = service_directory(base, "service", app).parent
    with contextlib.suppress(FileNotFoundError):
        candidates = [path for path in sorted(parent.iterdir()) if _is_of(path, app)]
        return [path for path in candidates if _is_entered(path)]
    return []


def _is_of(path: Path, app: str) -> bool:
    _, dash, whose = path.name.partition("-")
    return bool(dash) and not path.name.startswith(_REMOVED) and app in ("", whose)


def _is_entered(path: Path) -> bool:
    with contextlib.suppress(OSError), contextlib.ExitStack() as files:
        return bool(_locks(files, path / "locks", make=False).holder(0, _ALL))
    return False


def _locks(files: contextlib.ExitStack, path: Path, *, make: bool = True) -> RecordLocks:
    locks = RecordLocks(path, make=make)
    files.callback(locks.close)
    return locks


def _take(locks: RecordLocks, number: int, deadline: float) -> None:
    """Takes a number that a sweep may have for a moment."""
    while locks.take(number):
        if monotonic() > deadline:
            raise OSError(errno.EBUSY, f"another process has the number of pid {number}")
        time.sleep(_AGAIN)


def _check_pids(note: Path) -> None:
    """Refuses a directory of workers whose pids mean something else: containers that share it."""
    with contextlib.suppress(FileExistsError):
        note.symlink_to(_our_pids())
    _check_same_pids(note)


def _our_pids() -> str:
    """The namespace that this process's pids are of."""
    return os.readlink("/proc/self/ns/pid")


def _check_same_pids(note: Path) -> None:
    if os.readlink(note) != _our_pids():
        raise OSError(
            errno.EXDEV,
            f"{note.parent} is in use from another pid namespace; use a directory for each"
            " container, or redis://",
        )


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    _check_private(path)


def _check_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not a directory that only this user can enter")


def _pids(path: Path) -> Iterator[int]:
    for entry in os.listdir(path):
        if entry.isdecimal():
            yield int(entry)


def _remove_abandoned(path: Path) -> None:
    """Removes a service's directory if no process of it lives."""
    if path.name.startswith(_REMOVED):  # by one that was killed before it was done
        shutil.rmtree(path, ignore_errors=True)
    if path.is_symlink() or not (path / "locks").is_file():
        return
    with contextlib.suppress(OSError), contextlib.closing(RecordLocks(path / "locks")) as locks:
        _remove_if_last(path, locks)


def _remove_if_last(path: Path, locks: RecordLocks) -> None:
    # Whoever holds all numbers is alone: a worker enters by taking its pid's.
    if locks.take(0, _ALL) == 0 and locks.is_the_file():
        # Away in one step: nobody may enter what is half removed.
        remains = path.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            path.rename(remains)
            shutil.rmtree(remains, ignore_errors=True)
