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

import contextlib
import dataclasses
import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Mapping
from time import monotonic

from chatstream.bus.base import PATIENCE, REMEMBER, REMEMBER_PER_OWNER, Bus, Lives, Receive
from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Found,
    Malformed,
    Message,
    Name,
    Page,
    Reply,
    Request,
    Worker,
    decode,
    digest,
    encode,
)
from chatstream.bus.places import Places
from chatstream.bus.redis import scripts
from chatstream.bus.redis.keys import contest_id, ms, name_of, place_of, worker_of
from chatstream.bus.redis.server import COMMAND_TIMEOUT, FAULTS, connect, in_words
from chatstream.errors import BusUnavailable, Unconfirmed, conflict, too_many

log = logging.getLogger("chatstream")

_LISTEN = 1.0
"""Seconds of one wait for mail. Between two of them the worker's entries are refreshed."""

SETTLED = 4.0
"""Seconds after which a server without data has been told of all that lives: the listeners' turn,
their longest pause before they try again, and some more."""

_RETRY = (0.05, 2.0)
"""Seconds between two attempts to reach a server that is away: the first, and at most."""

_CONNECTIONS = 64
"""Commands at once; connections are made as they are needed."""

_BATCH = 500
"""Entries that are refreshed in one round trip."""

_MAIL = 1000
"""Messages that a mailbox keeps, about."""

_MAIL_TTL = 60_000
"""Milliseconds that mail is kept when nobody writes any more."""

_TRIES = 20
"""How often a claim begins again because what was in its way has changed meanwhile."""

_WORKER = re.compile(r"[0-9a-f]{32}")


class RedisBus(Bus):
    """For workers on many hosts.

    A claim and a release are one round trip; where another worker has the session, a claim waits
    for it, `PATIENCE` seconds at most, as a cancel does. While the server is away nothing waits.
    """

    name = "redis"

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
        self._prefix = prefix
        self._ttl = ttl
        self._worker = uuid.uuid4().hex
        self._commands = connect(url, connections=_CONNECTIONS)
        self._mailbox = connect(url, waiting=_LISTEN)
        self._claim_script = self._commands.register_script(scripts.CLAIM)
        self._refresh_script = self._commands.register_script(scripts.REFRESH)
        self._release_script = self._commands.register_script(scripts.RELEASE)
        self._find_script = self._commands.register_script(scripts.FIND)
        self._put_back_script = self._commands.register_script(scripts.PUT_BACK)
        self._since_script = self._commands.register_script(scripts.SINCE)
        self._lock = threading.Lock()  # guards the five below
        self._places = Places(self._session_is_live)  # for when Redis cannot be asked
        # What has to be in Redis, and what is in its way; None while `claim` itself sees to it.
        self._claims: dict[Claim, bytes | None] = {}
        self._exchanges: dict[str, _Exchange] = {}  # by request
        self._up = False
        self._away = False  # and somebody has said so
        self._looked = threading.Event()  # whether it is up is known
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="chatstream-bus", daemon=True)
        self._refreshed = self._checked = 0.0
        self._since = b""
        self._complained = False
        self._limit: int | None = None  # of an owner; there are places if there is one

    def start(self) -> None:
        self._listener.start()

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(*FAULTS):
            for claim in list(self._claims):
                self._forget(claim)
            self._send(self._worker, Reply(Answer.ABSENT, "close", self._worker))  # it wakes
        if self._listener.is_alive():
            self._listener.join(_LISTEN + 2 * COMMAND_TIMEOUT)
        self._commands.close()

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        self._limit = limit
        self._is_up()
        with self._lock:
            self._claims[claim] = None if self._up else b""
            up = self._up
        early = self._claim_there(claim, reject) if up else None
        if limit:
            self._take_place(claim, limit, counted=early is not None)
        return bool(early)

    def _claim_there(self, claim: Claim, reject: bool) -> bool | None:
        """`claim`, where Redis is there. None if it is not any more: it is left to the listener."""
        since = self._since
        try:
            early = self._claim(claim, reject)
        except FAULTS as error:
            self._leave_to_the_listener(claim)
            self._lost(error)
            return None
        except BaseException:
            with self._lock:
                self._claims.pop(claim, None)
            raise
        self._leave_to_the_listener(claim)
        if self._since != since:  # the server lost its data meanwhile
            self._refreshed = 0.0
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

    def _leave_to_the_listener(self, claim: Claim) -> None:
        """From now on the listener keeps the claim in Redis, unless it was released meanwhile."""
        with self._lock:
            if claim in self._claims:
                self._claims[claim] = b""

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._claims.pop(claim, None)
            self._exchanges.pop(contest_id(claim), None)
            if self._places:
                self._places.leave(claim)
            if not self._up:
                return
        try:
            self._forget(claim)
        except FAULTS as error:
            self._lost(error)

    def _cancel_elsewhere(self, request: Request) -> bool:
        deadline = monotonic() + PATIENCE
        if not self._is_up():
            raise BusUnavailable
        try:
            return self._cancel_there(request, deadline)
        except FAULTS as error:
            self._lost(error)
            raise BusUnavailable from error

    def _cancel_there(self, request: Request, deadline: float) -> bool:
        for _ in range(_TRIES):
            value = self._find(request)
            if value == b"unsure":
                raise BusUnavailable
            if value == b"absent" or worker_of(value) in ("gone", self._worker):
                # Looked for once more: it may have been claimed since the first look.
                return self._receive(request) is Answer.STOPPED
            there = dataclasses.replace(request, stream_id=request.stream_id or name_of(value))
            if self._ask(worker_of(value), there, deadline) is Answer.STOPPED:
                return True
            if request.stream_id is not None or self._find(request) == value:
                return False
        return False

    def _is_up(self) -> bool:
        """Whether the server is there. Waits until the listener has looked, at first."""
        if not self._up:
            self._looked.wait(COMMAND_TIMEOUT)
        return self._up

    # What stands in Redis

    def _claim(self, claim: Claim, reject: bool) -> bool:
        """`claim`, where Redis is there. Asks whoever is in the way whether it is live."""
        owner, session_id, stream_id = claim.name
        keys, values = self._keys_and_values(claim)
        over = {"session": b"", "stream": b""}
        ended: list[bytes] = []  # places
        for _ in range(_TRIES):
            if not self._is_live(claim):
                return False
            more = [ms(self._ttl), digest(*claim.name), int(reject), *over.values()]
            if self._limit:
                more += [place_of(claim), self._limit, *ended]
            found, value, early = (*self._claim_script(keys, [*values, *more]), None)[:3]
            if found == b"claimed":
                if value and (self._is_live(claim) or not self._put_back(claim, value)):
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
            return self._ask(worker_of(value), probe, monotonic() + PATIENCE) is Answer.LIVE
        except Unconfirmed:
            return True

    def _put_back(self, claim: Claim, value: bytes) -> bool:
        """Gives the session back to whom a stream took it that had ended before it could.

        A newer stream of this process may have ended it, and been superseded by that one since.

        Returns:
            Whether it was; not when a third stream has the session by now.
        """
        (session, _, _, *places), (mine, _) = self._keys_and_values(claim)
        more = [place_of(claim)] if places else []
        return bool(self._put_back_script([session, *places], [mine, value, ms(self._ttl), *more]))

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
            self._ask(worker_of(value), request, monotonic() + PATIENCE)
        except Unconfirmed:
            log.warning(
                "[bus] redis: the worker of stream=%s does not answer; it is superseded by"
                " stream=%s and told to stop when it does",
                name_of(value),
                name.stream_id,
            )

    def _find(self, request: Request) -> bytes:
        """What stands for what a cancel names. If nothing, a stream's cancel is remembered."""
        owner, session_id, stream_id = request.owner, request.session_id or "", request.stream_id
        key, name, session = self._key("session", owner, session_id), "", ""
        if stream_id is not None:
            key, session = self._key("stream", owner, stream_id), session_id
            name = digest(owner, session_id, stream_id)
        keys = [key, self._since_key, self._key("early", owner)]
        values = [ms(SETTLED), name, ms(REMEMBER), REMEMBER_PER_OWNER, session]
        found: bytes = self._find_script(keys, values)
        return found

    def _forget(self, claim: Claim) -> None:
        keys, values = self._keys_and_values(claim)
        gone = f"gone 0 {claim.name.session_id}"
        more = [ms(REMEMBER), digest(*claim.name), gone]
        if self._limit:
            more.append(place_of(claim))
        self._release_script(keys, [*values, *more])

    def _refresh(self) -> set[Claim]:
        """Has every entry last for another while, and puts back those that are lost.

        Returns:
            What is registered now.
        """
        self._refreshed = monotonic()
        self._since = self._enrol()
        with self._lock:
            # One that is being claimed is not in the way of what it is about to supersede.
            claims = [(claim, over) for claim, over in self._claims.items() if over is not None]
        for at in range(0, len(claims), _BATCH):
            self._refresh_some(claims[at : at + _BATCH])
        return {claim for claim, _ in claims}

    def _enrol(self) -> bytes:
        """Has this worker found. With no stream at all it shows that the server takes a write.

        Returns:
            Since when the server has had its data.
        """
        pipeline, ttl = self._commands.pipeline(transaction=False), ms(self._ttl)
        pipeline.set(self._worker_key, f"{os.getpid()} {socket.gethostname()}", px=ttl)
        pipeline.sadd(self._workers_key, self._worker)
        pipeline.pexpire(self._workers_key, ttl)
        pipeline.execute()
        since: bytes = self._since_script([self._since_key])
        return since

    def _refresh_some(self, claims: list[tuple[Claim, bytes]]) -> None:
        pipeline = self._commands.pipeline(transaction=False)
        for claim, over in claims:
            keys, values = self._keys_and_values(claim)
            more = [ms(self._ttl), digest(*claim.name), over]
            if self._limit:
                more.append(place_of(claim))
            self._refresh_script(keys, [*values, *more], client=pipeline)
        for (claim, over), (early, other) in zip(claims, pipeline.execute(), strict=True):
            if early:  # cancelled by somebody who could not know that it was live
                self._receive(Request(Action.CANCEL, *claim.name))
            if other or over:
                self._contest(claim, other)
            if claim not in self._claims:  # released meanwhile
                self._forget(claim)

    def _contest(self, claim: Claim, other: bytes) -> None:
        """Another worker has a stream of this session: both began while they could not know.

        It is asked whether it is live. Then ours ends; if nothing is heard by the next refresh,
        ours takes its place.
        """
        with self._lock:
            if claim not in self._claims:
                return
            self._claims[claim] = other
        if other:
            owner, session_id, _ = claim.name
            probe = Request(
                Action.PROBE,
                owner,
                session_id,
                name_of(other),
                origin=self._worker,
                id=contest_id(claim),
            )
            with self._lock:
                self._exchanges[probe.id] = _Exchange(claim)
            self._send(worker_of(other), probe)

    def _keys_and_values(self, claim: Claim) -> tuple[list[str], list[str]]:
        (owner, session_id, stream_id), number = claim
        keys = [
            self._key("session", owner, session_id),
            self._key("stream", owner, stream_id),
            self._key("early", owner),
        ]
        if self._limit:
            keys.append(self._key("places", owner))
        mine = f"{self._worker} {number}"
        return keys, [f"{mine} {stream_id}", f"{mine} {session_id}"]

    def _key(self, kind: str, *words: str) -> str:
        return f"{self._prefix}:{kind}:{digest(*words)}"

    def check(self) -> None:
        if not self._is_up() or self._closing.is_set() or not self._listener.is_alive():
            raise BusUnavailable
        try:
            self._commands.ping()
        except FAULTS as error:
            self._lost(error)
            raise BusUnavailable from error

    # What lives

    def _here(self) -> Worker:
        return Worker(self._worker, os.getpid(), socket.gethostname())

    def _others(self) -> list[Worker]:
        if not self._is_up():
            raise BusUnavailable
        try:
            return self._workers()
        except FAULTS as error:
            self._lost(error)
            raise BusUnavailable from error

    def _workers(self) -> list[Worker]:
        """The other workers that Redis knows of. Takes those off its list that have expired."""
        pipeline = self._commands.pipeline(transaction=False)
        pipeline.time().get(self._since_key).smembers(self._workers_key)
        (seconds, _), since, ids = pipeline.execute()
        if since is not None and seconds * 1000 - int(since) < SETTLED * 1000:
            raise BusUnavailable  # it may have lost some
        others = sorted({word.decode() for word in ids} - {self._worker})
        if not others:
            return []
        values = self._commands.mget([f"{self._prefix}:worker:{each}" for each in others])
        expired = [each for each, value in zip(others, values, strict=True) if value is None]
        if expired:
            self._commands.srem(self._workers_key, *expired)
        return [
            Worker(each, int(words[0]), words[-1])
            for each, value in zip(others, values, strict=True)
            if value is not None and (words := value.decode().split(" ", 1))
        ]

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        deadline = monotonic() + PATIENCE
        exchanges = {enquiry.id: _Exchange() for enquiry in enquiries.values()}
        with self._lock:
            self._exchanges |= exchanges
        try:
            for worker, enquiry in enquiries.items():
                self._send(worker.id, dataclasses.replace(enquiry, origin=self._worker))
            for exchange in exchanges.values():
                exchange.done.wait(max(0.0, deadline - monotonic()))
        except FAULTS as error:
            self._lost(error)
            raise BusUnavailable from error
        finally:
            with self._lock:
                for id_ in exchanges:
                    self._exchanges.pop(id_, None)
        return {worker: exchanges[enquiry.id].page for worker, enquiry in enquiries.items()}

    # The mail

    def _ask(self, worker: str, request: Request, deadline: float) -> Answer:
        """What the worker says.

        Raises:
            Unconfirmed: Nothing, by the deadline.
        """
        exchange = _Exchange()
        with self._lock:
            self._exchanges[request.id] = exchange
        try:
            self._send(worker, dataclasses.replace(request, origin=self._worker))
            if not exchange.done.wait(max(0.0, deadline - monotonic())):
                raise Unconfirmed
        finally:
            with self._lock:
                self._exchanges.pop(request.id, None)
        return exchange.answer

    def _send(self, worker: str, message: Message) -> None:
        mail = f"{self._prefix}:mail:{worker}"
        pipeline = self._commands.pipeline(transaction=False)
        pipeline.xadd(mail, {"message": encode(message)}, maxlen=_MAIL, approximate=True)
        pipeline.pexpire(mail, _MAIL_TTL)
        pipeline.execute()

    def _listen(self) -> None:
        """The listener: reads the mail, refreshes the entries, and finds out when Redis is back."""
        first, longest = _RETRY
        pause = first
        while not self._closing.is_set():
            try:
                self._arrive()
                pause = first
                while self._up and not self._closing.is_set():
                    self._read_mail()
                    self._look_after()
            except Exception as error:
                self._lost(error)
            self._reconnect()
            self._closing.wait(pause)
            pause = min(2 * pause, longest)
        self._leave()

    def _look_after(self) -> None:
        """Refreshes the entries when it is time, and when the server has lost them."""
        now = monotonic()
        if now - self._refreshed > self._ttl / 3:
            self._refresh()
        elif now - self._checked >= _LISTEN / 2:
            self._checked = now
            if (self._commands.get(self._since_key) or b"") != self._since:
                self._refresh()

    def _arrive(self) -> None:
        """Redis is there: everything live is put into it, and then it counts as there."""
        while True:
            registered = self._refresh()
            with self._lock:
                if registered.issuperset(c for c, over in self._claims.items() if over is not None):
                    was_away, self._up, self._away = self._away, True, False
                    break
        self._looked.set()
        if was_away:
            log.warning("[bus] redis is back; %d streams are registered", len(registered))

    def _reconnect(self) -> None:
        """New connections next time: a server that became a replica is found again by its name."""
        with contextlib.suppress(Exception):
            self._mailbox.connection_pool.disconnect()
            # Those that wait in the pool; the pool's own method takes others' commands along.
            for connection in filter(None, list(self._commands.connection_pool.pool.queue)):
                connection.disconnect()

    def _leave(self) -> None:
        with contextlib.suppress(*FAULTS):
            self._mailbox.srem(self._workers_key, self._worker)
            self._mailbox.delete(self._mail, self._worker_key)
        self._mailbox.close()

    @property
    def _since_key(self) -> str:
        return f"{self._prefix}:since"

    @property
    def _worker_key(self) -> str:
        return f"{self._prefix}:worker:{self._worker}"

    @property
    def _workers_key(self) -> str:
        return f"{self._prefix}:workers"

    @property
    def _mail(self) -> str:
        return f"{self._prefix}:mail:{self._worker}"

    def _lost(self, error: Exception) -> None:
        """Redis is away. Whoever noticed first says so."""
        with self._lock:
            was_away, self._up, self._away = self._away, False, True
        self._looked.set()
        if was_away or self._closing.is_set():
            return
        if not isinstance(error, FAULTS):
            log.error("[bus] redis", exc_info=error)
        log.warning(
            "[bus] redis is away: %s. Streams go on; a stop for another worker's stream is"
            " answered with 503 until it is back",
            in_words(error),
        )

    def _read_mail(self) -> None:
        """Reads what is there; waits `_LISTEN` for it. What was read is deleted after it was done:
        rather twice than never, and to do it twice changes nothing."""
        read = self._mailbox.xread({self._mail: "0-0"}, block=ms(_LISTEN))
        for _, entries in read or ():
            for entry_id, fields in entries:
                self._take_message(fields.get(b"message", b""), entry_id)
            self._mailbox.xdel(self._mail, *(entry_id for entry_id, _ in entries))

    def _take_message(self, data: bytes, entry_id: bytes) -> None:
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
            reply = Reply(self._receive(message), message.id, self._worker)
            self._send(message.origin, reply)
            return
        if isinstance(message, Enquiry):
            self._send(message.origin, self._answer(message, entry_id))
            return
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
            return self._page(enquiry, self._worker)
        seconds, micros = self._mailbox.time()
        age = max(0.0, seconds + micros / 1e6 - int(entry_id.split(b"-")[0]) / 1e3)
        enquiry = dataclasses.replace(enquiry, before=monotonic() - age)
        return self._page(enquiry, self._worker, awaited=age < PATIENCE)


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
