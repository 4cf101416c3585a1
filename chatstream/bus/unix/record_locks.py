"""Numbers that belong to processes, as the kernel keeps them: record locks on bytes of a file."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("@hhqqi")
"""struct flock of fcntl(2): type, whence, start, length, pid."""

_TRIES = 100


class RecordLocks:
    """Who holds which number (0 to 2**63 - 1): one process at a time, until it drops it or ends.

    fcntl(2)'s locks: taken and refused at once, known to every process that has the file, with the
    holder's pid, and gone in the moment the holder is, however it ended. They are the process's,
    not the thread's: a number that this process holds looks free to it. And they go when *any* of
    its descriptors for the file is closed, so a process may have only one `RecordLocks` for a file.

    Safe from any thread. Never blocks.
    """

    def __init__(self, path: Path, *, make: bool = True) -> None:
        """Opens `path`, and makes it (0600) where it is missing, if it is to."""
        self._path = path
        how = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, how | os.O_CREAT if make else how, 0o600)

    def take(self, number: int, length: int = 1) -> int:
        """Takes `length` numbers from `number` on: all or none.

        Returns:
            0 when they are this process's now, else the pid of one that holds some of them.
        """
        for _ in range(_TRIES):
            try:
                fcntl.lockf(self._file(), fcntl.LOCK_EX | fcntl.LOCK_NB, length, number)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            else:
                return 0
            if pid := self.holder(number, length):
                return pid
        raise OSError(errno.EDEADLK, "a lock that is held by nobody")

    def drop(self, number: int) -> None:
        """Gives `number` back, or does nothing."""
        fcntl.lockf(self._file(), fcntl.LOCK_UN, 1, number)

    def holder(self, number: int, length: int = 1) -> int:
        """The pid of another process that has one of these numbers; 0 for none."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, length, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._file(), fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else int(pid)

    def held(self, first: int, length: int) -> list[tuple[int, int, int]]:
        """What other processes have of these numbers: pid, from, to (which it has not), unsorted.

        The kernel is asked once for each stretch, and once for each gap between two.
        """
        found, open_ = [], [(first, first + length)]
        while open_:
            begin, end = open_.pop()
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
            answer = fcntl.fcntl(self._file(), fcntl.F_GETLK, asked)
            kind, _, start, size, pid = _FLOCK.unpack(answer)
            if kind == fcntl.F_UNLCK:
                continue
            start, stop = max(begin, start), min(end, start + size) if size else end
            found.append((int(pid), start, stop))
            open_ += [(low, high) for low, high in ((begin, start), (stop, end)) if low < high]
        return found

    def is_the_file(self) -> bool:
        """Whether the path still leads to the file that was opened."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Drops every number. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _file(self) -> int:
        if self._fd < 0:
            raise OSError(errno.EBADF, "the locks are closed")
        return self._fd
