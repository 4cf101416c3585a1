"""What every bus promises: the same tests for local, unix and redis, with real processes.

A test that needs a second worker has the one of a `local` bus in its place.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from chatstream.bus.base import REMEMBER_PER_OWNER
from chatstream.bus.messages import Action, Answer, Reply, Request, encode
from chatstream.errors import Refused, Unconfirmed
from tests.bus.conftest import Pending, Service, Services, Worker
from tests.conftest import eventually

AT_ONCE = 0.6
"""Seconds, where a test tells an answer that waits for nobody from one that does (0.8 s)."""

ROUNDS = 8
"""How often streams or cancels meet, where their order makes a difference."""


def soon() -> float:
    """An instant at which commands to several workers can begin together."""
    return time.monotonic() + 0.02


def outcomes(pending: list[Pending]) -> list[Any]:
    """What commands returned, or the errors they raised."""
    found: list[Any] = []
    for command in pending:
        try:
            found.append(command.result())
        except (Refused, Unconfirmed) as error:
            found.append(error)
    return found


def endings(*members: Worker) -> dict[str, str]:
    """Those of all their streams."""
    return {name: how for member in members for name, how in member.endings().items()}


def assert_live(member: Worker, stream: str) -> None:
    assert member.ending(stream) == "live"


def assert_conflict(pending: Pending, what: str) -> None:
    with pytest.raises(Refused, match=what) as caught:
        pending.result()
    assert (caught.value.status, caught.value.code) == (409, "conflict")


# A cancel and its answer


@pytest.mark.parametrize("stream", [None, "a"])
@pytest.mark.parametrize("asked", ["its own worker", "another"])
def test_a_cancel_stops_the_stream_where_it_is(
    service: Service, stream: str | None, asked: str
) -> None:
    """Case 28: by its session or both names, any worker does, with cause CANCEL, and once."""
    one, other = service.join(2)
    assert one.claim("s", "a") is False
    one.claim("z", "b")
    assert_live(one, "a")
    assert (one if asked == "its own worker" else other).cancel("s", stream) is True
    assert one.endings() == {"a": "cancel", "b": "live"}
    assert [other.cancel("s", stream), one.cancel("s", stream)] == [False, False]


@pytest.mark.parametrize(
    ("owner", "session", "stream"),
    [
        ("me", "s-1", None),
        ("me", "s-", None),
        ("me", "s-112", None),
        ("me", "S-11", None),
        ("me", "", None),
        ("me", "a-11", None),
        ("me", "s-11", "a-1"),
        ("me", "s-11", "a-112"),
        ("me", "s-11", ""),
        ("me", "s-2", "a-11"),
        ("me", "other", "a-11"),
        ("you", "s-11", None),
        ("you", "s-11", "a-11"),
        ("", "s-11", None),
        ("mes", "-11", None),
    ],
)
def test_other_names_stop_nothing(
    service: Service, owner: str, session: str, stream: str | None
) -> None:
    """Case 20: not a prefix, not a longer name, not another session's, not another owner's."""
    one, other = service.join(2)
    one.claim("s-11", "a-11", "me")
    other.claim("s-2", "a-2", "me")
    assert one.cancel(session, stream, owner) is False
    assert other.cancel(session, stream, owner) is False
    assert endings(one, other) == {"a-11": "live", "a-2": "live"}


def test_the_same_names_of_two_owners_are_two_streams(service: Service) -> None:
    """They neither conflict nor supersede one another, and a cancel stops its owner's."""
    one, other = service.join(2)
    one.claim("s", "a", "me")
    other.claim("s", "a", "you")
    assert other.cancel("s", "a", "me") is True
    assert one.cancel("s", None, "me") is False
    assert one.cancel("s", "a", "you") is True


def test_an_unknown_session_is_answered_at_once(service: Service) -> None:
    """Nobody is waited for, by whichever names it is asked for."""
    _, other = service.join(2)
    for names in (("s", None), ("s", "a")):
        unknown = other.begin_cancel(*names)
        assert unknown.result() is False
        assert unknown.seconds < AT_ONCE


def test_a_stream_that_has_ended_is_not_stopped(service: Service) -> None:
    """Neither before its claim is given back nor after."""
    one, other = service.join(2)
    one.claim("s", "a")
    one.complete("a")
    assert [other.cancel("s"), other.cancel("s", "a"), one.cancel("s")] == [False] * 3
    one.release("a")
    assert [other.cancel("s"), other.cancel("s", "a"), one.cancel("s")] == [False] * 3
    assert one.ending("a") == "completed"


def test_a_late_cancel_leaves_the_sessions_next_stream(service: Service) -> None:
    """Case 22: a cancel for stream 1 by its name does not stop stream 2, wherever that is."""
    one, other = service.join(2)
    one.claim("s", "a1")
    one.release("a1")
    other.claim("s", "a2")
    assert [one.cancel("s", "a1"), other.cancel("s", "a1")] == [False, False]
    assert_live(other, "a2")
    assert one.cancel("s", "a2") is True


def test_two_services_do_not_meet(services: Services, shared: Service) -> None:
    """The same names in another directory, or under another prefix, are another stream's."""
    (mine,) = shared.join(1)
    (theirs,) = services.make(shared.kind).join(1)
    mine.claim("s", "a")
    theirs.claim("s", "a")
    assert theirs.cancel("s") is True
    assert_live(mine, "a")
    assert theirs.cancel("s", "early") is False
    assert mine.claim("s", "early") is False


@pytest.mark.parametrize("stream", [None, "a"])
def test_a_cancel_elsewhere_is_the_others_part_of_a_cancel(
    shared: Service, stream: str | None
) -> None:
    """For whoever has looked here already: it stops what another has, once, and nobody else's."""
    one, other = shared.join(2)
    one.claim("s", "a", "me")
    assert other.begin_cancel_elsewhere("s", stream, "you").result() is False
    assert_live(one, "a")
    assert other.begin_cancel_elsewhere("s", stream, "me").result() is True
    assert one.ending("a") == "cancel"
    assert other.begin_cancel_elsewhere("s", stream, "me").result() is False


def test_a_cancel_elsewhere_that_finds_nothing_is_remembered(service: Service) -> None:
    """If it names a stream, as any cancel that does."""
    one, other = service.join(2)
    for stream in ("a", None):
        unknown = other.begin_cancel_elsewhere("s", stream)
        assert unknown.result() is False
        assert unknown.seconds < AT_ONCE
    assert one.claim("s", "a") is True
    assert one.claim("s", "b") is False


def test_a_cancel_elsewhere_is_not_confirmed_by_who_hangs(shared: Service) -> None:
    """Nor denied; and it is carried out when the worker wakes."""
    one, other = shared.join(2, patience=0.3)
    one.claim("s", "a")
    one.hang()
    with pytest.raises(Unconfirmed):
        other.begin_cancel_elsewhere("s", "a").result()
    one.wake()
    eventually(lambda: one.ending("a") == "cancel", "the stream's end")


# A cancel that comes before its stream


def test_an_early_cancel_stops_the_stream_wherever_it_starts(service: Service) -> None:
    """Case 19: it is remembered for the stream, and once."""
    one, other = service.join(2)
    assert one.cancel("s", "a") is False
    assert other.cancel("s", "b") is False
    assert other.claim("s", "a") is True
    assert other.claim("z", "b") is False  # not of the session that was named
    assert other.claim("s", "b2") is False
    other.release("b")
    assert other.claim("s", "b", "you") is False  # nor of another owner
    other.release("b")
    assert other.claim("s", "b") is True
    assert {"a": "cancel", "b": "cancel"}.items() <= other.endings().items()


@pytest.mark.parametrize("reject", [False, True])
def test_an_early_cancel_counts_once(service: Service, reject: bool) -> None:
    """The next stream of that name starts, whatever is done with conflicts."""
    one, other = service.join(2, reject=reject)
    one.cancel("s", "a")
    assert other.claim("s", "a") is True
    other.release("a")
    assert other.claim("s", "a") is False
    other.release("a")
    assert one.claim("s", "a") is False


def test_a_cancel_without_a_stream_is_not_remembered(service: Service) -> None:
    """It means what is live, not what comes."""
    one, other = service.join(2)
    assert one.cancel("s") is False
    assert other.claim("s", "a") is False
    assert_live(other, "a")


def test_a_cancel_for_a_stream_that_was_is_not_remembered(service: Service) -> None:
    """It is late, not early, in whichever worker it arrives."""
    one, other = service.join(2)
    one.claim("s", "a")
    one.release("a")
    assert [one.cancel("s", "a"), other.cancel("s", "a")] == [False, False]
    assert other.claim("s", "a") is False
    assert_live(other, "a")


def test_an_early_cancel_is_forgotten_after_its_time(service: Service) -> None:
    """So it cannot stop what has nothing to do with it."""
    one, other = service.join(2, remember=0.2)
    one.cancel("s", "a")
    until = time.monotonic() + 0.25
    eventually(lambda: time.monotonic() > until)
    assert other.claim("s", "a") is False


def test_what_was_is_forgotten_after_its_time(service: Service) -> None:
    """Then a cancel that names it is an early one again."""
    one, other = service.join(2, remember=0.2)
    one.claim("s", "a")
    one.release("a")
    until = time.monotonic() + 0.25
    eventually(lambda: time.monotonic() > until)
    one.claim("z", "b")  # any next stream
    one.release("b")
    one.cancel("s", "a")
    assert other.claim("s", "a") is True


def test_early_cancels_are_bounded(service: Service) -> None:
    """Of one owner so many are remembered, the newest; others' are not touched by it."""
    assert REMEMBER_PER_OWNER == 64
    one, other = service.join(2)
    one.cancel("s", "a", "you")
    streams = [f"a{number}" for number in range(REMEMBER_PER_OWNER + 8)]
    for stream in streams:
        one.cancel("s", stream, "me")
    found = [other.claim("s", stream, "me") for stream in streams]
    assert found.count(True) == REMEMBER_PER_OWNER
    assert all(found[-REMEMBER_PER_OWNER // 2 :])
    assert other.claim("s", "a", "you") is True


def test_a_cancel_that_races_the_start_is_not_lost(service: Service) -> None:
    """Either it finds the stream, or the stream finds it; and then nothing is left of it."""
    one, other = service.join(2)
    pairs = {}
    for number in range(4 * ROUNDS):
        session, stream, at = f"s{number}", f"a{number}", soon() + number * 0.005
        claim = one.begin_claim(session, stream, at=at)
        pairs[session, stream] = claim, other.begin_cancel(session, stream, at=at)
    for (session, stream), (claim, cancel) in pairs.items():
        assert True in (claim.result(), cancel.result())
        assert one.ending(stream) == "cancel"
        one.release(stream)
        assert other.claim(session, stream) is False


# A session has one stream


def test_a_new_stream_supersedes_the_sessions_old_one(service: Service) -> None:
    """Case 23, across workers: when the claim is made the old stream has been aborted."""
    one, other = service.join(2)
    one.claim("s", "a1")
    assert other.claim("s", "a2") is False
    assert one.ending("a1") == "superseded"
    assert_live(other, "a2")


def test_the_old_streams_release_leaves_the_new_ones_claim(service: Service) -> None:
    """Case 24: a cancel from anywhere finds the new one, before and after."""
    one, other = service.join(2)
    one.claim("s", "a1")
    other.claim("s", "a2")
    one.release("a1")
    assert one.cancel("s") is True
    assert other.ending("a2") == "cancel"
    one.claim("s", "a3")
    other.release("a2")
    assert other.cancel("s") is True
    assert one.ending("a3") == "cancel"


def test_streams_of_a_session_in_one_worker(service: Service) -> None:
    """The newest is found by the session, and the release of an older one leaves it."""
    one, other = service.join(2)
    one.claim("s", "a1")
    one.claim("s", "a2")
    assert one.ending("a1") == "superseded"
    one.release("a1")
    assert other.cancel("s", "a1") is False
    assert other.cancel("s") is True
    assert one.ending("a2") == "cancel"
    one.release("a2")
    assert other.claim("s", "a3") is False


def test_reject_refuses_a_second_stream_of_a_session(service: Service) -> None:
    """It is a 409; the first stream lives, and of the second nothing is claimed."""
    one, other = service.join(2, reject=True)
    one.claim("s", "a1")
    assert_conflict(other.begin_claim("s", "a2"), "session")
    assert_live(one, "a1")
    assert other.cancel("s", "a2") is False
    assert other.cancel("s") is True
    assert one.ending("a1") == "cancel"


def test_reject_lets_a_stream_follow_one_that_has_ended(service: Service) -> None:
    """Also where that one's claim has not been given back yet."""
    one, other = service.join(2, reject=True)
    one.claim("s", "a1")
    one.complete("a1")
    assert other.claim("s", "a2") is False
    one.release("a1")
    assert one.cancel("s") is True
    assert other.ending("a2") == "cancel"


@pytest.mark.parametrize("session", ["s", "z"])
def test_a_live_streams_id_is_refused(service: Service, session: str) -> None:
    """It is a 409 in its own session and in another, and nothing is claimed."""
    one, other = service.join(2)
    one.claim("s", "a")
    assert_conflict(other.begin_claim(session, "a"), "streamId")
    assert other.cancel("z") is False
    assert_live(one, "a")
    assert other.cancel("s") is True
    one.release("a")
    assert other.claim(session, "a") is False


def begin_twelve(members: list[Worker], session: str) -> dict[str, Pending]:
    """Twelve streams of a session, three in each of four workers, all at once."""
    at = soon()
    names = [f"{session}-{number}" for number in range(12)]
    return {
        name: members[number % 4].begin_claim(session, name, at=at)
        for number, name in enumerate(names)
    }


def test_of_streams_that_begin_at_once_one_lives(shared: Service) -> None:
    """The others are superseded: none is orphaned, a cancel from anywhere finds the one."""
    members = shared.join(4)
    for turn in range(ROUNDS):
        claims = begin_twelve(members, f"s{turn}")
        assert outcomes(list(claims.values())) == [False] * 12
        found = {name: how for name, how in endings(*members).items() if name in claims}
        assert sorted(found.values()) == ["live"] + ["superseded"] * 11
        (survivor,) = [name for name, how in found.items() if how == "live"]
        assert members[turn % 4].cancel(f"s{turn}") is True
        assert endings(*members)[survivor] == "cancel"


def test_of_streams_that_begin_at_once_one_is_not_rejected(shared: Service) -> None:
    """The others are 409s; a cancel from anywhere finds the one."""
    members = shared.join(4, reject=True)
    for turn in range(ROUNDS):
        claims = begin_twelve(members, f"s{turn}")
        found = dict(zip(claims, outcomes(list(claims.values())), strict=True))
        (survivor,) = [name for name, outcome in found.items() if outcome is False]
        del found[survivor]
        assert {(409, "conflict")} == {(error.status, error.code) for error in found.values()}
        assert members[turn % 4].cancel(f"s{turn}") is True
        assert endings(*members)[survivor] == "cancel"


def test_of_many_cancels_at_once_one_is_told_that_it_stopped_the_stream(service: Service) -> None:
    """Case 21: fifty, from three workers and the stream's own: one True, one abort."""
    members = service.join(4)
    for turn in range(ROUNDS):
        session, at = f"s{turn}", soon()
        members[0].claim(session, f"a{turn}")
        cancels = [
            members[number % 4].begin_cancel(session, f"a{turn}" if number % 3 else None, at=at)
            for number in range(50)
        ]
        assert sorted(outcomes(cancels)) == [False] * 49 + [True]
        assert members[0].ending(f"a{turn}") == "cancel"


# A worker that dies, or hangs


def test_a_hanging_workers_stream_is_not_confirmed_to_be_stopped(shared: Service) -> None:
    """It is never a false answer; within a second; and when the worker wakes, it is carried out."""
    one, other = shared.join(2)
    one.claim("s", "a")
    one.claim("z", "b")
    one.hang()
    cancels = [other.begin_cancel("s"), other.begin_cancel("z", "b")]
    for cancel in cancels:
        with pytest.raises(Unconfirmed):
            cancel.result()
        assert AT_ONCE < cancel.seconds < 2
    one.wake()
    eventually(lambda: one.endings() == {"a": "cancel", "b": "cancel"}, "the streams' end")
    assert [other.cancel("s"), other.cancel("z", "b")] == [False, False]


def test_a_hanging_workers_session_can_go_on_elsewhere(shared: Service) -> None:
    """A new stream is claimed within a second; when the worker wakes, the old is superseded."""
    one, other, third = shared.join(3)
    one.claim("s", "a1")
    one.hang()
    claim = other.begin_claim("s", "a2")
    assert claim.result() is False
    assert claim.seconds < 2
    one.wake()
    eventually(lambda: one.ending("a1") == "superseded", "the old stream's end")
    one.release("a1")
    assert_live(other, "a2")
    assert third.cancel("s") is True
    assert other.ending("a2") == "cancel"


@pytest.mark.parametrize("stream", ["a2", None])
def test_a_hanging_workers_session_is_stopped_where_it_goes_on(
    shared: Service, stream: str | None
) -> None:
    """A cancel finds the new stream while the old one's worker hangs, and so does the next."""
    one, other, third = shared.join(3, patience=0.3)
    one.claim("s", "a1")
    one.hang()
    other.claim("s", "a2")
    assert third.cancel("s", stream) is True
    assert other.ending("a2") == "cancel"
    other.release("a2")
    third.claim("s", "a3")
    one.wake()
    eventually(lambda: one.ending("a1") == "superseded", "the old stream's end")
    assert_live(third, "a3")
    assert other.cancel("s") is True


def test_a_hanging_workers_session_is_refused_with_reject(shared: Service) -> None:
    """Its stream may be live, so that is what it counts as."""
    one, other = shared.join(2, reject=True)
    one.claim("s", "a1")
    one.hang()
    of_session, of_stream = other.begin_claim("s", "a2"), other.begin_claim("z", "a1")
    assert_conflict(of_session, "session")
    assert_conflict(of_stream, "streamId")
    one.wake()
    assert other.cancel("s") is True
    assert one.ending("a1") == "cancel"


def test_one_hanging_worker_delays_nobody_else(shared: Service) -> None:
    """Streams of others start, are stopped and are not found, all at once."""
    one, other, third = shared.join(3)
    one.claim("s", "a")
    one.hang()
    stuck = other.begin_cancel("s")
    commands = [other.begin_claim("z", "b"), other.begin_cancel("unknown", "u")]
    outcomes(commands)
    commands += [third.begin_cancel("z")]
    assert outcomes(commands) == [False, False, True]
    assert max(command.seconds for command in commands) < AT_ONCE
    with pytest.raises(Unconfirmed):
        stuck.result()


def test_workers_under_gevent(services: Services, shared: Service) -> None:
    """The same limit, the same place for who asks again, and all is stopped and can be reached."""
    one, other = services.make(shared.kind, max_streams_per_owner=1).join(2, gevent=True)
    one.claim("s", "a1")
    with pytest.raises(Refused):
        other.claim("z", "b")
    assert other.claim("s", "a2") is False
    assert one.ending("a1") == "superseded"
    assert one.cancel("s") is True
    assert one.claim("z", "b2") is False
    with pytest.raises(Refused):
        other.claim("s", "a3")
    assert other.cancel_all("") == {one.pid: ["b2"], other.pid: []}
    assert one.ending("b2") == "cancel"
    one.begin("check").result()


# What is none of its messages


def foreign() -> list[bytes]:
    """Messages that no bus of this format sends. All would stop the stream, if they were read."""
    request = json.loads(encode(Request(Action.CANCEL, "", "s", "a", origin="1")))
    fields = ({**request, name: value} for name, value in FALSE_FIELDS)
    short = ({key: request[key] for key in request if key != name} for name in request)
    return [
        b"",
        b"\0",
        b"cancel s",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"chatstream"',
        b"[" * 30_000,
        b"{" + b'"a":{' * 5000,
        encode(Request(Action.CANCEL, "", "s", "a", origin="1"))[:-1],
        *(json.dumps(message).encode() for message in (*fields, *short)),
    ]


FALSE_FIELDS: list[tuple[str, Any]] = [
    ("chatstream", 0),
    ("chatstream", 2),
    ("chatstream", "1"),
    ("chatstream", None),
    ("action", "stop"),
    ("action", ["cancel"]),
    ("action", None),
    ("owner", 7),
    ("owner", None),
    ("session", 1),
    ("session", ["s"]),
    ("stream", {"a": "a"}),
    ("id", None),
    ("origin", 1),
]


def test_foreign_messages_are_dropped_with_one_warning(shared: Service) -> None:
    """They stop nothing and break nothing."""
    one, other = shared.join(2)
    one.claim("s", "a")
    shared.post(one, *foreign())
    assert other.cancel("unknown") is False
    assert other.claim("z", "b") is False
    assert_live(one, "a")
    assert other.cancel("s") is True  # it has read all that came before
    line = f"[bus] {shared.kind}: dropped a message that is none of ours"
    eventually(lambda: one.log() == [line], "one line")
    shared.post(one, b"and another")
    one.claim("s", "a2")
    assert other.cancel("s") is True
    assert one.log() == [line]


def test_a_reply_that_nobody_waits_for_is_dropped(shared: Service) -> None:
    """So is one that says that something was stopped."""
    one, other = shared.join(2)
    one.claim("s", "a")
    shared.post(one, *[encode(Reply(answer, "5f0c", "1")) for answer in Answer])
    assert other.cancel("s") is True
    assert one.ending("a") == "cancel"
    assert other.cancel("s") is False


def test_a_request_from_nowhere_is_carried_out(shared: Service, tmp_path: Path) -> None:
    """Its sender has gone: the reply is lost, and no more than that."""
    one, other = shared.join(2)
    one.claim("s", "a")
    shared.post(one, encode(Request(Action.CANCEL, "", "s", "a", origin="0" * 32)))
    eventually(lambda: one.ending("a") == "cancel", "the stream's end")
    one.claim("z", "b")
    assert other.cancel("z") is True
    assert one.log() == []


# Leaving


def test_streams_and_cancels_leave_nothing_open(service: Service) -> None:
    """Neither a descriptor nor a thread, in the worker that has them and in the one that asks."""
    one, other = service.join(2)

    def streams(first: int) -> int:
        for number in range(first, first + 25):
            session, older, newer = f"s{number}", f"a{number}", f"b{number}"
            one.claim(session, older)
            other.claim(session, newer)
            assert one.cancel(session) is True
            assert one.cancel("unknown", f"u{number}") is False
            one.release(older)
            other.release(newer)
        return sum(member.open_descriptors() + member.threads() for member in (one, other))

    # Some are made when first needed: connections, the loop.
    before = streams(0)
    eventually(lambda: streams(100) < before + 10, f"about {before}")


def test_who_has_left_has_no_stream(shared: Service) -> None:
    """Its session is unknown at once, to be claimed again."""
    one, other = shared.join(2)
    one.claim("s", "a")
    one.begin("stop").result()
    assert one.ending("a") == "shutdown"
    cancel = other.begin_cancel("s")
    assert cancel.result() is False
    assert cancel.seconds < AT_ONCE
    assert other.claim("s", "a") is False
    assert other.cancel("s") is True


def test_leaving_twice_is_no_fault(service: Service) -> None:
    """The second time nothing happens; a stream that ends afterwards is released without one."""
    one, _ = service.join(2)
    one.claim("s", "a")
    one.begin("stop").result()
    one.begin("stop").result()
    one.release("a")
    assert one.log() == []
