"""What stands in Redis: who has which stream, and which workers there are. A method a script."""

from __future__ import annotations

import os
import socket
from typing import Any

from chatstream.bus.base import REMEMBER, REMEMBER_PER_OWNER
from chatstream.bus.messages import Claim, Request, Worker, digest
from chatstream.bus.redis import scripts
from chatstream.bus.redis.keys import Keys, ms, place_of
from chatstream.bus.redis.server import let_go
from chatstream.errors import BusUnavailable

SETTLED = 4.0
"""Seconds after which a server without data has been told of all that lives: the listeners' turn,
their longest pause before they try again, and some more."""


class Entries:
    """The entries of one worker, and what it finds of others'.

    Safe from any thread. Raises `FAULTS` where the server is away.

    Attributes:
        limit: Live streams that an owner may have, as the last claim had it. There are places if
            there is one.
    """

    def __init__(self, commands: Any, keys: Keys, ttl: float) -> None:
        """
        Args:
            commands: A client of the server.
            keys: The worker's.
            ttl: Seconds that an entry outlives its worker.
        """
        self.limit: int | None = None
        self._commands = commands
        self._keys = keys
        self._ttl = ms(ttl)
        self._claim_script = commands.register_script(scripts.CLAIM)
        self._refresh_script = commands.register_script(scripts.REFRESH)
        self._release_script = commands.register_script(scripts.RELEASE)
        self._find_script = commands.register_script(scripts.FIND)
        self._put_back_script = commands.register_script(scripts.PUT_BACK)
        self._since_script = commands.register_script(scripts.SINCE)

    # A stream's

    def claim(
        self, claim: Claim, *, reject: bool, over: list[bytes], ended: list[bytes]
    ) -> tuple[bytes, Any, Any]:
        """Enters a claim, unless something is in its way.

        Args:
            claim: Which.
            reject: Whether another worker's stream of the session is in the way, too.
            over: What is known to be over, of its session and of its stream.
            ended: Likewise, of its owner's places.

        Returns:
            "claimed", what it took the session from, and whether a cancel came early; or what is in
            the way, and what stands there.
        """
        keys, values = self._keys_and_values(claim)
        more = [self._ttl, digest(*claim.name), int(reject), *over]
        if self.limit:
            more += [place_of(claim), self.limit, *ended]
        found, value, early = (*self._claim_script(keys, [*values, *more]), None)[:3]
        return found, value, early

    def put_back(self, claim: Claim, value: bytes) -> bool:
        """Gives the session back to whom a stream took it that had ended before it could.

        A newer stream of this process may have ended it, and been superseded by that one since.

        Returns:
            Whether it was; not when a third stream has the session by now.
        """
        (session, _, _, *places), (mine, _) = self._keys_and_values(claim)
        more = [place_of(claim)] if places else []
        return bool(self._put_back_script([session, *places], [mine, value, self._ttl, *more]))

    def refresh(self, claims: list[tuple[Claim, bytes]]) -> list[tuple[int, bytes]]:
        """Has claims last for another while, and puts back those that are lost. One round trip.

        Args:
            claims: Each with what is known to be over of its session.

        Returns:
            For each whether a cancel came early, and what else stands for its session.
        """
        pipeline = self._commands.pipeline(transaction=False)
        for claim, over in claims:
            keys, values = self._keys_and_values(claim)
            more = [self._ttl, digest(*claim.name), over]
            if self.limit:
                more.append(place_of(claim))
            self._refresh_script(keys, [*values, *more], client=pipeline)
        found: list[tuple[int, bytes]] = pipeline.execute()
        return found

    def release(self, claim: Claim) -> None:
        """Takes a claim out; its stream is known to have been."""
        keys, values = self._keys_and_values(claim)
        gone = f"gone 0 {claim.name.session_id}"
        more = [ms(REMEMBER), digest(*claim.name), gone]
        if self.limit:
            more.append(place_of(claim))
        self._release_script(keys, [*values, *more])

    def find(self, request: Request) -> bytes:
        """What stands for what a cancel names. If nothing, a stream's cancel is remembered."""
        owner, session_id, stream_id = request.owner, request.session_id or "", request.stream_id
        key, name, session = self._keys.of("session", owner, session_id), "", ""
        if stream_id is not None:
            key, session = self._keys.of("stream", owner, stream_id), session_id
            name = digest(owner, session_id, stream_id)
        keys = [key, self._keys.since, self._keys.of("early", owner)]
        values = [ms(SETTLED), name, ms(REMEMBER), REMEMBER_PER_OWNER, session]
        found: bytes = self._find_script(keys, values)
        return found

    def _keys_and_values(self, claim: Claim) -> tuple[list[str], list[str]]:
        return self._keys.of_claim(claim, places=bool(self.limit))

    # The workers'

    def enrol(self) -> bytes:
        """Has this worker found. With no stream at all it shows that the server takes a write.

        Returns:
            Since when the server has had its data.
        """
        pipeline = self._commands.pipeline(transaction=False)
        me = f"{os.getpid()} {socket.gethostname()}"
        pipeline.set(self._keys.of_worker(self._keys.worker), me, px=self._ttl)
        pipeline.sadd(self._keys.workers, self._keys.worker)
        pipeline.pexpire(self._keys.workers, self._ttl)
        pipeline.execute()
        since: bytes = self._since_script([self._keys.since])
        return since

    def since(self) -> bytes:
        """Since when the server has had its data; "" if it has lost it."""
        since: bytes | None = self._commands.get(self._keys.since)
        return since or b""

    def workers(self) -> list[Worker]:
        """The other workers that Redis knows of. Takes those off its list that have expired.

        Raises:
            BusUnavailable: It may have lost some.
        """
        pipeline = self._commands.pipeline(transaction=False)
        pipeline.time().get(self._keys.since).smembers(self._keys.workers)
        (seconds, _), since, ids = pipeline.execute()
        if since is not None and seconds * 1000 - int(since) < SETTLED * 1000:
            raise BusUnavailable
        others = sorted({word.decode() for word in ids} - {self._keys.worker})
        if not others:
            return []
        values = self._commands.mget([self._keys.of_worker(each) for each in others])
        expired = [each for each, value in zip(others, values, strict=True) if value is None]
        if expired:
            self._commands.srem(self._keys.workers, *expired)
        return [
            Worker(each, int(words[0]), words[-1])
            for each, value in zip(others, values, strict=True)
            if value is not None and (words := value.decode().split(" ", 1))
        ]

    # The connections

    def ping(self) -> None:
        self._commands.ping()

    def let_go(self) -> None:
        """New connections next time, if there is one."""
        let_go(self._commands)
