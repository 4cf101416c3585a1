"""The bus of one host: record locks say who has a stream, sockets carry a stop there.

    worker A                        names                      worker B
      │ claim(session s, stream a) ─> take bytes h(s), h(a)        │
      │                                                            │  POST /cancel/s
      │                              who has byte h(s)? <──────────┤
      │                              A's pid ─────────────────────>│
      │ <───────────────── request, to A's socket ─────────────────┤
      │ Stream.abort: provider told                                │
      ├ ────────────────── reply ─────────────────────────────────>│  200

The kernel keeps the directory of live streams, so it is as true as a directory can be: a worker
that is killed holds nothing in the same moment, one that hangs still holds what it has. What a
stream costs does not depend on the number of workers.
"""

from __future__ import annotations

import _socket
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import socket
from functools import partial
from pathlib import Path
from time import monotonic

from chatstream import native
from chatstream.bus.base import (
    PATIENCE,
    REMEMBER,
    Action,
    Answer,
    Bus,
    Claim,
    Malformed,
    Name,
    Receive,
    Reply,
    Request,
    decode,
    encode,
)
from chatstream.bus.directory import NAMES, Directory
from chatstream.bus.early import EarlyCancels
from chatstream.bus.record_locks import RecordLocks
from chatstream.errors import BusUnavailable, StreamError, Unconfirmed, conflict
from chatstream.loop import Loop

log = logging.getLogger("chatstream")

_LONGEST_MESSAGE = 65536

_SLOTS = 4
"""Bytes of a session. A claim takes the first; where a worker that hangs has it, the next one."""

_TRIES = 200
"""How often a byte is asked for again whose holder let go of it, or ended, in between."""

_GONE = 4096
"""Streams that have been and are remembered, at most."""

_BATCH = 16
"""Requests that are answered before the loop looks at its other sockets."""


class UnixBus(Bus):
    """For the workers of one service on one host.

    A claim and a release are a few system calls that return at once. Only where another worker has
    the name do `claim` and `cancel` wait for it, `PATIENCE` seconds at most.
    """

    name = "unix"
    _socket: _socket.socket
    _names: list[RecordLocks]
    _early: EarlyCancels

    def __init__(self, receive: Receive, loop: Loop, directory: Path) -> None:
        """
        Args:
            receive: See `Bus`.
            loop: Its thread answers the others' requests.
            directory: The service's; see `chatstream.bus.directory`.
        """
        super().__init__(receive)
        self._loop = loop
        self._path = directory
        self._directory: Directory | None = None
        self._complained = False
        # Guards the two below and the record locks they mirror: held for system calls that return
        # at once. The bytes of a stream that has been stay held for a while, so that a cancel for
        # it is known to be late.
        self._lock = native.allocate_lock()
        self._held: dict[int, set[Claim]] = {}
        self._gone: dict[Claim, float] = {}  # until when, oldest first

    def start(self) -> None:
        self._run_soon = native.runner()
        directory = Directory(self._path)
        self._names = directory.names
        try:
            self._socket = _bind(directory.socket_of(os.getpid()))
            directory.sweep()
            self._early = EarlyCancels(directory.path / "early")
            self._early.sweep()
            self._loop.on_readable(self._socket.fileno(), self._serve)
        except BaseException:
            directory.leave()
            raise
        self._directory = directory

    def close(self) -> None:
        directory, self._directory = self._directory, None
        if directory is None:
            return
        self._loop.forget_readable(self._socket.fileno())
        self._socket.close()
        with self._lock:
            self._held.clear()
            self._gone.clear()
        directory.leave()

    def claim(self, claim: Claim, *, reject: bool) -> bool:
        if self._directory is None:
            return False
        owner, session_id, stream_id = claim.name
        probe = Request(Action.PROBE, owner, None, stream_id)
        ask = Request(Action.PROBE if reject else Action.SUPERSEDE, owner, session_id)
        try:
            self._take(claim, _bytes_of(probe), probe)
            self._take(claim, _bytes_of(ask), ask)
        except StreamError:
            with self._lock:
                self._drop(claim, [*_bytes_of(probe), *_bytes_of(ask)])
            raise
        return self._early.pop(claim.name)

    def release(self, claim: Claim) -> None:
        if self._directory is None:
            return
        now = monotonic()
        with self._lock:
            self._drop(claim, _session_bytes(claim.name))
            self._gone[claim] = now + REMEMBER
            for gone, until in list(itertools.islice(self._gone.items(), 2)):
                if until <= now or len(self._gone) > _GONE:
                    del self._gone[gone]
                    self._drop(gone, _stream_bytes(gone.name))

    def _cancel_elsewhere(self, request: Request) -> bool:
        if self._directory is None:
            raise BusUnavailable
        if request.stream_id is not None:
            return self._cancel_stream(request)
        return self._cancel_session(request)

    def _cancel_session(self, request: Request) -> bool:
        deadline = monotonic() + PATIENCE
        stopped = hung = False
        bytes_ = _bytes_of(request)
        if not self._locks(bytes_[0]).holder(bytes_[0], len(bytes_)):
            return False
        for byte in bytes_:
            try:
                stopped |= self._ask_holder(byte, request, deadline) is Answer.STOPPED
            except Unconfirmed:
                hung = True
        if hung and not stopped:
            raise Unconfirmed
        return stopped

    def _cancel_stream(self, request: Request) -> bool:
        name = Name(request.owner, request.session_id or "", request.stream_id or "")
        (byte,) = _bytes_of(request)
        deadline = monotonic() + PATIENCE
        # A claim takes the byte and then looks for early cancels. Here it is the other way round,
        # so one of the two sees the other.
        for remembered in (False, True):
            answer = self._ask_holder(byte, request, deadline)
            if answer is None and self._holds(byte):
                answer = self._receive(request)
            if answer is not None:
                if remembered:
                    self._early.remove(name)
                return answer is Answer.STOPPED
            if not remembered:
                self._early.add(name)
        return False

    # The bytes

    def _take(self, claim: Claim, bytes_: list[int], request: Request) -> None:
        """Takes the first byte that is free or let go of, and has the holders of the rest let go.

        Raises:
            Refused: The stream of a holder is live, or may be, and `request` is a probe.
            Unconfirmed: All bytes are held by workers that hang.
        """
        deadline = monotonic() + PATIENCE
        taken = False
        for number, byte in enumerate(bytes_):
            if taken and not self._locks(byte).holder(byte, len(bytes_) - number):
                return
            try:
                answer = self._ask_holder(byte, request, deadline, None if taken else claim)
            except Unconfirmed:
                if request.action is Action.PROBE:
                    raise conflict("stream" if request.session_id is None else "session") from None
                continue
            if answer is Answer.LIVE:
                raise conflict("stream" if request.session_id is None else "session")
            taken = True
        if not taken:
            raise Unconfirmed

    def _ask_holder(
        self, byte: int, request: Request, deadline: float, claim: Claim | None = None
    ) -> Answer | None:
        """The answer of the worker that holds `byte`; None if no other does.

        Args:
            byte: Who has it is asked.
            request: What it is asked. Other than a cancel, it makes the holder let go of the byte
                unless its stream is live, and then the next holder is asked.
            deadline: When to give up.
            claim: Takes the byte when it is free.

        Raises:
            Unconfirmed: It does not answer.
        """
        for _ in range(_TRIES):
            pid = self._locks(byte).holder(byte) if claim is None else self._try(byte, claim)
            if not pid:
                return None
            answer = self._ask(pid, request, deadline)
            if answer is Answer.LIVE or (answer is not None and request.action is Action.CANCEL):
                return answer
        raise Unconfirmed

    def _try(self, byte: int, claim: Claim) -> int:
        """Takes `byte`; returns 0, or the pid of the worker that has it."""
        with self._lock:
            pid = self._locks(byte).take(byte)
            if not pid:
                self._held.setdefault(byte, set()).add(claim)
            return pid

    def _locks(self, byte: int) -> RecordLocks:
        return self._names[byte // _SLOTS % NAMES]

    def _holds(self, byte: int) -> bool:
        with self._lock:
            return byte in self._held

    def _drop(self, claim: Claim, bytes_: list[int]) -> None:
        """Lets go of bytes, but for those that another claim holds too. Under the lock."""
        for byte in bytes_:
            claims = self._held.get(byte, set())
            if claim in claims:
                claims.remove(claim)
                if not claims:
                    del self._held[byte]
                    self._locks(byte).drop(byte)

    # The sockets

    def _ask(self, pid: int, request: Request, deadline: float) -> Answer | None:
        """What the worker says; None if it has ended."""
        message = dataclasses.replace(request, origin=str(os.getpid()))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(max(0.05, deadline - monotonic()))
            try:
                sock.bind("")  # a name of the kernel's choice, for the reply
                sock.connect(self._address(pid))
                sock.send(encode(message))
                reply = decode(sock.recv(_LONGEST_MESSAGE))
            except (ConnectionRefusedError, FileNotFoundError):
                return None
            except (OSError, Malformed) as error:  # it hangs, or has another release's format
                raise Unconfirmed from error
        return reply.answer if isinstance(reply, Reply) else None

    def _address(self, pid: int) -> str:
        if self._directory is None:  # closed meanwhile
            raise BusUnavailable
        return self._directory.socket_of(pid)

    def _serve(self) -> None:
        """Answers requests. In the loop's thread."""
        for _ in range(_BATCH):
            try:
                data, sender = self._socket.recvfrom(_LONGEST_MESSAGE)
            except OSError:  # no more, or closed
                return
            reply = self._answer(data)
            if reply is not None and sender:
                with contextlib.suppress(OSError):  # it has given up
                    self._socket.sendto(encode(reply), sender)

    def _answer(self, data: bytes) -> Reply | None:
        with contextlib.suppress(Malformed):
            request = decode(data)
            if isinstance(request, Request):
                return Reply(self._obey(request), request.id, str(os.getpid()))
        if not self._complained:
            self._complained = True
            self._run_soon(
                partial(log.warning, "[bus] unix: dropped a message that is none of ours")
            )
        return None

    def _obey(self, request: Request) -> Answer:
        if request.action is Action.CANCEL:
            return self._receive(request)
        # Only what holds the name is asked for: a stream that is still claiming it will ask whoever
        # gets it next. So of streams that begin at once the last to hold it is the one that stays.
        with self._lock:
            claims = [claim for byte in _bytes_of(request) for claim in self._held.get(byte, ())]
        answers = {self._receive(Request(request.action, *claim.name)) for claim in claims}
        if Answer.LIVE in answers:
            return Answer.LIVE
        with self._lock:
            for claim in claims:
                self._drop(claim, _bytes_of(request))
        return Answer.STOPPED if Answer.STOPPED in answers else Answer.ABSENT


def _bind(path: str) -> _socket.socket:
    """A worker's socket. The C class: the loop's thread uses it, gevent's would need the hub."""
    sock = _socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):  # an earlier process with this pid
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _bytes_of(request: Request) -> list[int]:
    """The bytes of what a request names: its stream, else its session."""
    if request.stream_id is not None:
        return _stream_bytes(Name(request.owner, "", request.stream_id))
    return _session_bytes(Name(request.owner, request.session_id or "", ""))


def _stream_bytes(name: Name) -> list[int]:
    return [_number("stream", name.owner, name.stream_id)]


def _session_bytes(name: Name) -> list[int]:
    first = _number("session", name.owner, name.session_id)
    return list(range(first, first + _SLOTS))


def _number(kind: str, owner: str, name: str) -> int:
    """A number for a name: 60 bits of a hash, above all pids, with room for slots."""
    text = f"{kind}\0{owner}\0{name}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return 1 << 62 | int.from_bytes(digest, "big") >> 4 << 2
