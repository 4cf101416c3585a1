"""Which streams live in this process: their names and their slots."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

from chatstream.errors import Busy, conflict
from chatstream.sockets import native
from chatstream.stream.stream import Stream
from chatstream.workers.slots import Slots


class Registry:
    """The live streams of one process, by owner and name.

    Safe from any thread, never blocks. A stream is found by its whole names and its owner only.

    Attributes:
        on_change: Called after a slot was taken or freed, not under the lock. Must not raise.
    """

    def __init__(self, slots: Slots, *, reject_conflicts: bool = False) -> None:
        """
        Args:
            slots: A stream holds one until its iterable is closed and its call to the provider has
                ended. Can be set anew.
            reject_conflicts: Whether a second stream of a session is refused, not superseding.
                Can be set anew.
        """
        self.slots = slots
        self.reject_conflicts = reject_conflicts
        self.on_change: Callable[[], None] | None = None
        self._lock = native.allocate_lock()  # guards all below
        self._sessions: dict[tuple[str, str], Stream] = {}
        self._streams: dict[tuple[str, str], Stream] = {}
        self._holders: Counter[Stream] = Counter()
        self._walked: set[Stream] = set()
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._holders)

    def add(self, stream: Stream) -> Stream | None:
        """Enters `stream` under its names, with one holder, and numbers it.

        Returns:
            The stream it supersedes, if any. The caller aborts: not under the registry's lock.

        Raises:
            Busy: Every slot is taken.
            Refused: 409, the stream's or (with `reject_conflicts`) the session's name is live.
        """
        session, named = (stream.owner, stream.session_id), (stream.owner, stream.stream_id)
        with self._lock:
            old = self._sessions.get(session)
            if old is not None and old.ended:
                old = None
            namesake = self._streams.get(named)
            if namesake is not None and not namesake.ended:
                raise conflict("stream")
            if old is not None and self.reject_conflicts:
                raise conflict("session")
            if len(self._holders) >= self.slots.all:
                raise Busy("Every stream slot of this worker is taken. Please try again.")
            self._sessions[session] = self._streams[named] = stream
            self._holders[stream] = 1
            stream.number = next(self._numbers)
        self._tell()
        return old

    def find(
        self, owner: str, session_id: str | None = None, stream_id: str | None = None
    ) -> Stream | None:
        """The live stream of these names, of which one has to be given."""
        with self._lock:
            if stream_id is not None:
                stream = self._streams.get((owner, stream_id))
            else:
                stream = self._sessions.get((owner, session_id or ""))
            if stream is None or stream.ended or session_id not in (None, stream.session_id):
                return None
            return stream

    def remove(self, stream: Stream) -> None:
        """Takes `stream`'s names back, unless a newer one has them, and the iterable's hold."""
        session, named = (stream.owner, stream.session_id), (stream.owner, stream.stream_id)
        with self._lock:
            if self._sessions.get(session) is stream:
                del self._sessions[session]
            if self._streams.get(named) is stream:
                del self._streams[named]
            self._walked.discard(stream)
        self.leave(stream)

    def walk(self, stream: Stream) -> None:
        """Notes that `stream` keeps a thread of the server's, until it is removed.

        Raises:
            Busy: No more of them may; the others are for cancels.
        """
        with self._lock:
            if len(self._walked) >= self.slots.walked:
                raise Busy("Every thread for streams of this worker is taken. Please try again.")
            self._walked.add(stream)

    def enter(self, stream: Stream) -> None:
        """Another holder of the stream's slot: the call to the provider."""
        with self._lock:
            self._holders[stream] += 1

    def leave(self, stream: Stream) -> None:
        """One holder less. The last one frees the slot."""
        with self._lock:
            self._holders[stream] -= 1
            if self._holders[stream] > 0:
                return
            del self._holders[stream]
        self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def live(self) -> list[Stream]:
        """Every stream that has not ended."""
        return [stream for stream in self.held() if not stream.ended]

    def held(self) -> list[Stream]:
        """Every stream that has a slot: also those that have ended, and whose client has not."""
        with self._lock:
            return list(self._holders)
