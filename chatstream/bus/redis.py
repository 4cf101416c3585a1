"""The bus of many hosts: a Redis (or Valkey) server knows who has a stream, and holds the mail.

    <prefix>:session:<hash>   "<worker> <number> <stream id>"     expires, refreshed by the worker
    <prefix>:stream:<hash>    "<worker> <number> <session id>"    the same; "" once it has been
    <prefix>:early:<hash>     an owner's early cancels            sorted by when they expire
    <prefix>:mail:<worker>    a Redis stream of messages          see `chatstream.bus.base`
    <prefix>:worker:<worker>  its pid, for people who look        expires

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
not. What a stream costs - two scripts, and its part of a refresh - does not depend on the number of
workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import threading
import uuid
from time import monotonic
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from chatstream.bus.base import (
    PATIENCE,
    REMEMBER,
    REMEMBER_PER_OWNER,
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
from chatstream.errors import BusUnavailable, ConfigError, Unconfirmed, conflict

log = logging.getLogger("chatstream")

COMMAND_TIMEOUT = 0.4
"""Seconds for one command; `?socket_timeout=` in the address overrides it."""

_LISTEN = 1.0
"""Seconds of one wait for mail. Between two of them the worker's entries are refreshed."""

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

_FAULTS = (redis.RedisError, OSError)

_STATE = """
-- What stands in the way of `mine`: 'free' for nothing (or a stream that has been, or one that the
-- caller knows to be over, or an older one of the same worker), 'newer' for a newer one of the same
-- worker, 'other' for another worker's.
local function parse(value)
  local worker, number = string.match(value, '^(%S+) (%d+) ')
  return worker, tonumber(number)
end
local function state(value, mine, over)
  if not value or value == '' or value == over then return 'free' end
  local worker, number = parse(value)
  local my_worker, my_number = parse(mine)
  if worker ~= my_worker then return 'other' end
  return number > my_number and 'newer' or 'free'
end
"""

_CLAIM = (
    _STATE
    + """
-- KEYS session stream early
-- ARGV session-value stream-value ttl name reject session-over stream-over
local session, stream = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
local of_session = state(session, ARGV[1], ARGV[6])
if state(stream, ARGV[2], ARGV[7]) == 'other' then return {'stream', stream} end
if of_session == 'other' and ARGV[5] == '1' then return {'session', session} end
if of_session ~= 'newer' then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3]) end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return {'claimed', of_session == 'other' and session or '', redis.call('ZREM', KEYS[3], ARGV[4])}
"""
)

_REFRESH = (
    _STATE
    + """
-- KEYS session stream early
-- ARGV session-value stream-value ttl name
for i = 1, 2 do
  if state(redis.call('GET', KEYS[i]), ARGV[i], '') == 'free' then
    redis.call('SET', KEYS[i], ARGV[i], 'PX', ARGV[3])
  end
end
return redis.call('ZREM', KEYS[3], ARGV[4])
"""
)

_RELEASE = """
-- KEYS session stream  ARGV session-value stream-value remember
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('SET', KEYS[2], '', 'PX', ARGV[3]) end
"""

_FIND = """
-- KEYS stream early  ARGV name remember most
local stream = redis.call('GET', KEYS[1])
if stream then return stream end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return false
"""


def check(url: str) -> None:
    """Looks at the server, if it is there.

    Raises:
        ConfigError: It cannot be a bus; the message says why.
    """
    try:
        client = _client(url)
        mode = client.info("server").get("redis_mode", "standalone")
        client.close()
    except redis.AuthenticationError:
        raise ConfigError(
            "CHATSTREAM_BUS: the Redis server refused the name or password."
        ) from None
    except redis.ResponseError:
        return  # not a command that this user may use
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        log.warning("[bus] redis cannot be reached yet: %s. It is tried again", error)
        return
    except (redis.RedisError, TypeError, ValueError) as error:
        raise ConfigError(f"CHATSTREAM_BUS has an option that redis-py refuses: {error}") from None
    if mode != "standalone":
        raise ConfigError(
            f"CHATSTREAM_BUS: this server runs as {mode}. Give the address of one ordinary server"
            " (behind a Sentinel: of its master, by a name that follows it)."
        )


class RedisBus(Bus):
    """For workers on many hosts.

    A claim and a release are one round trip; where another worker has the session, a claim waits
    for it, `PATIENCE` seconds at most, as a cancel does. While the server is away nothing waits.
    """

    name = "redis"

    def __init__(self, receive: Receive, url: str, *, prefix: str, ttl: float) -> None:
        """
        Args:
            receive: See `Bus`.
            url: The server's, redis:// or rediss://. Options of redis-py may follow a `?`.
            prefix: What all keys begin with; a service's own.
            ttl: Seconds that an entry outlives its worker.
        """
        super().__init__(receive)
        self._prefix = prefix
        self._ttl = ttl
        self._worker = uuid.uuid4().hex
        self._commands = _client(url, connections=_CONNECTIONS)
        self._mailbox = _client(url, waiting=_LISTEN)
        self._claim_script = self._commands.register_script(_CLAIM)
        self._refresh_script = self._commands.register_script(_REFRESH)
        self._release_script = self._commands.register_script(_RELEASE)
        self._find_script = self._commands.register_script(_FIND)
        self._lock = threading.Lock()  # guards the three below
        self._claims: dict[Claim, None] = {}  # what has to be in Redis
        self._exchanges: dict[str, _Exchange] = {}  # by request
        self._up = True
        self._closing = False
        self._wake = threading.Event()  # the listener has something to do
        self._listener = threading.Thread(target=self._listen, name="chatstream-bus", daemon=True)
        self._read_up_to = "0-0"
        self._refreshed = 0.0
        self._complained = False

    def start(self) -> None:
        self._listener.start()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        with contextlib.suppress(*_FAULTS):
            for claim in list(self._claims):
                self._forget(claim)
            self._send(self._worker, Reply(Answer.ABSENT, "close"))  # the listener wakes
        if self._listener.is_alive():
            self._listener.join(_LISTEN + 2 * COMMAND_TIMEOUT)
        self._commands.close()

    def claim(self, claim: Claim, *, reject: bool) -> bool:
        with self._lock:
            self._claims[claim] = None
            if not self._up:
                return False  # it is registered when Redis is back
        try:
            return self._claim(claim, reject)
        except _FAULTS as error:
            self._lost(error)
            return False
        except BaseException:
            with self._lock:
                del self._claims[claim]
            raise

    def release(self, claim: Claim) -> None:
        with self._lock:
            known = self._claims.pop(claim, self) is None
            if not known or not self._up:
                return
        try:
            self._forget(claim)
        except _FAULTS as error:
            self._lost(error)

    def _cancel_elsewhere(self, request: Request) -> bool:
        deadline = monotonic() + PATIENCE
        if not self._up:
            raise BusUnavailable
        try:
            worker = self._worker_of(request)
            if worker in (None, self._worker):
                # None, or ours: looked for once more, since it may have been claimed meanwhile.
                return self._receive(request) is Answer.STOPPED
            return self._ask(str(worker), request, deadline) is Answer.STOPPED
        except _FAULTS as error:
            self._lost(error)
            raise BusUnavailable from error

    # What stands in Redis

    def _claim(self, claim: Claim, reject: bool) -> bool:
        """`claim`, where Redis is there. Asks whoever is in the way whether it is live."""
        owner, session_id, stream_id = claim.name
        keys, values = self._keys_and_values(claim)
        over = {"session": b"", "stream": b""}
        for _ in range(_TRIES):
            more = [_ms(self._ttl), _digest(*claim.name), int(reject), *over.values()]
            found, value, early = (*self._claim_script(keys, [*values, *more]), None)[:3]
            if found == b"claimed":
                if value:
                    self._supersede(claim.name, value)
                return bool(early)
            what = found.decode()
            in_the_way = {"session": (session_id, None), "stream": (None, stream_id)}[what]
            if self._is_live(value, Request(Action.PROBE, owner, *in_the_way)):
                raise conflict(what)
            over[what] = value
        raise Unconfirmed

    def _is_live(self, value: bytes, probe: Request) -> bool:
        """Whether what stands there is a live stream. If its worker does not say, it may be."""
        try:
            return self._ask(_worker(value), probe, monotonic() + PATIENCE) is Answer.LIVE
        except Unconfirmed:
            return True

    def _supersede(self, name: Name, value: bytes) -> None:
        old = value.decode().split(" ", 2)[2]
        request = Request(Action.SUPERSEDE, name.owner, name.session_id, old)
        try:
            self._ask(_worker(value), request, monotonic() + PATIENCE)
        except Unconfirmed:
            log.warning(
                "[bus] redis: the worker of stream=%s does not answer; it is superseded by"
                " stream=%s and told to stop when it does",
                old,
                name.stream_id,
            )

    def _worker_of(self, request: Request) -> str | None:
        """The worker that has what a cancel names. Without one, a stream's cancel is remembered."""
        owner, session_id, stream_id = request.owner, request.session_id or "", request.stream_id
        if stream_id is None:
            value = self._commands.get(self._key("session", owner, session_id))
            return _worker(value) if value else None
        keys = [self._key("stream", owner, stream_id), self._key("early", owner)]
        name = _digest(owner, session_id, stream_id)
        value = self._find_script(keys, [name, _ms(REMEMBER), REMEMBER_PER_OWNER])
        return _worker(value) if value else None

    def _forget(self, claim: Claim) -> None:
        keys, values = self._keys_and_values(claim)
        self._release_script(keys[:2], [*values, _ms(REMEMBER)])

    def _refresh(self) -> set[Claim]:
        """Has every entry last for another while, and puts back those that are lost.

        Returns:
            What is registered now.
        """
        self._refreshed = monotonic()
        # For people who look; and with no stream at all it shows that the server takes a write.
        self._commands.set(f"{self._prefix}:worker:{self._worker}", os.getpid(), px=_ms(self._ttl))
        with self._lock:
            claims = list(self._claims)
        for some in (claims[at : at + _BATCH] for at in range(0, len(claims), _BATCH)):
            pipeline = self._commands.pipeline(transaction=False)
            for claim in some:
                keys, values = self._keys_and_values(claim)
                more = [_ms(self._ttl), _digest(*claim.name)]
                self._refresh_script(keys, [*values, *more], client=pipeline)
            for claim, early in zip(some, pipeline.execute(), strict=True):
                if early:  # cancelled by somebody who could not know that it was live
                    self._receive(Request(Action.CANCEL, *claim.name))
                elif claim not in self._claims:  # released meanwhile
                    self._forget(claim)
        return set(claims)

    def _keys_and_values(self, claim: Claim) -> tuple[list[str], list[str]]:
        (owner, session_id, stream_id), number = claim
        keys = [
            self._key("session", owner, session_id),
            self._key("stream", owner, stream_id),
            self._key("early", owner),
        ]
        mine = f"{self._worker} {number}"
        return keys, [f"{mine} {stream_id}", f"{mine} {session_id}"]

    def _key(self, kind: str, *words: str) -> str:
        return f"{self._prefix}:{kind}:{_digest(*words)}"

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
                del self._exchanges[request.id]
        return exchange.answer

    def _send(self, worker: str, message: Request | Reply) -> None:
        mail = f"{self._prefix}:mail:{worker}"
        pipeline = self._commands.pipeline(transaction=False)
        pipeline.xadd(mail, {"message": encode(message)}, maxlen=_MAIL, approximate=True)
        pipeline.pexpire(mail, _MAIL_TTL)
        pipeline.execute()

    def _listen(self) -> None:
        """The listener: reads the mail, refreshes the entries, and finds out when Redis is back."""
        first, longest = _RETRY
        pause = first
        while not self._closing:
            try:
                self._arrive()
                pause = first
                while self._up and not self._closing:
                    if monotonic() - self._refreshed > self._ttl / 3:
                        self._refresh()
                    self._read_mail()
            except _FAULTS as error:
                self._lost(error)
            except Exception:
                log.exception("[bus] redis")
                self._lost(RuntimeError("the listener failed"))
            # New connections: a server that has become a replica is found again by its name.
            self._commands.connection_pool.reset()
            self._mailbox.connection_pool.disconnect()
            self._wake.wait(pause)
            pause = min(2 * pause, longest)
        self._leave()

    def _arrive(self) -> None:
        """Redis is there: everything live is put into it, and then it counts as there."""
        if not self._commands.exists(self._mail):
            self._read_up_to = "0-0"  # it may have lost its data, and its clock may be another
        while True:
            registered = self._refresh()
            with self._lock:
                if self._claims.keys() <= registered:
                    was_up, self._up = self._up, True
                    break
        if not was_up:
            log.warning("[bus] redis is back; %d streams are registered", len(registered))

    def _leave(self) -> None:
        with contextlib.suppress(*_FAULTS):
            self._mailbox.delete(self._mail, f"{self._prefix}:worker:{self._worker}")
        self._mailbox.close()

    @property
    def _mail(self) -> str:
        return f"{self._prefix}:mail:{self._worker}"

    def _lost(self, error: Exception) -> None:
        """Redis is away. Whoever noticed first says so."""
        with self._lock:
            was_up, self._up = self._up, False
        if was_up and not self._closing:
            log.warning(
                "[bus] redis is away: %s. Streams go on; a stop for another worker's stream is"
                " answered with 503 until it is back",
                _said(error),
            )

    def _read_mail(self) -> None:
        read = self._mailbox.xread({self._mail: self._read_up_to}, block=_ms(_LISTEN))
        for _, entries in read or ():
            for entry_id, fields in entries:
                self._read_up_to = entry_id
                self._take_message(fields.get(b"message", b""))

    def _take_message(self, data: bytes) -> None:
        try:
            message = decode(data)
        except Malformed:
            if not self._complained:
                self._complained = True
                log.warning("[bus] redis: dropped a message that is none of ours")
            return
        if isinstance(message, Request):
            reply = Reply(self._receive(message), message.id, self._worker)
            self._send(message.origin, reply)
            return
        with self._lock:
            exchange = self._exchanges.get(message.id)
        if exchange is not None:  # else it came too late
            exchange.answer = message.answer
            exchange.done.set()


class _Exchange:
    """A request that waits for its reply."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer = Answer.ABSENT  # until `done`


def _client(url: str, *, connections: int = 1, waiting: float = 0.0) -> Any:
    """A client of the server whose commands fail in time, `waiting` seconds later than others."""
    wanted: dict[str, Any] = {
        "socket_timeout": COMMAND_TIMEOUT,
        "socket_connect_timeout": COMMAND_TIMEOUT,
        "socket_keepalive": True,
        **parse_url(url),
    }
    # Not for an address to choose. And redis-py 8 has a timeout of 5 s that ends idle listeners.
    wanted["socket_timeout"] += waiting
    wanted |= {"protocol": 2, "decode_responses": False, "retry": Retry(NoBackoff(), 0)}
    wanted |= {"max_connections": connections, "timeout": COMMAND_TIMEOUT}
    return redis.Redis(connection_pool=redis.BlockingConnectionPool(**wanted))


def _said(error: Exception) -> str:
    """The error for the log. Of a refused command only its kind: its text has the arguments."""
    refused = isinstance(error, redis.ResponseError)
    return type(error).__name__ if refused else str(error) or type(error).__name__


def _worker(value: bytes) -> str:
    return value.split(b" ", 1)[0].decode()


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _digest(*words: str) -> str:
    text = "\0".join(words)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
