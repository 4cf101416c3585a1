"""Cancels that came before their stream, as files that every worker of a host can read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from time import monotonic

from chatstream.bus.base import REMEMBER, REMEMBER_PER_OWNER
from chatstream.bus.messages import Name, digest

_TRIES = 20


class EarlyCancels:
    """One symbolic link per cancel, in a folder per owner; its target is when it expires.

    A link, because it is there with its text in one step; monotonic time, because that is the same
    for all processes of a host (clock_gettime(2)). Safe from any thread and process.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: Where the owners' folders are; made here.
        """
        self._folder = folder
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._swept = 0.0

    def add(self, name: Name) -> None:
        """Remembers a cancel. The owner's oldest goes where there would be too many.

        Raises:
            OSError: It cannot be remembered.
        """
        link = self._link(name)
        link.unlink(missing_ok=True)
        for attempt in range(_TRIES):
            link.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                link.symlink_to(f"{monotonic() + REMEMBER:.6f}")
                break
            except FileExistsError:
                break  # somebody cancels it too
            except FileNotFoundError:  # a sweep took the folder away
                if attempt + 1 == _TRIES:
                    raise
        self._tidy(link.parent)
        if monotonic() > self._swept + REMEMBER:
            self.sweep()

    def pop(self, name: Name) -> bool:
        """Whether a cancel is remembered; it is not any more."""
        link = self._link(name)
        try:
            expires = float(link.readlink().name)
            link.unlink()
        except FileNotFoundError:
            return False
        return expires > monotonic()

    def remove(self, name: Name) -> None:
        """Forgets a cancel, where it is remembered."""
        self._link(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes all that has expired. `add` does it from time to time."""
        self._swept = monotonic()
        with contextlib.suppress(FileNotFoundError):
            for folder in self._folder.iterdir():
                self._tidy(folder)
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()

    def _tidy(self, folder: Path) -> None:
        now, found = monotonic(), []
        with contextlib.suppress(FileNotFoundError):
            for link in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found.append((float(link.readlink().name), link))
        found.sort()
        kept = [entry for entry in found if entry[0] > now][-REMEMBER_PER_OWNER:]
        for entry in found:
            if entry not in kept:
                entry[1].unlink(missing_ok=True)

    def _link(self, name: Name) -> Path:
        return self._folder / digest(name.owner) / digest(*name)
