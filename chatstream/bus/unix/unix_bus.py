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

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic

from chatstream.bus.base import PATIENCE, REMEMBER, Bus, Lives, Receive
from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Malformed,
    Name,
    Page,
    Reply,
    Request,
    Worker,
    decode,
    encode,
)
from chatstream.bus.unix.locked_places import LockedPlaces, holders
from chatstream.bus.unix.names import bytes_of, bytes_of_claim, name_byte
from chatstream.bus.unix.seat import Seat, Visit
from chatstream.errors import BusUnavailable, StreamError, Unconfirmed, conflict, too_many
from chatstream.sockets import native
from chatstream.sockets.loop import Loop

log = logging.getLogger("chatstream")

_TRIES = 200
"""How often a byte is asked for again whose holder let go of it, or ended, in between."""

_GONE = 4096
"""Streams that have been and are remembered, at most."""

_REJOIN = 1.0
"""Seconds between two looks whether the directory is there, and two attempts to join it."""


class UnixBus(Bus):
    """For the workers of one service on one host, in one pid namespace.

    A claim and a release are a few system calls that return at once. Only where another worker has
    the name does `cancel` wait for it, `PATIENCE` seconds at most, and `claim` for each of the two
    names.
    """

    name = "unix"

    def __init__(
        self, receive: Receive, loop: Loop, directory: Path, lives: Lives | None = None
    ) -> None:
        """
        Args:
            receive: See `Bus`.
            loop: Its thread answers the others' requests.
            directory: The service's; see `chatstream.bus.unix.directory`.
            lives: See `Bus`.
        """
        super().__init__(receive, lives)
        self._loop = loop
        self._path = directory
        self._complained = False
        self._joining = native.allocate_lock()  # held by who joins; nobody waits for it
        self._rejoin_at = 0.0
        self._settled_at = 0.0  # when all that lost their directory have joined again
        self._away = False  # the last attempt failed
        self._closed = False
        # Guards all below, and the record locks that they mirror: held for system calls that return
        # at once. The name's byte of a stream that has been stays held for a while, so that a
        # cancel for it is known to be late.
        self._lock = native.allocate_lock()
        self._seat: Visit | None = None
        self._claims: set[Claim] = set()
        self._held: dict[int, set[Claim]] = {}
        self._gone: dict[Claim, float] = {}  # until when, oldest first
        self._places = LockedPlaces(self._session_is_live)
        self._limited = False  # the last claim had a limit

    def start(self) -> None:
        self._run_soon = native.runner()
        with contextlib.suppress(OSError):
            self._join()
        self._loop.call_later(_REJOIN, self._look)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            seat, self._seat = self._seat, None
            self._held.clear()
            self._gone.clear()
            self._claims.clear()
            self._places.clear()
        if seat is not None:
            seat.leave()

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        with self._lock:
            self._claims.add(claim)
            self._limited = bool(limit)
        try:
            return self._claim(claim, reject, limit)
        except StreamError:
            with self._lock:
                stream, name, session = bytes_of_claim(claim)
                self._drop(claim, [stream, name, *session])
                self._places.leave(claim, refused=True)
                self._claims.discard(claim)
            raise

    def _claim(self, claim: Claim, reject: bool, limit: int | None) -> bool:
        try:
            seat = self._seated()
            if seat is not None:
                self._take_all(seat, claim, reject, limit)
                return seat.early.pop(claim.name)
        except OSError:  # it is broken: the stream need not be, but what is here is still counted
            self._count(claim, limit)
            raise
        self._count(claim, limit)
        return False

    def _count(self, claim: Claim, limit: int | None) -> None:
        """Counts what is in this process. Raises Refused."""
        with self._lock:
            taken = not limit or self._places.take(claim, limit)
        if not taken and self._is_live(claim):
            raise too_many(limit or 0)

    def release(self, claim: Claim) -> None:
        now = monotonic()
        with self._lock:
            self._claims.discard(claim)
            stream, _, session = bytes_of_claim(claim)
            self._drop(claim, [stream, *session])
            if self._places:
                self._places.leave(claim)
            self._gone[claim] = now + REMEMBER
            for gone, until in list(itertools.islice(self._gone.items(), 2)):
                if until <= now or len(self._gone) > _GONE:
                    del self._gone[gone]
                    self._drop(gone, [name_byte(gone.name)])

    def cancel_elsewhere(self, request: Request) -> bool:
        seat = self._seated()
        if seat is None:
            raise BusUnavailable
        cancel = self._cancel_session if request.stream_id is None else self._cancel_stream
        if cancel(seat, request):
            return True
        if monotonic() < self._settled_at:
            raise BusUnavailable
        return False

    def _cancel_session(self, seat: Visit, request: Request) -> bool:
        deadline = monotonic() + PATIENCE
        stopped = hung = False
        bytes_ = bytes_of(request)
        if not seat.locks(bytes_[0]).holder(bytes_[0], len(bytes_)):
            return False
        for byte in bytes_:
            try:
                stopped |= self._ask_holder(seat, byte, request, deadline) is Answer.STOPPED
            except Unconfirmed:
                hung = True
        if hung and not stopped:
            raise Unconfirmed
        return stopped

    def _cancel_stream(self, seat: Visit, request: Request) -> bool:
        name = Name(request.owner, request.session_id or "", request.stream_id or "")
        (byte,) = bytes_of(request)
        deadline = monotonic() + PATIENCE
        # A claim takes the byte and then looks for early cancels. Here it is the other way round,
        # so one of the two sees the other.
        for remembered in (False, True):
            answer = self._ask_holder(seat, byte, request, deadline)
            if answer is None and self._holds(byte):
                answer = self._receive(request)
            if answer is not None:
                if remembered:
                    seat.early.remove(name)
                return answer is Answer.STOPPED
            if not remembered:
                seat.early.add(name)
        return False

    # Joining

    def _look(self) -> None:
        """Has the directory joined anew when it is gone. In the loop's thread."""
        if self._closed:
            return
        if self._seat is None or not self._seat.directory.is_there():
            self._run_soon(self._seated)
        self._loop.call_later(_REJOIN, self._look)

    def _seated(self) -> Visit | None:
        """This process's place among the others, taken anew if the directory went away."""
        seat = self._seat
        if seat is not None and seat.directory.is_there():
            return seat
        if not self._closed and monotonic() >= self._rejoin_at:
            with contextlib.suppress(OSError):
                self._join()
        return self._seat if self._seat is not seat else None

    def _join(self) -> None:
        """Takes a place, and all bytes that this process's streams need there.

        Raises:
            OSError: There is none to be had now.
        """
        if not self._joining.acquire(False):
            return  # another thread is at it
        try:
            seat = self._take_seat()
            if self._seat is not None:
                self._settled_at = monotonic() + 3 * _REJOIN
            with self._lock:
                old, self._seat = self._seat, seat
                self._held, self._gone = {}, {}
                for claim in self._claims:
                    stream, name, session = bytes_of_claim(claim)
                    self._try(seat, stream, claim)
                    self._try(seat, name, claim)
                    any(not self._try(seat, byte, claim) for byte in session)  # the first free one
                self._places.move(seat.places)
        except OSError as error:
            if not self._away:
                self._away = True
                self._log(
                    f"[bus] unix is away: {error}. Streams go on; a stop for another worker's"
                    " stream is answered with 503. CHATSTREAM_BUS=unix:///a/directory sets another"
                )
            raise
        finally:
            self._rejoin_at = monotonic() + _REJOIN
            self._joining.release()
        if old is not None:
            old.leave()
        if old is not None or self._away:
            self._away = False
            self._log(f"[bus] unix is back; {len(self._claims)} streams are registered")

    def _take_seat(self) -> Visit:
        return Seat(self._path, self._loop, self._answer)

    # What lives

    def _here(self) -> Worker:
        return Worker(str(os.getpid()), os.getpid(), socket.gethostname())

    def _others(self) -> list[Worker]:
        seat = self._seated()
        if seat is None or monotonic() < self._settled_at:
            raise BusUnavailable
        try:
            return [Worker(str(pid), pid, socket.gethostname()) for pid in seat.directory.workers()]
        except OSError as error:  # it goes away in this moment
            raise BusUnavailable from error

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        seat = self._seated()
        if seat is None:
            raise BusUnavailable
        by_pid = {worker.pid: enquiry for worker, enquiry in enquiries.items()}
        pages = seat.ask_for_pages(by_pid, monotonic() + PATIENCE)
        return {worker: pages[worker.pid] for worker in enquiries if worker.pid in pages}

    def check(self) -> None:
        if self._seated() is None:
            raise BusUnavailable

    # The places of owners

    def _take_place(self, seat: Visit, claim: Claim, limit: int, superseded: bool) -> None:
        """Gives a claim's session a place; others give theirs up for it that need them no more.

        Raises:
            Refused: All are taken by live streams.
        """
        if not self._is_live(claim) or self._try_place(claim, limit, superseded):
            return
        owner, deadline = claim.name.owner, monotonic() + PATIENCE
        for pid in holders(seat.places(owner), owner):
            with contextlib.suppress(Unconfirmed):  # it hangs: what it has counts
                seat.ask(pid, Request(Action.VACATE, owner), deadline)
        if not self._try_place(claim, limit) and self._is_live(claim):
            raise too_many(limit)

    def _try_place(self, claim: Claim, limit: int, superseded: bool = False) -> bool:
        """Whether the session has a place now; after it has superseded a stream, a spare one."""
        with self._lock:
            if self._places.take_everywhere(claim, limit):
                return True
            if superseded and self._places.settle(claim):
                return True  # the place that it freed has been taken, or its worker hangs
            vacated = self._places.vacate(claim.name.owner)
            return vacated and self._places.take_everywhere(claim, limit)

    # The bytes

    def _take_all(self, seat: Visit, claim: Claim, reject: bool, limit: int | None) -> None:
        """Takes a claim's bytes, and a place if there is a limit."""
        superseded = False
        if not self._take_free(seat, claim):
            if limit and not reject:
                with self._lock:
                    self._places.take_spare(claim)
            superseded = self._take_names(seat, claim, reject)
        if limit:
            self._take_place(seat, claim, limit, superseded)

    def _take_free(self, seat: Visit, claim: Claim) -> bool:
        """Takes a claim's bytes. Whether no other worker had one: else there is somebody to ask."""
        stream, name, session = bytes_of_claim(claim)
        with self._lock:
            for byte in (stream, name, session[0]):
                if self._try(seat, byte, claim):
                    return False
        return not seat.locks(session[1]).holder(session[1], len(session) - 1)

    def _take_names(self, seat: Visit, claim: Claim, reject: bool) -> bool:
        """Takes a claim's bytes. Whether a stream is superseded, if only when its worker wakes."""
        owner, session_id, stream_id = claim.name
        for probe in (
            Request(Action.PROBE, owner, None, stream_id),
            Request(Action.PROBE, *claim.name),
        ):
            self._take(seat, claim, bytes_of(probe), probe)
        action = Action.PROBE if reject else Action.SUPERSEDE
        ask = Request(action, owner, session_id)
        return self._take(seat, claim, bytes_of(ask), ask)

    def _take(self, seat: Visit, claim: Claim, bytes_: list[int], request: Request) -> bool:
        """Takes the first byte that is free or let go of, and has the holders of the rest let go.

        Returns:
            Whether a holder's stream was stopped by this, or its worker hangs.

        Raises:
            Refused: The stream of a holder is live, or may be, and `request` is a probe.
            Unconfirmed: All bytes are held by workers that hang.
        """
        deadline = monotonic() + PATIENCE
        what = "session" if request.stream_id is None else "stream"
        taken, stopped, hung = False, False, []
        for number, byte in enumerate(bytes_):
            if taken and not seat.locks(byte).holder(byte, len(bytes_) - number):
                break
            try:
                answer = self._ask_holder(seat, byte, request, deadline, None if taken else claim)
            except Unconfirmed:
                if request.action is Action.PROBE:
                    raise conflict(what) from None
                hung.append(byte)
                continue
            if answer is Answer.LIVE:
                raise conflict(what)
            taken, stopped = True, stopped or answer is Answer.STOPPED
        if not taken:
            raise Unconfirmed
        for byte in hung:  # one that has ended meanwhile may have made room for another
            with contextlib.suppress(Unconfirmed):
                self._ask_holder(seat, byte, request, deadline)
        return stopped or bool(hung)

    def _ask_holder(
        self,
        seat: Visit,
        byte: int,
        request: Request,
        deadline: float,
        claim: Claim | None = None,
    ) -> Answer | None:
        """The answer of the worker that holds `byte`; None if no other does.

        Of those that let go of it: STOPPED if one had to end its stream for that.

        Args:
            seat: Where.
            byte: Who has it is asked.
            request: What it is asked. Other than a cancel, it makes the holder let go of the byte
                unless its stream is live, and then whoever has it next is asked.
            deadline: When to give up.
            claim: Takes the byte when it is free.

        Raises:
            Unconfirmed: It does not answer.
        """
        let_go = None
        for _ in range(_TRIES):
            if claim is None:
                pid = seat.locks(byte).holder(byte)
            else:
                with self._lock:
                    pid = self._try(seat, byte, claim)
            if not pid or (claim is not None and not self._is_live(claim)):
                return let_go
            answer = seat.ask(pid, request, deadline)
            if answer is not None and request.action is Action.CANCEL:
                return answer
            if answer is Answer.LIVE and request.action is Action.PROBE:
                return answer
            if answer is Answer.STOPPED:
                let_go = answer
        raise Unconfirmed

    def _try(self, seat: Visit, byte: int, claim: Claim) -> int:
        """Takes `byte`; returns 0, or the pid of the worker that has it. Under the lock."""
        pid = seat.locks(byte).take(byte)
        if not pid:
            self._held.setdefault(byte, set()).add(claim)
        return pid

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
                    if self._seat is not None:
                        self._seat.locks(byte).drop(byte)

    # Answering, in the loop's thread

    def _answer(self, data: bytes, awaited: bool) -> bytes | None:
        with contextlib.suppress(Malformed):
            request = decode(data)
            if isinstance(request, Request):
                return encode(Reply(self._obey(request), request.id, str(os.getpid())))
            if isinstance(request, Enquiry):
                return encode(self._page(request, str(os.getpid()), awaited=awaited))
        if not self._complained:
            self._complained = True
            self._log("[bus] unix: dropped a message that is none of ours")
        return None

    def _obey(self, request: Request) -> Answer:
        if request.action is Action.CANCEL:
            return self._receive(request)
        if request.action is Action.VACATE:
            with self._lock:
                self._places.vacate(request.owner)
            return Answer.ABSENT
        # Only what holds the name is asked for: a stream that is still claiming it will ask whoever
        # gets it next. So of streams that begin at once the last to hold it is the one that stays.
        with self._lock:
            claims = [claim for byte in bytes_of(request) for claim in self._held.get(byte, ())]
        answers = {
            self._receive(Request(request.action, *claim.name, before=request.before))
            for claim in claims
        }
        if Answer.LIVE in answers:
            return Answer.LIVE
        with self._lock:
            # One that has no place yet leaves none to who supersedes it: else streams that begin at
            # once would bring each other past the limit.
            placed = not self._limited or any(map(self._places.has, claims))
            for claim in claims:
                self._drop(claim, bytes_of(request))
            if self._places:
                self._places.vacate(request.owner)
        return Answer.STOPPED if placed and Answer.STOPPED in answers else Answer.ABSENT

    def _log(self, words: str) -> None:
        self._run_soon(partial(log.warning, words))
