"""The bus of many hosts: a Redis (or Valkey) server knows who has a stream, and holds the mail.

    <prefix>:session:<hash>   "<worker> <number> <stream id>"     expires, refreshed by the worker
    <prefix>:stream:<hash>    "<worker> <number> <session id>"    the same; "gone 0 …" after its end
    <prefix>:early:<hash>     an owner's early cancels            sorted by when they expire
    <prefix>:places:<hash>    an owner's places, by session       "<worker> <number> <expires>"
    <prefix>:since            since when the server has had its data
    <prefix>:mail:<worker>    a Redis stream of messages          see `chatstream.bus.base`
    <prefix>:worker:<worker>  its pid and its host                expires
    <prefix>:workers          all workers; some may have expired  expires

    worker A                         Redis                         worker B, on another host
      │ XREAD mail:A, waiting           │                             │
      │ claim (a script: both keys) ───>│                             │  POST /cancel/s
      │                                 │<──────── who has session s? ┤
      │                                 ├──────────────────────── A ─>│
      │<─ XREAD ────────────────────────┤<─ XADD mail:A, the request ─┤
      │ Stream.abort: provider told     │                             │
      ├─ XADD mail:B, the reply ───────>│                             │
      │                                 ├──────────────────── XREAD ─>│  200

Mail, not PUBLISH: what is sent before a worker listens, or while it reconnects, is read when it
does, so a stop that could not be confirmed is carried out all the same. All clocks are the
server's. A worker that dies stops refreshing and its entries expire; one with a silent stream does
not. A server that has lost its data has no `since`: until all workers can have put back what they
have, that it knows of no stream is no answer. Places are kept where owners have a limit: a claim
counts them, and where all are taken their workers are asked which sessions live. So a stream's end
frees its place at once, and nothing is sent for it. What a stream costs - two scripts, and its part
of a refresh - does not depend on the number of workers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import uuid
from collections.abc import Mapping
from time import monotonic

from chatstream.bus.base import PATIENCE, Bus, Lives, Receive
from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Found,
    Name,
    Page,
    Request,
    Worker,
    digest,
)
from chatstream.bus.places import Places
from chatstream.bus.redis.entries import Entries
from chatstream.bus.redis.keys import Keys, name_of, worker_of
from chatstream.bus.redis.listener import Listener
from chatstream.bus.redis.mail import LISTEN, Mail
from chatstream.bus.redis.server import FAULTS, connect
from chatstream.errors import BusUnavailable, Unconfirmed, conflict, too_many

log = logging.getLogger("chatstream")

_CONNECTIONS = 64
"""Commands at once; connections are made as they are needed."""

_TRIES = 20
"""How often a claim begins again because what was in its way has changed meanwhile."""


class RedisBus(Bus):
    """For workers on many hosts.

    A claim and a release are one round trip; where another worker has the session, a claim waits
    for it, `PATIENCE` seconds at most, as a cancel does. While the server is away nothing waits.
    """

    name = "redis"

    _entries_of: type[Entries] = Entries

    def __init__(
        self, receive: Receive, url: str, *, prefix: str, ttl: float, lives: Lives | None = None
    ) -> None:
        """
        Args:
            receive: See `Bus`.
            url: The server's, redis:// or rediss://. Options of redis-py may follow a `?`.
            prefix: What all keys begin with; a service's own.
            ttl: Seconds that an entry outlives its worker.
            lives: See `Bus`.
        """
        super().__init__(receive, lives)
        self._worker = uuid.uuid4().hex
        keys = Keys(prefix, self._worker)
        commands = connect(url, connections=_CONNECTIONS)
        mailbox = connect(url, waiting=LISTEN)
        self._entries = self._entries_of(commands, keys, ttl)
        self._mail = Mail(commands, mailbox, keys, receive, self._page_of_ours)
        self._listener = Listener(self._entries, self._mail, keys, receive, ttl)
        self._lock = threading.Lock()  # guards the one below
        self._places = Places(self._session_is_live)  # for when Redis cannot be asked

    def start(self) -> None:
        self._listener.start()

    def close(self) -> None:
        self._listener.close()
        self._entries.let_go()

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        self._entries.limit = limit
        self._listener.is_up()
        up = self._listener.begin(claim)
        early = self._claim_there(claim, reject) if up else None
        if limit:
            self._take_place(claim, limit, counted=early is not None)
        return bool(early)

    def _claim_there(self, claim: Claim, reject: bool) -> bool | None:
        """`claim`, where Redis is there. None if it is not any more: it is left to the listener."""
        since = self._listener.since
        try:
            early = self._claim(claim, reject)
        except FAULTS as error:
            self._listener.keep(claim)
            self._listener.lost(error)
            return None
        except BusUnavailable:  # so it was lost while others were asked, and that has been said
            self._listener.keep(claim)
            self._listener.refresh_soon()
            return None
        except BaseException:
            self._listener.drop(claim)
            raise
        self._listener.keep(claim)
        if self._listener.since != since:  # the server lost its data meanwhile
            self._listener.refresh_soon()
        return early

    def _take_place(self, claim: Claim, limit: int, *, counted: bool) -> None:
        """Notes the place that a claim has in Redis, or counts those of this process.

        Raises:
            Refused: They are as many as may be.
        """
        with self._lock:
            if counted:
                self._places.note(claim)
            taken = counted or self._places.take(claim, limit)
        if not taken and self._is_live(claim):
            self.release(claim)
            raise too_many(limit)

    def release(self, claim: Claim) -> None:
        up = self._listener.drop(claim)
        with self._lock:
            if self._places:
                self._places.leave(claim)
        if up:
            try:
                self._entries.release(claim)
            except FAULTS as error:
                self._listener.lost(error)

    def cancel_elsewhere(self, request: Request) -> bool:
        # A stream that is there can be found and told to stop before the listener's first look: the
        # reply is read after that.
        if self._listener.is_away():
            raise BusUnavailable
        with self._listener.needed():
            return self._cancel_there(request)

    def _cancel_there(self, request: Request) -> bool:
        value = self._entries.find(request)
        # The worker's time begins here: a process's first connection is none of its business.
        deadline = monotonic() + PATIENCE
        for _ in range(_TRIES):
            if value == b"unsure":
                raise BusUnavailable
            if value == b"absent" or worker_of(value) in ("gone", self._worker):
                # Looked for once more: it may have been claimed since the first look.
                return self._receive(request) is Answer.STOPPED
            there = dataclasses.replace(request, stream_id=request.stream_id or name_of(value))
            if self._mail.ask(worker_of(value), there, deadline) is Answer.STOPPED:
                return True
            if request.stream_id is not None or (again := self._entries.find(request)) == value:
                return False
            value = again
        return False

    # What stands in Redis

    def _claim(self, claim: Claim, reject: bool) -> bool:
        """`claim`, where Redis is there. Asks whoever is in the way whether it is live."""
        owner, session_id, stream_id = claim.name
        over = {"session": b"", "stream": b""}
        ended: list[bytes] = []  # places
        for _ in range(_TRIES):
            if not self._is_live(claim):
                return False
            found, value, early = self._entries.claim(
                claim, reject=reject, over=[*over.values()], ended=ended
            )
            if found == b"claimed":
                if value and (self._is_live(claim) or not self._entries.put_back(claim, value)):
                    self._supersede(claim.name, value)
                return bool(early)
            if found == b"places":
                ended = self._ended(owner, value)
                if not ended:
                    raise too_many(len(value))
                continue
            what = found.decode()
            in_the_way = {"session": (session_id, None), "stream": (None, stream_id)}[what]
            if self._holder_is_live(value, Request(Action.PROBE, owner, *in_the_way)):
                raise conflict(what)
            over[what] = value
        raise Unconfirmed

    def _holder_is_live(self, value: bytes, probe: Request) -> bool:
        """Whether what stands there is a live stream. If its worker does not say, it may be."""
        try:
            answer = self._mail.ask(worker_of(value), probe, monotonic() + PATIENCE)
        except Unconfirmed:
            return True
        return answer is Answer.LIVE

    def _ended(self, owner: str, places: list[bytes]) -> list[bytes]:
        """Those of an owner's places whose sessions are not live, as their workers say.

        A worker that says nothing has only live ones.
        """
        by_worker: dict[str, dict[str, bytes]] = {}
        for place in places:
            session, worker, _ = place.decode().split(" ")
            by_worker.setdefault(worker, {})[session] = place
        asked = {Worker(worker, 0, ""): 0 for worker in by_worker if worker != self._worker}
        found = {worker: Found(worker, [], False) for worker in asked}
        while asked:
            asked = self._turn(Enquiry(owner), asked, found)
        here = self._here()
        if self._lives is not None:
            found[here] = Found(here, [*self._lives(Enquiry(owner))], True)
        ended: list[bytes] = []
        for said in found.values():
            live = {digest(owner, each.name.session_id) for each in said.streams}
            mine = by_worker.get(said.worker.id, {}) if said.answered else {}
            ended += [place for session, place in mine.items() if session not in live]
        return ended

    def _supersede(self, name: Name, value: bytes) -> None:
        request = Request(Action.SUPERSEDE, name.owner, name.session_id, name_of(value))
        try:
            self._mail.ask(worker_of(value), request, monotonic() + PATIENCE)
        except Unconfirmed:
            log.warning(
                "[bus] redis: the worker of stream=%s does not answer; it is superseded by"
                " stream=%s and told to stop when it does",
                name_of(value),
                name.stream_id,
            )

    def check(self) -> None:
        if not self._listener.is_up() or not self._listener.listens():
            raise BusUnavailable
        with self._listener.needed():
            self._entries.ping()

    # What lives

    def _here(self) -> Worker:
        return Worker(self._worker, os.getpid(), socket.gethostname())

    def _others(self) -> list[Worker]:
        if not self._listener.is_up():
            raise BusUnavailable
        with self._listener.needed():
            return self._entries.workers()

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        with self._listener.needed():
            return self._mail.ask_all(enquiries)

    def _page_of_ours(self, enquiry: Enquiry, awaited: bool) -> Page:
        return self._page(enquiry, self._worker, awaited=awaited)
