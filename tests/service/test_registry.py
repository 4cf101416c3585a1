"""registry: which streams live in this process, by owner and whole name."""

from __future__ import annotations

import itertools
import threading

import pytest

from chatstream.errors import Busy, Refused
from chatstream.service.registry import Registry
from chatstream.stream.outcome import Cause
from chatstream.stream.stream import Stream
from chatstream.workers.slots import Slots

_numbers = itertools.count()


def live(session: str = "s", stream: str | None = None, owner: str = "") -> Stream:
    return Stream(session, stream or f"t-{next(_numbers)}", owner)


def gone(registry: Registry, stream: Stream) -> Stream:
    """`stream`, after a whole life in `registry`."""
    registry.add(stream)
    stream.complete()
    registry.remove(stream)
    return stream


@pytest.fixture
def registry() -> Registry:
    return Registry(Slots(8, 8))


# Names


def test_a_stream_is_found_by_its_session_by_its_id_and_by_both(registry: Registry) -> None:
    """A live stream is found by session_id alone, by stream_id alone, and by both together."""
    stream = live("s", "t")
    assert registry.add(stream) is None
    assert stream is registry.find("", "s")
    assert stream is registry.find("", None, "t")
    assert stream is registry.find("", "s", "t")
    assert [stream] == registry.live()


def test_who_has_ended_has_its_slot_until_it_is_removed(registry: Registry) -> None:
    """Not live, but held: its client may not have taken all of it."""
    stream = live("s", "t")
    registry.add(stream)
    stream.complete()
    assert registry.live() == []
    assert registry.held() == [stream]
    registry.remove(stream)
    assert registry.held() == []


@pytest.mark.parametrize(
    ("owner", "session_id", "stream_id"),
    [
        ("me", "s-1", "t"),
        ("me", "s-", None),
        ("me", "s-12", None),
        ("me", "S-11", None),
        ("me", "", None),
        ("me", "s-11", "t-"),
        ("me", "s-11", "t-11 "),
        ("me", "s-11", ""),
        ("me", "t-11", "t-11"),
        ("me", "s-2", "t-11"),
        ("me", "other", "t-11"),
        ("me", None, "t-1"),
        ("me", None, "s-11"),
        ("you", None, "t-11"),
        ("me", None, None),
        ("you", "s-11", None),
        ("you", "s-11", "t-11"),
        ("", "s-11", None),
        ("mes", "-11", None),
    ],
)
def test_nothing_else_finds_it(
    registry: Registry, owner: str, session_id: str | None, stream_id: str | None
) -> None:
    """Not a prefix, not a longer name, not another session's, not another owner's."""
    registry.add(live("s-11", "t-11", "me"))
    registry.add(live("s-2", "t-2", "me"))
    assert registry.find(owner, session_id, stream_id) is None


def test_owners_do_not_meet(registry: Registry) -> None:
    """The same two names of two owners are two streams: no conflict, no superseding."""
    mine, yours = live("s", "t", "me"), live("s", "t", "you")
    assert registry.add(mine) is None
    assert registry.add(yours) is None
    assert mine is registry.find("me", "s", "t")
    assert yours is registry.find("you", "s", "t")


def test_a_stream_that_has_ended_is_not_found(registry: Registry) -> None:
    """Between its end and its removal a stream is gone for a cancel, by both ways of naming it."""
    stream = live("s", "t")
    registry.add(stream)
    stream.complete()
    assert registry.find("", "s") is None
    assert registry.find("", None, "t") is None
    assert registry.find("", "s", "t") is None
    assert registry.live() == []


def test_a_removed_stream_is_not_found(registry: Registry) -> None:
    """After its removal nothing of a stream is left."""
    gone(registry, live("s", "t"))
    assert registry.find("", "s") is None
    assert registry.find("", "s", "t") is None
    assert len(registry) == 0


def test_finding_changes_nothing(registry: Registry) -> None:
    """To look for a stream neither ends it nor keeps its names from the next one."""
    stream = live("s", "t")
    assert registry.find("", "s", "t") is None
    assert registry.add(stream) is None
    for _ in range(3):
        assert stream is registry.find("", "s", "t")
    assert not stream.ended


def test_streams_are_numbered_as_they_come(registry: Registry) -> None:
    """Of two streams of a process, whosever they are, the later one has the higher number."""
    streams = [live("s", owner="me"), live("s", owner="me"), live("s", owner="you"), live()]
    for stream in streams:
        registry.add(stream)
    numbers = [stream.number for stream in streams]
    assert sorted(set(numbers)) == numbers
    assert numbers[0] > 0


def test_a_number_is_not_used_again(registry: Registry) -> None:
    """A stream that is gone, or was refused elsewhere, leaves its number to nobody."""
    first, second = gone(registry, live("s", "t")), live("s", "t")
    registry.add(second)
    registry.remove(second)
    third = live("s", "t")
    registry.add(third)
    assert first.number < second.number < third.number


# One stream of a session


def test_a_new_stream_supersedes_the_sessions_old_one(registry: Registry) -> None:
    """The old stream is handed back to be aborted, and the session's name is the new one's."""
    old, new = live("s", "t-1"), live("s", "t-2")
    registry.add(old)
    assert old is registry.add(new)
    assert new is registry.find("", "s")
    assert old is registry.find("", "s", "t-1")


def test_the_registry_itself_aborts_nothing(registry: Registry) -> None:
    """Superseding is the caller's to do, outside the registry's lock."""
    old = live("s")
    registry.add(old)
    registry.add(live("s"))
    assert not old.ended


def test_an_ended_stream_is_not_superseded(registry: Registry) -> None:
    """A stream that has ended but is not removed yet leaves its session free."""
    old = live("s")
    registry.add(old)
    old.complete()
    assert registry.add(live("s")) is None


def test_the_old_streams_removal_leaves_the_new_ones_entry(registry: Registry) -> None:
    """Case 24: the superseded stream's late cleanup does not take the new one's names."""
    old, new = live("s", "t"), live("s", "t")
    registry.add(old)
    old.abort(Cause.SUPERSEDED)
    registry.add(new)
    registry.remove(old)
    assert new is registry.find("", "s")
    assert new is registry.find("", "s", "t")
    assert len(registry) == 1


def test_reject_refuses_a_second_stream_of_a_session() -> None:
    """With reject_conflicts the second stream is a 409, and the first goes on untouched."""
    registry = Registry(Slots(8, 8), reject_conflicts=True)
    first = live("s")
    registry.add(first)
    with pytest.raises(Refused) as caught:
        registry.add(live("s"))
    assert (caught.value.code, caught.value.status) == ("conflict", 409)
    assert first is registry.find("", "s")
    assert len(registry) == 1


def test_reject_allows_the_next_once_the_first_has_ended() -> None:
    """Only a live stream is in the way, not one that waits for its cleanup."""
    registry = Registry(Slots(8, 8), reject_conflicts=True)
    first = live("s")
    registry.add(first)
    first.abort(Cause.CANCEL)
    assert registry.add(live("s")) is None


@pytest.mark.parametrize("session", ["s", "another"])
def test_a_live_stream_id_is_refused(registry: Registry, session: str) -> None:
    """A streamId that is live is a 409, in its own session and in any other of the owner."""
    first = live("s", "t")
    registry.add(first)
    with pytest.raises(Refused) as caught:
        registry.add(live(session, "t"))
    assert (caught.value.code, caught.value.status) == ("conflict", 409)
    assert first is registry.find("", "s", "t")
    assert len(registry) == 1


def test_an_ended_stream_id_can_be_used_again(registry: Registry) -> None:
    """A streamId is taken only while its stream is live, so a retry may reuse it at once."""
    old, new = live("s", "t"), live("s2", "t")
    registry.add(old)
    old.complete()
    registry.add(new)
    registry.remove(old)
    assert new is registry.find("", "s2", "t")


def test_of_many_at_once_one_has_the_session() -> None:
    """Case 23: of N streams added to a session at once, N-1 are handed back to be aborted."""
    registry = Registry(Slots(64, 64))
    streams = [live("s") for _ in range(32)]
    barrier, superseded = threading.Barrier(32), []

    def add(stream: Stream) -> None:
        barrier.wait(5)
        superseded.append(registry.add(stream))

    threads = [threading.Thread(target=add, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    left = registry.find("", "s")
    assert superseded.count(None) == 1
    assert set(streams) == {stream for stream in superseded if stream} | {left}
    assert len(superseded) == 32


# Refused elsewhere, after it was added


def test_a_refused_stream_leaves_no_trace(registry: Registry) -> None:
    """No name and no slot, though it has not ended: as if it had not been added."""
    stream = live("s", "t")
    registry.add(stream)
    registry.remove(stream)
    assert not stream.ended
    assert registry.find("", "s") is None
    assert registry.find("", "s", "t") is None
    assert (len(registry), registry.live()) == (0, [])
    assert registry.add(live("s", "t")) is None


def test_a_refused_stream_gives_its_session_to_nobody(registry: Registry) -> None:
    """What it superseded has ended for it, and is not found again."""
    old, new = live("s", "t-1"), live("s", "t-2")
    registry.add(old)
    assert old is registry.add(new)
    old.abort(Cause.SUPERSEDED)
    registry.remove(new)
    assert registry.find("", "s") is None
    assert registry.find("", "s", "t-1") is None
    assert registry.add(live("s")) is None


def test_a_third_stream_keeps_the_session(registry: Registry) -> None:
    """Nothing is taken from a stream that came while an older one was being refused."""
    first, second, third = live("s"), live("s"), live("s")
    registry.add(first)
    assert first is registry.add(second)
    assert second is registry.add(third)
    registry.remove(second)
    assert third is registry.find("", "s")
    assert {first, third} == set(registry.live())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nothing_of_what_was_removed_is_kept(registry: Registry, order: tuple[int, ...]) -> None:
    """Whatever the order in which streams of a session end or are refused, no name leads to one."""
    streams = [live("s", f"t-{n}") for n in range(3)]
    for stream in streams:
        registry.add(stream)
    for n in order:
        registry.remove(streams[n])
        assert registry.find("", None, f"t-{n}") is None
        assert registry.find("", "s") in (None, streams[2])
    assert (registry._sessions, registry._streams, len(registry)) == ({}, {}, 0)


# Slots


def test_a_full_worker_refuses(registry: Registry) -> None:
    """With every slot taken the next stream is Busy, leaves no trace, and harms no other."""
    streams = [live(f"s-{n}") for n in range(8)]
    for stream in streams:
        registry.add(stream)
    with pytest.raises(Busy):
        registry.add(live("one too many", "t"))
    assert len(registry) == 8
    assert registry.find("", "one too many") is None
    assert streams == [registry.find("", f"s-{n}") for n in range(8)]


def test_a_refused_stream_supersedes_nothing() -> None:
    """A Busy worker leaves the session's live stream where it is."""
    registry = Registry(Slots(1, 1))
    old = live("s")
    registry.add(old)
    with pytest.raises(Busy):
        registry.add(live("s"))
    assert old is registry.find("", "s")


def test_removal_frees_the_slot() -> None:
    """A slot is free again as soon as its one holder is gone."""
    registry = Registry(Slots(1, 1))
    for _ in range(3):
        gone(registry, live())
    assert len(registry) == 0


def test_an_ended_stream_holds_its_slot_until_its_last_holder_leaves() -> None:
    """The call to the provider may outlive the iterable: both have to be gone."""
    registry = Registry(Slots(1, 1))
    stream = live()
    registry.add(stream)
    registry.enter(stream)
    stream.abort(Cause.CANCEL)
    registry.remove(stream)
    with pytest.raises(Busy):
        registry.add(live())
    registry.leave(stream)
    registry.add(live())


def test_the_call_may_also_leave_first() -> None:
    """The iterable's hold stays when the call to the provider has ended."""
    registry = Registry(Slots(1, 1))
    stream = live()
    registry.add(stream)
    registry.enter(stream)
    registry.leave(stream)
    assert len(registry) == 1
    registry.remove(stream)
    assert len(registry) == 0


def test_names_do_not_accumulate(registry: Registry) -> None:
    """Of a thousand streams that have been, however they were named, nothing is left."""
    for n in range(1000):
        gone(registry, live(f"s-{n}", f"t-{n}", f"owner-{n}"))
    assert len(registry) == 0
    assert (registry._sessions, registry._streams, dict(registry._holders)) == ({}, {}, {})


# Streams that keep a thread


def test_no_more_walks_than_there_are_threads() -> None:
    """The one beyond it is busy, though there are slots; it has its slot until it is removed."""
    registry = Registry(Slots(8, 2))
    streams = [live(f"s-{n}") for n in range(3)]
    for stream in streams:
        assert registry.add(stream) is None
    registry.walk(streams[0])
    registry.walk(streams[1])
    with pytest.raises(Busy) as caught:
        registry.walk(streams[2])
    assert (caught.value.code, caught.value.status) == ("busy", 503)
    assert len(registry) == 3
    assert streams[2] is registry.find("", "s-2"), "it has a slot, and can be cancelled"


def test_a_walk_ends_with_its_stream() -> None:
    """Its thread is free again when the stream is removed, not when it has its verdict."""
    registry = Registry(Slots(8, 1))
    first, second = live("s-1"), live("s-2")
    for stream in (first, second):
        registry.add(stream)
    registry.walk(first)
    first.abort(Cause.CANCEL)
    with pytest.raises(Busy):
        registry.walk(second)
    registry.remove(first)
    registry.walk(second)


def test_who_was_not_walked_frees_no_thread() -> None:
    """The removal of a stream that the loop has moved changes nothing of the others'."""
    registry = Registry(Slots(8, 1))
    walked, detached, next_one = live("s-1"), live("s-2"), live("s-3")
    for stream in (walked, detached, next_one):
        registry.add(stream)
    registry.walk(walked)
    detached.complete()
    registry.remove(detached)
    with pytest.raises(Busy):
        registry.walk(next_one)


def test_who_wants_to_know_is_told_of_each_slot(registry: Registry) -> None:
    """When one is taken or freed, and not under the lock: it may look at the registry."""
    held: list[int] = []
    registry.on_change = lambda: held.append(len(registry.held()))
    first, second = live("a"), live("b")
    registry.add(first)
    registry.add(second)
    registry.enter(first)
    registry.remove(first)
    assert held == [1, 2]  # the first has a holder left
    registry.leave(first)
    registry.remove(second)
    assert held == [1, 2, 1, 0]
    registry.slots = Slots(0, 0)
    with pytest.raises(Busy):
        registry.add(first)
    assert held == [1, 2, 1, 0]
