"""registry: which streams live in this process, by owner and whole name."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest

from chatstream.errors import Busy, Refused
from chatstream.outcome import Cause
from chatstream.registry import REMEMBER, REMEMBER_PER_OWNER, Registry
from chatstream.stream import Stream

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
    return Registry(max_streams=8)


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The registry's clock, in the test's hand."""
    now = [1000.0]
    monkeypatch.setattr("chatstream.registry.monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


# Names


def test_a_stream_is_found_by_its_session_and_by_both_names(registry: Registry) -> None:
    """A live stream is found by session_id alone, and by session_id with stream_id."""
    stream = live("s", "t")
    assert registry.add(stream) == (None, False)
    assert stream is registry.cancel("", "s")
    assert stream is registry.cancel("", "s", "t")
    assert [stream] == registry.live()


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
        ("you", "s-11", None),
        ("you", "s-11", "t-11"),
        ("", "s-11", None),
        ("mes", "-11", None),
    ],
)
def test_nothing_else_finds_it(
    registry: Registry, owner: str, session_id: str, stream_id: str | None
) -> None:
    """Not a prefix, not a longer name, not another session's, not another owner's."""
    registry.add(live("s-11", "t-11", "me"))
    registry.add(live("s-2", "t-2", "me"))
    assert registry.cancel(owner, session_id, stream_id) is None


def test_owners_do_not_meet(registry: Registry) -> None:
    """The same two names of two owners are two streams: no conflict, no superseding."""
    mine, yours = live("s", "t", "me"), live("s", "t", "you")
    assert registry.add(mine) == (None, False)
    assert registry.add(yours) == (None, False)
    assert mine is registry.cancel("me", "s", "t")
    assert yours is registry.cancel("you", "s", "t")


def test_a_stream_that_has_ended_is_not_found(registry: Registry) -> None:
    """Between its end and its removal a stream is gone for a cancel, by both ways of naming it."""
    stream = live("s", "t")
    registry.add(stream)
    stream.complete()
    assert registry.cancel("", "s") is None
    assert registry.cancel("", "s", "t") is None
    assert registry.live() == []


def test_a_removed_stream_is_not_found(registry: Registry) -> None:
    """After its removal nothing of a stream is left."""
    gone(registry, live("s", "t"))
    assert registry.cancel("", "s") is None
    assert registry.cancel("", "s", "t") is None
    assert len(registry) == 0


# One stream of a session


def test_a_new_stream_supersedes_the_sessions_old_one(registry: Registry) -> None:
    """The old stream is handed back to be aborted, and the session's name is the new one's."""
    old, new = live("s", "t-1"), live("s", "t-2")
    registry.add(old)
    assert (old, False) == registry.add(new)
    assert new is registry.cancel("", "s")
    assert old is registry.cancel("", "s", "t-1")


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
    assert registry.add(live("s")) == (None, False)


def test_the_old_streams_removal_leaves_the_new_ones_entry(registry: Registry) -> None:
    """Case 24: the superseded stream's late cleanup does not take the new one's names."""
    old, new = live("s", "t"), live("s", "t")
    registry.add(old)
    old.abort(Cause.SUPERSEDED)
    registry.add(new)
    registry.remove(old)
    assert new is registry.cancel("", "s")
    assert new is registry.cancel("", "s", "t")
    assert len(registry) == 1


def test_reject_refuses_a_second_stream_of_a_session() -> None:
    """With reject_conflicts the second stream is a 409, and the first goes on untouched."""
    registry = Registry(8, reject_conflicts=True)
    first = live("s")
    registry.add(first)
    with pytest.raises(Refused) as caught:
        registry.add(live("s"))
    assert (caught.value.code, caught.value.status) == ("conflict", 409)
    assert first is registry.cancel("", "s")
    assert len(registry) == 1


def test_reject_allows_the_next_once_the_first_has_ended() -> None:
    """Only a live stream is in the way, not one that waits for its cleanup."""
    registry = Registry(8, reject_conflicts=True)
    first = live("s")
    registry.add(first)
    first.abort(Cause.CANCEL)
    assert registry.add(live("s")) == (None, False)


@pytest.mark.parametrize("session", ["s", "another"])
def test_a_live_stream_id_is_refused(registry: Registry, session: str) -> None:
    """A streamId that is live is a 409, in its own session and in any other of the owner."""
    first = live("s", "t")
    registry.add(first)
    with pytest.raises(Refused) as caught:
        registry.add(live(session, "t"))
    assert (caught.value.code, caught.value.status) == ("conflict", 409)
    assert first is registry.cancel("", "s", "t")
    assert len(registry) == 1


def test_an_ended_stream_id_can_be_used_again(registry: Registry) -> None:
    """A streamId is taken only while its stream is live, so a retry may reuse it at once."""
    old, new = live("s", "t"), live("s2", "t")
    registry.add(old)
    old.complete()
    registry.add(new)
    registry.remove(old)
    assert new is registry.cancel("", "s2", "t")


def test_of_many_at_once_one_has_the_session() -> None:
    """Case 23: of N streams added to a session at once, N-1 are handed back to be aborted."""
    registry = Registry(64)
    streams = [live("s") for _ in range(32)]
    barrier, superseded = threading.Barrier(32), []

    def add(stream: Stream) -> None:
        barrier.wait(5)
        superseded.append(registry.add(stream)[0])

    threads = [threading.Thread(target=add, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    left = registry.cancel("", "s")
    assert superseded.count(None) == 1
    assert set(streams) == {stream for stream in superseded if stream} | {left}
    assert len(superseded) == 32


# Slots


def test_a_full_worker_refuses(registry: Registry) -> None:
    """With every slot taken the next stream is Busy, leaves no trace, and harms no other."""
    streams = [live(f"s-{n}") for n in range(8)]
    for stream in streams:
        registry.add(stream)
    with pytest.raises(Busy):
        registry.add(live("one too many", "t"))
    assert len(registry) == 8
    assert registry.cancel("", "one too many") is None
    assert streams == [registry.cancel("", f"s-{n}") for n in range(8)]


def test_a_refused_stream_supersedes_nothing() -> None:
    """A Busy worker leaves the session's live stream where it is."""
    registry = Registry(1)
    old = live("s")
    registry.add(old)
    with pytest.raises(Busy):
        registry.add(live("s"))
    assert old is registry.cancel("", "s")


def test_removal_frees_the_slot() -> None:
    """A slot is free again as soon as its one holder is gone."""
    registry = Registry(1)
    for _ in range(3):
        gone(registry, live())
    assert len(registry) == 0


def test_an_ended_stream_holds_its_slot_until_its_last_holder_leaves() -> None:
    """The call to the provider may outlive the iterable: both have to be gone."""
    registry = Registry(1)
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
    registry = Registry(1)
    stream = live()
    registry.add(stream)
    registry.enter(stream)
    registry.leave(stream)
    assert len(registry) == 1
    registry.remove(stream)
    assert len(registry) == 0


# Cancels that come early


def test_an_early_cancel_is_remembered(registry: Registry) -> None:
    """A cancel that names a stream not seen yet makes exactly that stream be born cancelled."""
    assert registry.cancel("me", "s", "t") is None
    assert registry.add(live("s", "t", "me")) == (None, True)


def test_an_early_cancel_is_used_once(registry: Registry) -> None:
    """The next stream of the same names lives."""
    registry.cancel("", "s", "t")
    stream = live("s", "t")
    assert registry.add(stream) == (None, True)
    stream.abort(Cause.CANCEL)
    registry.remove(stream)
    assert registry.add(live("s", "t")) == (None, False)


@pytest.mark.parametrize(
    ("owner", "session_id", "stream_id"),
    [("you", "s", "t"), ("me", "s2", "t"), ("me", "s", "t2"), ("me", "t", "s")],
)
def test_an_early_cancel_hits_nobody_else(
    registry: Registry, owner: str, session_id: str, stream_id: str
) -> None:
    """Owner, session and stream all have to be those of the cancel; the right one still comes."""
    registry.cancel("me", "s", "t")
    other = live(session_id, stream_id, owner)
    assert registry.add(other) == (None, False)
    other.complete()
    assert registry.add(live("s", "t", "me")) == (None, True)


def test_a_cancel_of_a_session_is_not_remembered(registry: Registry) -> None:
    """Without a streamId a late Stop must not kill the session's next answer."""
    registry.cancel("", "s")
    assert registry.add(live("s", "t")) == (None, False)
    registry.cancel("", "s2", None)
    assert registry.add(live("s2")) == (None, False)


@pytest.mark.parametrize(("seconds", "remembered"), [(0, True), (29.9, True), (30.1, False)])
def test_an_early_cancel_is_kept_for_thirty_seconds(
    registry: Registry, pass_time: Callable[[float], None], seconds: float, remembered: bool
) -> None:
    """Remembered for 30 s, and forgotten then."""
    registry.cancel("", "s", "t")
    pass_time(seconds)
    assert (None, remembered) == registry.add(live("s", "t"))


def test_each_early_cancel_has_its_own_thirty_seconds(
    registry: Registry, pass_time: Callable[[float], None]
) -> None:
    """A later cancel of the same owner neither lengthens nor shortens an earlier one's time."""
    registry.cancel("", "s", "t-1")
    pass_time(20)
    registry.cancel("", "s", "t-2")
    pass_time(15)
    registry.cancel("", "s", "t-3")
    assert registry.add(live("s", "t-1"))[1] is False
    pass_time(16)
    assert registry.add(live("s", "t-2"))[1] is False
    assert registry.add(live("s", "t-3"))[1] is True


def test_a_repeated_early_cancel_counts_from_the_last(
    registry: Registry, pass_time: Callable[[float], None]
) -> None:
    """A user who presses Stop twice is remembered from the second time."""
    registry.cancel("", "s", "t")
    pass_time(20)
    registry.cancel("", "s", "t")
    pass_time(20)
    assert registry.add(live("s", "t")) == (None, True)


def test_an_owner_has_sixty_four_early_cancels(registry: Registry) -> None:
    """The 65th pushes the owner's oldest out, and nobody else's."""
    registry.cancel("you", "s", "yours")
    for n in range(REMEMBER_PER_OWNER + 1):
        registry.cancel("me", "s", f"t-{n}")
    assert registry.add(live("s", "yours", "you"))[1] is True
    assert registry.add(live("s", "t-0", "me")) == (None, False)
    assert registry.add(live("s", "t-1", "me"))[1] is True
    assert registry.add(live("s", f"t-{REMEMBER_PER_OWNER}", "me"))[1] is True


def test_the_same_early_cancel_many_times_is_one(registry: Registry) -> None:
    """Repeating one cancel does not push another out."""
    registry.cancel("", "s", "t-1")
    for _ in range(200):
        registry.cancel("", "s", "t-2")
    assert registry.add(live("s", "t-1")) == (None, True)


def test_a_repeated_early_cancel_is_the_owners_newest(registry: Registry) -> None:
    """Repeated, a cancel is the last to be pushed out."""
    for n in range(REMEMBER_PER_OWNER):
        registry.cancel("", "s", f"t-{n}")
    registry.cancel("", "s", "t-0")
    registry.cancel("", "s", "one more")
    assert registry.add(live("s", "t-1"))[1] is False
    assert registry.add(live("s", "t-0"))[1] is True


def test_a_cancel_of_a_stream_that_has_been_is_late_not_early(registry: Registry) -> None:
    """A Stop that comes after its stream's end is not kept for a stream of the same names."""
    gone(registry, live("s", "t"))
    registry.cancel("", "s", "t")
    assert registry.add(live("s", "t")) == (None, False)


def test_a_cancel_of_an_ended_stream_is_not_remembered(registry: Registry) -> None:
    """Nor one that comes between a stream's end and its removal."""
    stream = live("s", "t")
    registry.add(stream)
    stream.complete()
    registry.cancel("", "s", "t")
    registry.remove(stream)
    assert registry.add(live("s", "t")) == (None, False)


def test_a_cancel_of_a_live_stream_is_not_remembered(registry: Registry) -> None:
    """A cancel that found its stream is used up."""
    stream = live("s", "t")
    registry.add(stream)
    assert stream is registry.cancel("", "s", "t")
    stream.abort(Cause.CANCEL)
    registry.remove(stream)
    assert registry.add(live("s", "t")) == (None, False)


def test_a_busy_worker_does_not_use_an_early_cancel_up() -> None:
    """The cancel stays for the caller's retry."""
    registry = Registry(1)
    registry.cancel("", "s", "t")
    other = live("other")
    registry.add(other)
    with pytest.raises(Busy):
        registry.add(live("s", "t"))
    registry.remove(other)
    assert registry.add(live("s", "t")) == (None, True)


def test_owners_do_not_accumulate(registry: Registry, pass_time: Callable[[float], None]) -> None:
    """What ten thousand callers left behind is gone with the first use after its time."""
    for n in range(10_000):
        registry.cancel(f"owner-{n}", "s", "t")
        gone(registry, live("s", "t2", f"owner-{n}"))
    assert len(registry._early._names) >= 10_000
    pass_time(REMEMBER + 1)
    registry.cancel("last", "s", "t")
    gone(registry, live("s", "t2", "last"))
    for recent in (registry._early, registry._gone):
        assert list(recent._names) == ["last"]
        assert len(recent._owners) == 1
    assert (
        len(registry._sessions),
        len(registry._streams),
        len(registry._holders),
    ) == (0, 0, 0)


def test_an_owner_that_never_pauses_does_not_accumulate(
    registry: Registry, pass_time: Callable[[float], None]
) -> None:
    """One owner that cancels for ever, a second apart, keeps only what is young enough."""
    for n in range(1000):
        registry.cancel("me", "s", f"t-{n}")
        pass_time(1.0)
    assert len(registry._early._names["me"]) <= REMEMBER_PER_OWNER
    assert len(registry._early._owners) == 1
