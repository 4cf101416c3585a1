"""The private directory in which the workers of one service on one host find each other.

    <base>/chatstream-<uid>/<service>/      0700
        locks                               record locks: a worker holds its pid's number
        names-0 … names-f                   record locks: sessions and streams, by their hashes
        <pid>                               a worker's socket, 0600
        early/                              cancels that came before their stream

It belongs to the service, not to a process: the first worker makes it, the last one that leaves
removes it, and what killed workers left is swept by the next that starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chatstream import native
from chatstream.bus.record_locks import RecordLocks
from chatstream.errors import ConfigError

LONGEST = 107
"""Bytes that the name of a socket may have: sun_path of unix(7), less the NUL at its end."""

_WORKERS_SIGNALS = (signal.SIGABRT, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM)
"""Signals that a gunicorn worker handles; an app may have taken some of them over."""

NAMES = 16
"""Files for names: the kernel looks through a file's locks one by one."""

_ALL = 2**63 - 1
_open: set[Path] = set()  # by services of this process
_lock = native.allocate_lock()  # guards it


def gunicorn_service() -> str | None:
    """A name for the gunicorn service that this process is a worker of; None for no worker.

    Workers of one service, and of its generations, share their listening sockets and nothing else:
    a `HUP` gives them new settings, a `USR2` a new master. The socket's inode is the name.
    """
    # An app has no other way to its worker than the methods that this made its signal handlers.
    for number in _WORKERS_SIGNALS:
        worker = getattr(signal.getsignal(number), "__self__", None)
        for listener in getattr(worker, "sockets", None) or ():
            with contextlib.suppress(OSError, AttributeError, ValueError):  # closed: it is leaving
                return str(os.fstat(listener.fileno()).st_ino)
    return None


def default_base() -> Path:
    """Where the directories are when no place is set."""
    shared = Path("/dev/shm")  # in memory, and not cleared by age as /tmp is
    return shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def service_directory(base: Path, service: str) -> Path:
    """The directory of one service of this user."""
    return base / f"chatstream-{os.geteuid()}" / service


def check_base(base: Path) -> None:
    """Looks whether sockets can be made below `base`.

    Raises:
        ConfigError: They cannot; the message says why.
    """
    longest = os.fsencode(service_directory(base, "4294967295-2") / "4194304")
    if len(longest) > LONGEST:
        raise ConfigError(
            f"CHATSTREAM_BUS: {str(base)!r} is too long by {len(longest) - LONGEST} bytes: the name"
            f" of a socket below it may have {LONGEST}. Choose a shorter directory."
        )
    if not base.is_dir():
        raise ConfigError(f"CHATSTREAM_BUS: {str(base)!r} is not a directory. Please make it.")


class Directory:
    """One process's hold on a service's directory.

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
        self.path = _reserve(path)
        self._files = contextlib.ExitStack()
        self._files.callback(_give_back, self.path)
        try:
            self.locks = self._enter()
            self._files.callback(self.locks.close)
            self.names = [self._name_locks(part) for part in range(NAMES)]
        except BaseException:
            self._files.close()
            raise

    def socket_of(self, pid: int) -> str:
        """The address of a worker."""
        return str(self.path / str(pid))

    def _enter(self) -> RecordLocks:
        while True:
            _make_private(self.path.parent)
            _make_private(self.path)
            try:
                locks = RecordLocks(self.path / "locks")
            except FileNotFoundError:  # the last worker has just removed it
                continue
            locks.wait(os.getpid())
            if locks.is_the_file():
                return locks
            locks.close()

    def sweep(self) -> None:
        """Removes what workers and services that were killed have left."""
        for pid in _pids(self.path):
            if pid != os.getpid() and self.locks.take(pid) == 0:
                (self.path / str(pid)).unlink(missing_ok=True)
                self.locks.drop(pid)
        for sibling in self.path.parent.iterdir():
            if sibling.is_dir() and _reserve_only(sibling):
                _remove_abandoned(sibling)
                _give_back(sibling)

    def leave(self) -> None:
        """Takes this process's things away, and the directory when it was the last one."""
        (self.path / str(os.getpid())).unlink(missing_ok=True)
        _remove_if_last(self.path, self.locks)
        self._files.close()

    def _name_locks(self, part: int) -> RecordLocks:
        locks = RecordLocks(self.path / f"names-{part:x}")
        self._files.callback(locks.close)
        return locks


def _reserve(path: Path) -> Path:
    """`path`, or another where this process has that one open: two apps, or record locks mix."""
    with _lock:
        number = 2
        wanted = path
        while path in _open:
            path = wanted.with_name(f"{wanted.name}-{number}")
            number += 1
        _open.add(path)
    return path


def _reserve_only(path: Path) -> bool:
    with _lock:
        free = path not in _open
        _open.add(path)
    return free


def _give_back(path: Path) -> None:
    with _lock:
        _open.discard(path)


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not a directory that only this user can enter")


def _pids(path: Path) -> Iterator[int]:
    for entry in os.listdir(path):
        if entry.isdecimal():
            yield int(entry)


def _remove_abandoned(path: Path) -> None:
    """Removes a service's directory if no process of it lives."""
    with contextlib.suppress(OSError):
        locks = RecordLocks(path / "locks")
        _remove_if_last(path, locks)
        locks.close()


def _remove_if_last(path: Path, locks: RecordLocks) -> None:
    # Whoever holds all numbers is alone: a worker enters by taking its pid's.
    if locks.take(0, _ALL) == 0:
        shutil.rmtree(path, ignore_errors=True)
