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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic

from chatstream.bus.base import Answer, Malformed, Reply, Request, decode, encode
from chatstream.bus.directory import NAMES, Directory
from chatstream.bus.early import EarlyCancels
from chatstream.bus.record_locks import RecordLocks
from chatstream.errors import Unconfirmed, out_of_descriptors
from chatstream.loop import Loop

_LONGEST_MESSAGE = 65536

_BACKLOG = 1024
"""Requests that may wait for a worker that hangs; net.core.somaxconn may allow less."""

_PAUSE = 0.1
"""Seconds without accepting requests where the process has no descriptor left."""


class Seat:
    """A place in the directory: locks, a socket that the others can reach, the early cancels."""

    def __init__(self, path: Path, loop: Loop, answer: Callable[[bytes], bytes | None]) -> None:
        """
        Args:
            path: The directory's.
            loop: Its thread reads what arrives.
            answer: The reply to a request, or None to drop it.

        Raises:
            OSError: It cannot be taken.
        """
        self._loop = loop
        self._reply = answer
        with contextlib.ExitStack() as undo:
            self.directory = Directory(path)
            undo.callback(self.directory.leave)
            self.early = EarlyCancels(self.directory.path / "early")
            self._listener = _listen(self.directory.socket_of(os.getpid()))
            undo.callback(self._listener.close)
            self.directory.sweep()
            self.early.sweep()
            loop.on_readable(self._listener.fileno(), self._accept)
            undo.pop_all()

    def leave(self) -> None:
        """Gives it back."""
        self._loop.forget_ready(self._listener.fileno())
        self._listener.close()
        self.directory.leave()

    def locks(self, byte: int) -> RecordLocks:
        """The record locks that `byte` is in."""
        return self.directory.names[byte // 4 % NAMES]

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
        except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError):
            return None
        except (OSError, Malformed) as error:  # it hangs, or has another release's format
            raise Unconfirmed from error
        if not isinstance(reply, Reply) or reply.id != message.id:
            raise Unconfirmed
        return reply.answer

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
        reply = self._reply(data) if data else None
        if reply is not None:
            with contextlib.suppress(OSError):  # it has given up
                sock.send(reply)
        if waited:
            self._loop.forget_ready(sock.fileno())
        sock.close()


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
