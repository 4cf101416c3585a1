"""Which streams live in this process: their names, their slots, the stops that came early."""

from __future__ import annotations

from collections import Counter, deque
from time import monotonic

from chatstream import native
from chatstream.errors import Busy, Refused
from chatstream.stream import Stream

REMEMBER = 30.0
"""Seconds that a cancel is kept for a stream that has not started."""

REMEMBER_PER_OWNER = 64

_Name = tuple[str, str, str]
"""owner, session_id, stream_id"""


class Registry:
    """The live streams of one process, by owner and name.

    Safe from any thread, never blocks. A stream is found by its whole names and its owner only.
    """

    def __init__(self, max_streams: int, *, reject_conflicts: bool = False) -> None:
        """
        Args:
            max_streams: Slots. A stream holds one until its iterable is closed and its call to the
                provider has ended.
            reject_conflicts: Whether a second stream of a session is refused, not superseding.
        """
        self.max_streams = max_streams
        self._reject_conflicts = reject_conflicts
        self._lock = native.allocate_lock()  # guards all below
        self._sessions: dict[tuple[str, str], Stream] = {}
        self._streams: dict[tuple[str, str], Stream] = {}
        self._holders: Counter[Stream] = Counter()
        self._early = _Recent()  # cancels that came before their stream
        self._gone = _Recent()  # streams that have been: a cancel for them is late, not early

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._holders)

    def add(self, stream: Stream) -> tuple[Stream | None, bool]:
        """Enters `stream` under its names, with one holder.

        Returns:
            The stream it supersedes, if any, and whether a cancel for it came early. The caller
            aborts: not under the registry's lock.

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
                raise _conflict("A stream with this streamId is live.")
            if old is not None and self._reject_conflicts:
                raise _conflict("This session has a live stream. Cancel it first.")
            if len(self._holders) >= self.max_streams:
                raise Busy("Every stream slot of this worker is taken. Please try again.")
            self._sessions[session] = self._streams[named] = stream
            self._holders[stream] = 1
            return old, self._early.pop(_name(stream))

    def cancel(self, owner: str, session_id: str, stream_id: str | None = None) -> Stream | None:
        """The live stream of these names. Without one, a named stream's cancel is remembered."""
        with self._lock:
            stream = self._sessions.get((owner, session_id))
            if stream_id is not None:
                stream = self._streams.get((owner, stream_id))
            if stream is None or stream.session_id != session_id:
                name = (owner, session_id, stream_id or "")
                if stream_id is not None and name not in self._gone:
                    self._early.add(name)
                return None
            return None if stream.ended else stream

    def remove(self, stream: Stream) -> None:
        """Takes `stream`'s names back, unless a newer one has them, and the iterable's hold."""
        session, named = (stream.owner, stream.session_id), (stream.owner, stream.stream_id)
        with self._lock:
            if self._sessions.get(session) is stream:
                del self._sessions[session]
            if self._streams.get(named) is stream:
                del self._streams[named]
            self._gone.add(_name(stream))
        self.leave(stream)

    def enter(self, stream: Stream) -> None:
        """Another holder of the stream's slot: the call to the provider."""
        with self._lock:
            self._holders[stream] += 1

    def leave(self, stream: Stream) -> None:
        """One holder less. The last one frees the slot."""
        with self._lock:
            self._holders[stream] -= 1
            if self._holders[stream] <= 0:
                del self._holders[stream]

    def live(self) -> list[Stream]:
        """Every stream that has not ended."""
        with self._lock:
            return [stream for stream in self._holders if not stream.ended]


class _Recent:
    """Names kept for `REMEMBER` seconds, at most `REMEMBER_PER_OWNER` of one owner. Not locked."""

    def __init__(self) -> None:
        self._names: dict[str, dict[_Name, float]] = {}  # by owner, oldest first
        self._owners: deque[tuple[float, str]] = deque()  # when to look at an owner's again

    def __contains__(self, name: _Name) -> bool:
        self._expire()
        return self._names.get(name[0], {}).get(name, 0.0) > monotonic()

    def add(self, name: _Name) -> None:
        self._expire()
        if name[0] not in self._names:
            self._names[name[0]] = {}
            self._owners.append((monotonic() + REMEMBER, name[0]))
        mine = self._names[name[0]]
        mine.pop(name, None)
        mine[name] = monotonic() + REMEMBER
        if len(mine) > REMEMBER_PER_OWNER:
            del mine[next(iter(mine))]

    def pop(self, name: _Name) -> bool:
        """Whether `name` was there; it is not any more."""
        found = name in self
        if found:
            del self._names[name[0]][name]
        return found

    def _expire(self) -> None:
        now = monotonic()
        while self._owners and self._owners[0][0] <= now:
            _, owner = self._owners.popleft()
            mine = {name: until for name, until in self._names.pop(owner).items() if until > now}
            if mine:
                self._names[owner] = mine
                self._owners.append((now + REMEMBER, owner))


def _name(stream: Stream) -> _Name:
    return (stream.owner, stream.session_id, stream.stream_id)


def _conflict(message: str) -> Refused:
    return Refused(message, code="conflict", status=409)
