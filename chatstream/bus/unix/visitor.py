"""UnixVisitor: for a process that is no worker."""

from __future__ import annotations

from pathlib import Path

from chatstream.bus.base import absent
from chatstream.bus.messages import Claim
from chatstream.bus.unix.directory import VisitedDirectory
from chatstream.bus.unix.seat import Visit
from chatstream.bus.unix.unix_bus import UnixBus
from chatstream.sockets.loop import Loop


class UnixVisitor(UnixBus):
    """For a process that is no worker: it asks and cancels, and nobody sees it.

    It has no stream, no seat and no thread, and leaves nothing behind.
    """

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: The service's; see `chatstream.bus.unix.directory.living`.
        """
        super().__init__(absent, Loop(), directory)

    def start(self) -> None:
        """Looks in.

        Raises:
            OSError: The directory is not there, or not for this process.
        """
        self._membership.join()

    def _log(self, words: str) -> None:
        """Nobody's log: who visits says so to whom it visits for."""

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        raise NotImplementedError("a visitor has no stream")

    def _take_seat(self) -> Visit:
        return Visit(VisitedDirectory(self._path))
