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
from chatstream.bus.unix.membership import Membership
from chatstream.bus.unix.names import Names, bytes_of
from chatstream.bus.unix.seat import Seat, Visit
from chatstream.errors import BusUnavailable, StreamError, Unconfirmed, too_many
from chatstream.sockets import native
from chatstream.sockets.loop import Loop

log = logging.getLogger("chatstream")


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
        # Guards all below, and the record locks that they mirror: held for system calls that return
        # at once.
        self._lock = native.allocate_lock()
        self._membership = Membership(loop, self._lock, self._take_seat, self._move_in, self._log)
        self._names = Names(self._lock, self._is_live)
        self._places = LockedPlaces(self._session_is_live)
        self._limited = False  # the last claim had a limit

    def start(self) -> None:
        self._run_soon = native.runner()
        self._membership.start(self._run_soon)

    def close(self) -> None:
        with self._lock:
            seat = self._membership.close()
            self._names.clear()
            self._places.clear()
        if seat is not None:
            seat.leave()

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        with self._lock:
            self._names.add(claim)
            self._limited = bool(limit)
        try:
            return self._claim(claim, reject, limit)
        except StreamError:
            with self._lock:
                self._names.refuse(claim)
                self._places.leave(claim, refused=True)
            raise

    def _claim(self, claim: Claim, reject: bool, limit: int | None) -> bool:
        try:
            seat = self._membership.seated()
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
        with self._lock:
            self._names.release(claim, REMEMBER)
            if self._places:
                self._places.leave(claim)

    def cancel_elsewhere(self, request: Request) -> bool:
        seat = self._membership.seated()
        if seat is None:
            raise BusUnavailable
        cancel = self._cancel_session if request.stream_id is None else self._cancel_stream
        if cancel(seat, request):
            return True
        if not self._membership.settled:
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
                stopped |= self._names.ask_holder(seat, byte, request, deadline) is Answer.STOPPED
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
            answer = self._names.ask_holder(seat, byte, request, deadline)
            if answer is None and self._names.holds(byte):
                answer = self._receive(request)
            if answer is not None:
                if remembered:
                    seat.early.remove(name)
                return answer is Answer.STOPPED
            if not remembered:
                seat.early.add(name)
        return False

    # Its seat

    def _take_seat(self) -> Visit:
        return Seat(self._path, self._loop, self._answer)

    def _move_in(self, seat: Visit) -> int:
        """Takes there what this process's streams need; says how many these are. Under the lock."""
        streams = self._names.move(seat)
        self._places.move(seat.places)
        return streams

    # What lives

    def _here(self) -> Worker:
        return Worker(str(os.getpid()), os.getpid(), socket.gethostname())

    def _others(self) -> list[Worker]:
        seat = self._membership.seated()
        if seat is None or not self._membership.settled:
            raise BusUnavailable
        try:
            return [Worker(str(pid), pid, socket.gethostname()) for pid in seat.directory.workers()]
        except OSError as error:  # it goes away in this moment
            raise BusUnavailable from error

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        seat = self._membership.seated()
        if seat is None:
            raise BusUnavailable
        by_pid = {worker.pid: enquiry for worker, enquiry in enquiries.items()}
        pages = seat.ask_for_pages(by_pid, monotonic() + PATIENCE)
        return {worker: pages[worker.pid] for worker in enquiries if worker.pid in pages}

    def check(self) -> None:
        if self._membership.seated() is None:
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
        if not self._names.take_free(seat, claim):
            if limit and not reject:
                with self._lock:
                    self._places.take_spare(claim)
            superseded = self._names.take_names(seat, claim, reject, PATIENCE)
        if limit:
            self._take_place(seat, claim, limit, superseded)

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
            claims = self._names.claims_on(bytes_of(request))
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
                self._names.drop(claim, bytes_of(request))
            if self._places:
                self._places.vacate(request.owner)
        return Answer.STOPPED if placed and Answer.STOPPED in answers else Answer.ABSENT

    def _log(self, words: str) -> None:
        self._run_soon(partial(log.warning, words))
