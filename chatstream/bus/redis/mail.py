"""The mail: messages to other workers, what they say, and what this one answers."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from chatstream.bus.base import PATIENCE, Receive
from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Malformed,
    Message,
    Page,
    Reply,
    Request,
    Worker,
    decode,
    encode,
)
from chatstream.bus.redis.keys import Keys, contest_id, ms, name_of, worker_of
from chatstream.bus.redis.server import FAULTS, let_go
from chatstream.errors import Unconfirmed

log = logging.getLogger("chatstream")

LISTEN = 1.0
"""Seconds of one wait for mail. Between two of them the worker's entries are refreshed."""

_MAIL = 1000
"""Messages that a mailbox keeps, about."""

_MAIL_TTL = 60_000
"""Milliseconds that mail is kept when nobody writes any more."""

_WORKER = re.compile(r"[0-9a-f]{32}")


class Mail:
    """What this worker sends, waits for and reads.

    Safe from any thread, but for what the listener alone does. Raises `FAULTS` where the server is
    away.
    """

    def __init__(
        self,
        commands: Any,
        mailbox: Any,
        keys: Keys,
        receive: Receive,
        page: Callable[[Enquiry, bool], Page],
    ) -> None:
        """
        Args:
            commands: A client of the server.
            mailbox: Another, for the listener alone, which waits `LISTEN` seconds longer.
            keys: This worker's.
            receive: See `Bus`.
            page: What this worker has, and whether somebody waits for that; see `Bus`.
        """
        self._commands = commands
        self._mailbox = mailbox
        self._keys = keys
        self._receive = receive
        self._page = page
        self._lock = threading.Lock()  # guards the one below
        self._exchanges: dict[str, _Exchange] = {}  # by request
        self._complained = False

    def send(self, worker: str, message: Message) -> None:
        """Puts a message into a worker's mailbox."""
        mail = self._keys.mail_of(worker)
        pipeline = self._commands.pipeline(transaction=False)
        pipeline.xadd(mail, {"message": encode(message)}, maxlen=_MAIL, approximate=True)
        pipeline.pexpire(mail, _MAIL_TTL)
        pipeline.execute()

    def ask(self, worker: str, request: Request, deadline: float) -> Answer:
        """What the worker says.

        Raises:
            Unconfirmed: Nothing, by the deadline.
        """
        exchange = _Exchange()
        with self._lock:
            self._exchanges[request.id] = exchange
        try:
            self.send(worker, dataclasses.replace(request, origin=self._keys.worker))
            if not exchange.done.wait(max(0.0, deadline - monotonic())):
                raise Unconfirmed
        finally:
            with self._lock:
                self._exchanges.pop(request.id, None)
        return exchange.answer

    def ask_all(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        """What each of these workers says; None if it is silent for `PATIENCE` seconds."""
        deadline = monotonic() + PATIENCE
        exchanges = {enquiry.id: _Exchange() for enquiry in enquiries.values()}
        with self._lock:
            self._exchanges |= exchanges
        try:
            for worker, enquiry in enquiries.items():
                self.send(worker.id, dataclasses.replace(enquiry, origin=self._keys.worker))
            for exchange in exchanges.values():
                exchange.done.wait(max(0.0, deadline - monotonic()))
        finally:
            with self._lock:
                for id_ in exchanges:
                    self._exchanges.pop(id_, None)
        return {worker: exchanges[enquiry.id].page for worker, enquiry in enquiries.items()}

    def contest(self, claim: Claim, other: bytes) -> None:
        """Asks whether what else stands for a claim's session is live. Then the claim's ends."""
        owner, session_id, _ = claim.name
        probe = Request(
            Action.PROBE,
            owner,
            session_id,
            name_of(other),
            origin=self._keys.worker,
            id=contest_id(claim),
        )
        with self._lock:
            self._exchanges[probe.id] = _Exchange(claim)
        self.send(worker_of(other), probe)

    def settle(self, claim: Claim) -> None:
        """What a claim contests is of no interest any more."""
        with self._lock:
            self._exchanges.pop(contest_id(claim), None)

    # The listener's

    def read(self) -> None:
        """Reads what is there; waits `LISTEN` for it. What was read is deleted after it was done:
        rather twice than never, and to do it twice changes nothing."""
        mine = self._keys.mail_of(self._keys.worker)
        read = self._mailbox.xread({mine: "0-0"}, block=ms(LISTEN))
        for _, entries in read or ():
            for entry_id, fields in entries:
                self._take(fields.get(b"message", b""), entry_id)
            self._mailbox.xdel(mine, *(entry_id for entry_id, _ in entries))

    def _take(self, data: bytes, entry_id: bytes) -> None:
        try:
            message = decode(data)
            if not _WORKER.fullmatch(message.origin):
                raise Malformed("the origin is no worker's")
        except Malformed:
            if not self._complained:
                self._complained = True
                log.warning("[bus] redis: dropped a message that is none of ours")
            return
        if isinstance(message, Request):
            reply = Reply(self._receive(message), message.id, self._keys.worker)
            self.send(message.origin, reply)
        elif isinstance(message, Enquiry):
            self.send(message.origin, self._answer(message, entry_id))
        else:
            self._hear(message)

    def _hear(self, message: Reply | Page) -> None:
        """What somebody waits for, or a claim that is contested."""
        with self._lock:
            exchange = self._exchanges.get(message.id)
            if exchange is not None and exchange.contested is not None:
                del self._exchanges[message.id]
        if exchange is None:
            return  # it came too late
        if isinstance(message, Page):
            exchange.page = message
            exchange.done.set()
            return
        if exchange.contested is not None and message.answer is Answer.LIVE:
            self._receive(Request(Action.SUPERSEDE, *exchange.contested.name))
        exchange.answer = message.answer
        exchange.done.set()

    def _answer(self, enquiry: Enquiry, entry_id: bytes) -> Page:
        """The page for an enquiry. What it stops began before it was sent, which its entry tells.

        Both instants are the server's. What begins while it is asked for the time may be stopped
        too: whoever asked to stop all is waiting then.
        """
        if not enquiry.stop:
            return self._page(enquiry, True)
        seconds, micros = self._mailbox.time()
        age = max(0.0, seconds + micros / 1e6 - int(entry_id.split(b"-")[0]) / 1e3)
        enquiry = dataclasses.replace(enquiry, before=monotonic() - age)
        return self._page(enquiry, age < PATIENCE)

    def let_go(self) -> None:
        """A new connection next time, if there is one."""
        let_go(self._mailbox)

    def leave(self) -> None:
        """Takes this worker, and its mailbox, out of Redis."""
        me = self._keys.worker
        with contextlib.suppress(*FAULTS):
            self._mailbox.srem(self._keys.workers, me)
            self._mailbox.delete(self._keys.mail_of(me), self._keys.of_worker(me))
        self.let_go()


class _Exchange:
    """A request that waits for its reply.

    Attributes:
        contested: Our claim that has to end if the reply is `live`; nobody waits then.
    """

    def __init__(self, contested: Claim | None = None) -> None:
        self.contested = contested
        self.done = threading.Event()
        self.answer = Answer.ABSENT  # until `done`
        self.page: Page | None = None  # likewise, of an enquiry
