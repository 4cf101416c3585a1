"""The bytes of names: which they are, what this process holds, and how other holders are asked."""

from __future__ import annotations

import _thread
import contextlib
import itertools
from collections.abc import Callable
from time import monotonic

from chatstream.bus.messages import Action, Answer, Claim, Name, Request, digest
from chatstream.bus.unix.seat import Visit
from chatstream.errors import Unconfirmed, conflict

_SLOTS = 4
"""Bytes of a session. A claim takes the first; where a worker that hangs has it, the next one."""

_TRIES = 200
"""How often a byte is asked for again whose holder let go of it, or ended, in between."""

_GONE = 4096
"""Streams that have been and are remembered, at most."""


class Names:
    """The claims of this process's streams, and the bytes that they hold.

    Safe from any thread; some of it only under the lock, which the caller then has. The name's byte
    of a stream that has been stays held for a while, so that a cancel for it is known to be late.
    """

    def __init__(self, lock: _thread.LockType, is_live: Callable[[Claim], bool]) -> None:
        """
        Args:
            lock: Guards all of it, and the record locks that it mirrors.
            is_live: Whether a claim is still worth its bytes.
        """
        self._lock = lock
        self._is_live = is_live
        self._seat: Visit | None = None
        self._claims: set[Claim] = set()
        self._held: dict[int, set[Claim]] = {}
        self._gone: dict[Claim, float] = {}  # until when, oldest first

    # Under the lock

    def add(self, claim: Claim) -> None:
        """Has a claim that takes its bytes next, here and in each new seat."""
        self._claims.add(claim)

    def refuse(self, claim: Claim) -> None:
        """Forgets a claim, and lets go of whatever it has got."""
        stream, name, session = bytes_of_claim(claim)
        self.drop(claim, [stream, name, *session])
        self._claims.discard(claim)

    def release(self, claim: Claim, remember: float) -> None:
        """Lets go of a claim's bytes; of its name's in `remember` seconds, or when many follow."""
        now = monotonic()
        self._claims.discard(claim)
        stream, _, session = bytes_of_claim(claim)
        self.drop(claim, [stream, *session])
        self._gone[claim] = now + remember
        for gone, until in list(itertools.islice(self._gone.items(), 2)):
            if until <= now or len(self._gone) > _GONE:
                del self._gone[gone]
                self.drop(gone, [name_byte(gone.name)])

    def move(self, seat: Visit) -> int:
        """Takes the bytes of all claims in a new seat. Returns how many claims these are."""
        self._seat, self._held, self._gone = seat, {}, {}
        for claim in self._claims:
            stream, name, session = bytes_of_claim(claim)
            self._try(seat, stream, claim)
            self._try(seat, name, claim)
            any(not self._try(seat, byte, claim) for byte in session)  # the first free one
        return len(self._claims)

    def clear(self) -> None:
        """Forgets all; the locks go with the seat."""
        self._seat = None
        self._held.clear()
        self._gone.clear()
        self._claims.clear()

    def claims_on(self, bytes_: list[int]) -> list[Claim]:
        """This process's claims that hold any of these bytes."""
        return [claim for byte in bytes_ for claim in self._held.get(byte, ())]

    def drop(self, claim: Claim, bytes_: list[int]) -> None:
        """Lets go of bytes, but for those that another claim holds too."""
        for byte in bytes_:
            claims = self._held.get(byte, set())
            if claim in claims:
                claims.remove(claim)
                if not claims:
                    del self._held[byte]
                    if self._seat is not None:
                        self._seat.locks(byte).drop(byte)

    def _try(self, seat: Visit, byte: int, claim: Claim) -> int:
        """Takes `byte`; returns 0, or the pid of the worker that has it. Under the lock."""
        pid = seat.locks(byte).take(byte)
        if not pid:
            self._held.setdefault(byte, set()).add(claim)
        return pid

    # Without it

    def holds(self, byte: int) -> bool:
        """Whether a claim of this process holds it."""
        with self._lock:
            return byte in self._held

    def take_free(self, seat: Visit, claim: Claim) -> bool:
        """Takes a claim's bytes. Whether no other worker had one: else there is somebody to ask."""
        stream, name, session = bytes_of_claim(claim)
        with self._lock:
            for byte in (stream, name, session[0]):
                if self._try(seat, byte, claim):
                    return False
        return not seat.locks(session[1]).holder(session[1], len(session) - 1)

    def take_names(self, seat: Visit, claim: Claim, reject: bool, patience: float) -> bool:
        """Takes a claim's bytes. Whether a stream is superseded, if only when its worker wakes.

        Args:
            seat: Where.
            claim: Whose.
            reject: Whether a live stream of the session refuses the claim instead.
            patience: Seconds to wait for the holders of each name.

        Raises:
            Refused: The stream of a holder is live, or may be.
            Unconfirmed: All bytes of the session are held by workers that hang.
        """
        owner, session_id, stream_id = claim.name
        for probe in (
            Request(Action.PROBE, owner, None, stream_id),
            Request(Action.PROBE, *claim.name),
        ):
            self._take(seat, claim, probe, monotonic() + patience)
        action = Action.PROBE if reject else Action.SUPERSEDE
        ask = Request(action, owner, session_id)
        return self._take(seat, claim, ask, monotonic() + patience)

    def _take(self, seat: Visit, claim: Claim, request: Request, deadline: float) -> bool:
        """Takes the first byte that is free or let go of, and has the holders of the rest let go.

        Those are meant that `request` names.

        Returns:
            Whether a holder's stream was stopped by this, or its worker hangs.

        Raises:
            Refused: The stream of a holder is live, or may be, and `request` is a probe.
            Unconfirmed: All bytes are held by workers that hang.
        """
        bytes_ = bytes_of(request)
        what = "session" if request.stream_id is None else "stream"
        taken, stopped, hung = False, False, []
        for number, byte in enumerate(bytes_):
            if taken and not seat.locks(byte).holder(byte, len(bytes_) - number):
                break
            try:
                answer = self.ask_holder(seat, byte, request, deadline, None if taken else claim)
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
                self.ask_holder(seat, byte, request, deadline)
        return stopped or bool(hung)

    def ask_holder(
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


def bytes_of(request: Request) -> list[int]:
    """The bytes of what a request names: a stream of a session, a stream of any, or a session."""
    owner, session_id, stream_id = request.owner, request.session_id, request.stream_id
    if stream_id is None:
        return _session_bytes(owner, session_id or "")
    if session_id is None:
        return [_number("stream", owner, stream_id)]
    return [name_byte(Name(owner, session_id, stream_id))]


def bytes_of_claim(claim: Claim) -> tuple[int, int, list[int]]:
    """Its stream's byte, its whole name's, and its session's."""
    owner, session_id, stream_id = claim.name
    stream = _number("stream", owner, stream_id)
    return stream, name_byte(claim.name), _session_bytes(owner, session_id)


def name_byte(name: Name) -> int:
    return _number("name", *name)


def _session_bytes(owner: str, session_id: str) -> list[int]:
    first = _number("session", owner, session_id)
    return list(range(first, first + _SLOTS))


def _number(*words: str) -> int:
    """A number for a name: 60 bits of a hash, above all pids, with room for slots."""
    return 1 << 62 | int(digest(*words)[:15], 16) << 2
