"""The listener: a worker's thread that reads its mail and keeps its claims in Redis."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from time import monotonic

from chatstream.bus.base import PATIENCE, Receive
from chatstream.bus.messages import Action, Answer, Claim, Reply, Request
from chatstream.bus.redis.entries import Entries
from chatstream.bus.redis.keys import Keys
from chatstream.bus.redis.mail import LISTEN, Mail
from chatstream.bus.redis.server import COMMAND_TIMEOUT, FAULTS, in_words
from chatstream.errors import BusUnavailable

log = logging.getLogger("chatstream")

_RETRY = (0.05, 2.0)
"""Seconds between two attempts to reach a server that is away: the first, and at most."""

_BATCH = 500
"""Entries that are refreshed in one round trip."""


class Listener:
    """Knows whether Redis is there, and what has to be in it. Safe from any thread.

    Attributes:
        up: Whether it is there, as far as somebody has found out.
        since: Since when the server has had its data.
    """

    def __init__(
        self, entries: Entries, mail: Mail, keys: Keys, receive: Receive, ttl: float
    ) -> None:
        """
        Args:
            entries: What stands in Redis.
            mail: What is read.
            keys: This worker's.
            receive: See `Bus`.
            ttl: Seconds that an entry lasts if it is not refreshed.
        """
        self._entries = entries
        self._mail = mail
        self._keys = keys
        self._receive = receive
        self._ttl = ttl
        self._lock = threading.Lock()  # guards the three below
        # What has to be in Redis, and what is in its way; None while `RedisBus.claim` sees to it.
        self._claims: dict[Claim, bytes | None] = {}
        self.up = False
        self._away = False  # and somebody has said so
        self._looked = threading.Event()  # whether it is up is known
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="chatstream-bus", daemon=True)
        self._refreshed = self._checked = 0.0
        self.since = b""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Takes all out of Redis, and waits for the thread's end. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(*FAULTS):
            for claim in list(self._claims):
                self._entries.release(claim)
            me = self._keys.worker
            self._mail.send(me, Reply(Answer.ABSENT, "close", me))  # it wakes
        if self._thread.is_alive():
            self._thread.join(LISTEN + 2 * COMMAND_TIMEOUT)

    def is_up(self) -> bool:
        """Whether the server is there. Waits until the listener has looked, at first."""
        if not self.up:
            self._looked.wait(PATIENCE)  # it is told sooner than that, where it is told no
        return self.up

    def is_away(self) -> bool:
        """Whether the server is known not to be there. Does not wait."""
        return self._looked.is_set() and not self.up

    def listens(self) -> bool:
        """Whether mail is read, now and later."""
        return not self._closing.is_set() and self._thread.is_alive()

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """For what cannot be told without Redis.

        Raises:
            BusUnavailable: In the middle of that it was found to be away.
        """
        try:
            yield
        except FAULTS as error:
            self.lost(error)
            raise BusUnavailable from error

    def lost(self, error: Exception) -> None:
        """Redis is away. Whoever noticed first says so."""
        with self._lock:
            was_away, self.up, self._away = self._away, False, True
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

    # What has to be in Redis

    def begin(self, claim: Claim) -> bool:
        """A claim is being made. Whether Redis is there for that; else the listener sees to it."""
        with self._lock:
            self._claims[claim] = None if self.up else b""
            return self.up

    def keep(self, claim: Claim) -> None:
        """From now on the listener keeps the claim in Redis, unless it was released meanwhile."""
        with self._lock:
            if claim in self._claims:
                self._claims[claim] = b""

    def drop(self, claim: Claim) -> bool:
        """It is kept no more. Whether Redis is there, from which it then has to be taken."""
        with self._lock:
            self._claims.pop(claim, None)
            up = self.up
        self._mail.settle(claim)
        return up

    def refresh_soon(self) -> None:
        """Something may be missing there."""
        self._refreshed = 0.0

    # The thread

    def _listen(self) -> None:
        """Reads the mail, refreshes the entries, and finds out when Redis is back."""
        first, longest = _RETRY
        pause = first
        while not self._closing.is_set():
            try:
                self._arrive()
                pause = first
                while self.up and not self._closing.is_set():
                    self._mail.read()
                    self._look_after()
            except Exception as error:
                self.lost(error)
            # New connections next time: a server that became a replica is found again by its name.
            self._mail.let_go()
            self._entries.let_go()
            self._closing.wait(pause)
            pause = min(2 * pause, longest)
        self._mail.leave()

    def _arrive(self) -> None:
        """Redis is there: everything live is put into it, and then it counts as there."""
        while True:
            registered = self.refresh()
            with self._lock:
                if registered.issuperset(c for c, over in self._claims.items() if over is not None):
                    was_away, self.up, self._away = self._away, True, False
                    break
        self._looked.set()
        if was_away:
            log.warning("[bus] redis is back; %d streams are registered", len(registered))

    def _look_after(self) -> None:
        """Refreshes the entries when it is time, and when the server has lost them."""
        now = monotonic()
        if now - self._refreshed > self._ttl / 3:
            self.refresh()
        elif now - self._checked >= LISTEN / 2:
            self._checked = now
            if self._entries.since() != self.since:
                self.refresh()

    def refresh(self) -> set[Claim]:
        """Has every entry last for another while, and puts back those that are lost.

        Returns:
            What is registered now.
        """
        self._refreshed = monotonic()
        self.since = self._entries.enrol()
        with self._lock:
            # One that is being claimed is not in the way of what it is about to supersede.
            claims = [(claim, over) for claim, over in self._claims.items() if over is not None]
        for at in range(0, len(claims), _BATCH):
            self._refresh_some(claims[at : at + _BATCH])
        return {claim for claim, _ in claims}

    def _refresh_some(self, claims: list[tuple[Claim, bytes]]) -> None:
        found = self._entries.refresh(claims)
        for (claim, over), (early, other) in zip(claims, found, strict=True):
            if early:  # cancelled by somebody who could not know that it was live
                self._receive(Request(Action.CANCEL, *claim.name))
            if other or over:
                self._contest(claim, other)
            if claim not in self._claims:  # released meanwhile
                self._entries.release(claim)

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
            self._mail.contest(claim, other)
