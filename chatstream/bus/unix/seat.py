"""A worker's place in its service's directory, and the connections between places.

A request is one packet over a SOCK_SEQPACKET connection (unix(7)), its reply another: the kernel
keeps them whole, keeps what came for a worker that hangs, and says at once when one has ended.
"""

from __future__ import annotations

import _socket
import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import monotonic

from chatstream.bus.messages import Answer, Enquiry, Malformed, Page, Reply, Request, decode, encode
from chatstream.bus.unix.directory import NAMES, Directory
from chatstream.bus.unix.early_cancels import EarlyCancels
from chatstream.bus.unix.locked_places import part_of
from chatstream.bus.unix.record_locks import RecordLocks
from chatstream.errors import Unconfirmed, out_of_descriptors
from chatstream.sockets.loop import Loop

_LONGEST_MESSAGE = 65536

_BACKLOG = 1024
"""Requests that may wait for a worker that hangs; net.core.somaxconn may allow less."""

_ENDED = (ConnectionRefusedError, ConnectionResetError, FileNotFoundError)
"""What says that a worker has ended."""

_PAUSE = 0.1
"""Seconds without accepting requests where the process has no descriptor left."""

Answering = Callable[[bytes, bool], bytes | None]
"""The reply to a request, given whether somebody waits for it; None to drop the request."""


class Visit:
    """A look at the directory: others can be asked, and cannot ask."""

    def __init__(self, directory: Directory) -> None:
        """
        Args:
            directory: Left by `leave`.
        """
        self.directory = directory
        self.early = EarlyCancels(directory.path / "early")

    def leave(self) -> None:
        """Gives it back."""
        self.directory.leave()

    def locks(self, byte: int) -> RecordLocks:
        """The record locks that `byte` is in."""
        return self.directory.names[byte // 4 % NAMES]

    def places(self, owner: str) -> RecordLocks:
        """The record locks that an owner's places are in."""
        return self.directory.names[part_of(owner, NAMES)]

    def ask(self, pid: int, request: Request, deadline: float) -> Answer | None:
        """What the worker `pid` says; None if it has ended.

        Raises:
            Unconfirmed: Nothing, by the deadline.
        """
        message = dataclasses.replace(request, origin=str(os.getpid()), before=monotonic())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(_left(deadline))
                sock.connect(self.directory.socket_of(pid))
                sock.send(encode(message))
                sock.settimeout(_left(deadline))
                data = sock.recv(_LONGEST_MESSAGE)
            reply = decode(data) if data else None
        except _ENDED:
            return None
        except (OSError, Malformed) as error:  # it hangs, or has another release's format
            raise Unconfirmed from error
        if not isinstance(reply, Reply) or reply.id != message.id:
            raise Unconfirmed
        return reply.answer

    def ask_for_pages(
        self, enquiries: Mapping[int, Enquiry], deadline: float
    ) -> dict[int, Page | None]:
        """What these workers say: None if it is nothing by the deadline; not of one that has ended.

        All are asked before the first is waited for: so one that hangs takes nobody's time.
        """
        pages: dict[int, Page | None] = {}
        with contextlib.ExitStack() as stack:
            asked: dict[int, socket.socket | None] = {}
            for pid, enquiry in enquiries.items():
                with contextlib.suppress(*_ENDED):
                    asked[pid] = self._begin(stack, pid, enquiry)
            for pid, sock in asked.items():
                with contextlib.suppress(*_ENDED):
                    pages[pid] = _page(sock, enquiries[pid], deadline) if sock else None
        silent = [pid for pid, page in pages.items() if page is None]
        for pid in silent:
            if self.directory.locks.holder(pid) != pid:
                del pages[pid]
        return pages

    def _begin(
        self, stack: contextlib.ExitStack, pid: int, enquiry: Enquiry
    ) -> socket.socket | None:
        """Sends it at once, or not at all: None. Raises what says that nobody is there."""
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.setblocking(False)
        try:
            sock.connect(self.directory.socket_of(pid))
            message = dataclasses.replace(enquiry, origin=str(os.getpid()), before=monotonic())
            sock.send(encode(message))
        except _ENDED:
            raise
        except OSError:  # as many wait already as may
            return None
        return sock


class Seat(Visit):
    """A place in the directory: locks, a socket that the others can reach, the early cancels."""

    def __init__(self, path: Path, loop: Loop, answer: Answering) -> None:
        """
        Args:
            path: The directory's.
            loop: Its thread reads what arrives.
            answer: See `Answering`.

        Raises:
            OSError: It cannot be taken.
        """
        self._loop = loop
        self._reply = answer
        with contextlib.ExitStack() as undo:
            directory = Directory(path)
            undo.callback(directory.leave)
            super().__init__(directory)
            self._listener = _listen(self.directory.socket_of(os.getpid()))
            undo.callback(self._listener.close)
            self.directory.sweep()
            self.early.sweep()
            loop.on_readable(self._listener.fileno(), self._accept)
            undo.pop_all()

    def leave(self) -> None:
        self._loop.forget_ready(self._listener.fileno())
        self._listener.close()
        super().leave()

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined] # as socket.accept does
        except OSError as error:  # else nobody is there any more, or we left
            if out_of_descriptors(error):
                self._pause()
            return
        sock = _socket.socket(fileno=fd)
        sock.setblocking(False)
        self._read(sock, waited=False)

    def _pause(self) -> None:
        """Does not look for a while, or the loop would do nothing else."""
        fd = self._listener.fileno()
        self._loop.forget_ready(fd)
        self._loop.call_later(_PAUSE, partial(self._loop.on_readable, fd, self._accept))

    def _read(self, sock: _socket.socket, *, waited: bool) -> None:
        """Answers the one request of a connection, when it is there."""
        try:
            data = sock.recv(_LONGEST_MESSAGE)
        except BlockingIOError:  # connected, and not yet sent
            if not waited:
                self._loop.on_readable(sock.fileno(), partial(self._read, sock, waited=True))
            return
        except OSError:
            data = b""
        reply = self._reply(data, not _has_left(sock)) if data else None
        if reply is not None:
            with contextlib.suppress(OSError):  # it has given up
                sock.send(reply)
        if waited:
            self._loop.forget_ready(sock.fileno())
        sock.close()


def _page(sock: socket.socket, enquiry: Enquiry, deadline: float) -> Page | None:
    """The answer that comes over `sock`; None if there is none. Raises what says: never will be."""
    sock.settimeout(_left(deadline))
    try:
        data = sock.recv(_LONGEST_MESSAGE)
        page = decode(data) if data else None
    except _ENDED:
        raise
    except (OSError, Malformed):  # it hangs, or has another release's format
        return None
    return page if isinstance(page, Page) and page.id == enquiry.id else None


def _has_left(sock: _socket.socket) -> bool:
    """Whether whoever asked has closed its end: it waited until its deadline, or was killed."""
    try:
        return not sock.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _listen(path: str) -> _socket.socket:
    """A worker's socket. The C class: the loop's thread uses it, gevent's would need the hub."""
    sock = _socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):  # an earlier process with this pid
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _left(deadline: float) -> float:
    return max(0.02, deadline - monotonic())
