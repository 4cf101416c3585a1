"""How many live streams an owner may have: the same for local, unix and redis, with real processes.

A test that needs a second worker has the one of a `local` bus in its place.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import pytest

from chatstream.bus.unix.directory import NAMES, VisitedDirectory
from chatstream.bus.unix.locked_places import base_of, holders, part_of
from chatstream.errors import Refused
from tests.bus.conftest import Pending, Service, Services, Worker
from tests.bus.peer import Peer
from tests.bus.test_contract import (
    AT_ONCE,
    ROUNDS,
    assert_conflict,
    assert_live,
    endings,
    outcomes,
    soon,
)
from tests.conftest import eventually


class Limited:
    """Makes services of a kind whose owners may have so many streams."""

    def __init__(self, services: Services, kind: str) -> None:
        self._services = services
        self.kind = kind

    def __call__(self, limit: int | None, **settings: Any) -> Service:
        settings["max_streams_per_owner"] = limit
        return self._services.make(self.kind, **settings)


@pytest.fixture(params=["local", "unix", "redis"])
def limited(services: Services, request: pytest.FixtureRequest) -> Limited:
    return Limited(services, request.param)


@pytest.fixture(params=["unix", "redis"])
def shared(services: Services, request: pytest.FixtureRequest) -> Limited:
    """Of services that can have more than one worker."""
    return Limited(services, request.param)


def assert_refused(pending: Pending) -> None:
    with pytest.raises(Refused) as caught:
        pending.result()
    assert (caught.value.status, caught.value.code) == (429, "too_many_streams")


def live(*members: Worker) -> set[str]:
    return {name for name, how in endings(*members).items() if how == "live"}


def places(service: Service, owner: str = "") -> bool:
    """Whether anybody has a place of an owner."""
    if service.kind == "redis":
        return bool(service.keys("places:*"))
    return bool(holders_of(service, owner))


def holders_of(service: Service, owner: str = "") -> set[int]:
    """The workers of one host that have places of an owner."""
    directory = VisitedDirectory(service.directory)
    try:
        return holders(directory.names[part_of(owner, len(directory.names))], owner)
    finally:
        directory.leave()


def test_an_owner_has_so_many_streams_in_all_workers(limited: Limited) -> None:
    """One more is a 429, whichever worker is asked, and the sentence says what to do."""
    one, other = limited(2).join(2)
    one.claim("s1", "a1")
    other.claim("s2", "a2")
    for member in (one, other):
        refused = member.begin_claim("s3", "a3")
        assert_refused(refused)
        with pytest.raises(Refused, match=r"You have 2 answers running\. Stop one of them first"):
            refused.result()
        assert refused.seconds < AT_ONCE
    assert live(one, other) == {"a1", "a2"}


def test_owners_do_not_share(limited: Limited) -> None:
    """Each has its own bound; all that nobody names are one owner."""
    one, other = limited(1).join(2)
    for owner in ("", "me", "you", "\ud83d me\0"):
        one.claim("s", "a", owner)
        assert_refused(other.begin_claim("z", "b", owner))
        assert_refused(one.begin_claim("z", "b", owner))


def test_without_a_limit_there_is_none(limited: Limited) -> None:
    """And no place is kept."""
    service = limited(None)
    one, other = service.join(2)
    for number in range(12):
        (one, other)[number % 2].claim(f"s{number}", f"a{number}")
    assert len(live(one, other)) == 12
    if service.kind != "local":
        assert not places(service)


def test_a_stream_that_is_refused_has_claimed_nothing(limited: Limited) -> None:
    """No cancel finds it, and its names can be used when there is room."""
    one, other = limited(1).join(2)
    one.claim("s1", "a1")
    assert_refused(other.begin_claim("s2", "a2"))
    assert [one.cancel("s2"), other.cancel("s2")] == [False, False]
    one.release("a1")
    assert one.claim("s2", "a2x") is False
    assert other.cancel("s2") is True


def test_who_has_ended_does_not_count(limited: Limited) -> None:
    """From then on, wherever the next one begins: its client may be slow to take the end."""
    one, other = limited(1).join(2)
    one.claim("s0", "a0")
    for number, (here, there) in enumerate([(one, other), (other, one), (one, one)] * 3, 1):
        old, new = f"a{number - 1}", f"a{number}"
        ended = next(member for member in (one, other) if old in member.endings())
        if number % 2:
            ended.complete(old)
        else:
            assert here.cancel(f"s{number - 1}") is True
        claim = there.begin_claim(f"s{number}", new)
        assert claim.result() is False
        assert claim.seconds < AT_ONCE
        assert live(one, other) == {new}
        assert_refused(here.begin_claim("more", "more"))


def test_late_releases_leave_others_their_places(limited: Limited) -> None:
    """A client that takes its end when the session, or another, has gone on for long."""
    one, other = limited(1).join(2)
    one.claim("s", "a1")
    one.claim("s", "a2")
    one.release("a1")
    assert_refused(other.begin_claim("z", "b"))
    other.claim("s", "a3")
    one.release("a2")
    assert_refused(one.begin_claim("z", "b"))
    other.complete("a3")
    one.claim("z", "c")
    other.release("a3")
    assert_refused(other.begin_claim("y", "b"))
    assert live(one, other) == {"c"}


def test_a_session_that_asks_again_has_its_place(limited: Limited) -> None:
    """Whichever worker the old stream is in: the superseded one does not count."""
    service = limited(1)
    one, other = service.join(2)
    chain = [one, one, other, one, other, other]
    for number, member in enumerate(chain):
        claim = member.begin_claim("s", f"a{number}")
        assert claim.result() is False
        assert claim.seconds < AT_ONCE
        assert live(one, other) == {f"a{number}"}
        assert_refused(other.begin_claim("z", "b"))
        assert_refused(one.begin_claim("z", "b"))
    for number, member in enumerate(chain):
        member.release(f"a{number}")
    if service.kind != "local":
        assert not places(service)


def test_a_conflict_comes_before_the_limit(limited: Limited) -> None:
    """With `reject`, a session that is live is a 409: to wait for another place would not help."""
    one, other = limited(1).join(2, reject=True)
    one.claim("s", "a1")
    assert_conflict(other.begin_claim("s", "a2"), "session")
    assert_conflict(one.begin_claim("s", "a2"), "session")
    assert_refused(other.begin_claim("z", "b"))
    one.complete("a1")
    assert other.claim("s", "a3") is False


def test_of_streams_that_begin_at_once_so_many_live(limited: Limited) -> None:
    """Of 24 in four workers: not one more than may, and not one less."""
    members = limited(3).join(4)
    for turn in range(ROUNDS):
        at = soon()
        names = [f"{turn}-{number}" for number in range(24)]
        claims = [
            members[number % 4].begin_claim(name, name, at=at) for number, name in enumerate(names)
        ]
        found = outcomes(claims)
        assert found.count(False) == 3
        assert {error.status for error in found if error is not False} == {429}
        assert len(live(*members)) == 3
        for name in live(*members):
            assert members[0].cancel(name) is True


@pytest.mark.parametrize("again", [0, 1])
def test_nobody_takes_the_place_of_a_session_that_asks_again(limited: Limited, again: int) -> None:
    """In its own worker or another, while others ask for any place they can get."""
    members = limited(1).join(4)
    members[0].claim("s", "a")
    holder = 0
    for turn in range(3 * ROUNDS):
        at, asks = soon(), (holder + again) % 4
        mine = members[asks].begin_claim("s", f"a{turn}", at=at)
        theirs = [
            members[number % 4].begin_claim(f"z{turn}-{number}", f"b{turn}-{number}", at=at)
            for number in range(8)
        ]
        assert mine.result() is False
        assert {error.status for error in outcomes(theirs)} == {429}
        assert live(*members) == {f"a{turn}"}
        holder = asks


def test_sessions_that_ask_again_everywhere_keep_their_places(shared: Limited) -> None:
    """Two that have all there are, each from three workers at once, and another that has none."""
    members = shared(2).join(3)
    for session in ("s0", "s1"):
        members[0].claim(session, session)
    for turn in range(2 * ROUNDS):
        at = soon()
        claims = [
            members[number % 3].begin_claim(f"s{number % 2}", f"{turn}-{number}", at=at)
            for number in range(6)
        ]
        other = members[turn % 3].begin_claim("z", f"z{turn}", at=at)
        found = outcomes(claims)
        assert_refused(other)
        names = live(*members)
        assert sorted(int(name[-1]) % 2 for name in names) == [0, 1], "one of each session"
        # Who would have been superseded at once may be refused in its stead.
        refused = {f"{turn}-{number}" for number, each in enumerate(found) if each is not False}
        assert not refused & names


def test_who_would_be_refused_leaves_no_place(shared: Limited) -> None:
    """A session that has none, from four workers at once: one supersedes what has no place yet."""
    members = shared(2).join(4)
    for name in ("s0", "s1"):
        members[0].claim(name, name)
    for turn in range(4 * ROUNDS):
        at = soon()
        claims = [
            members[number % 4].begin_claim(f"z{turn}", f"{turn}-{number}", at=at)
            for number in range(8)
        ]
        for claim in claims:
            with contextlib.suppress(Refused):  # or ended meanwhile
                claim.result()
        assert live(*members) == {"s0", "s1"}


# Workers that die, hang, or have many


def test_a_killed_workers_places_are_free(services: Services, shared: Limited) -> None:
    """On one host at once; with Redis when they have expired."""
    service = shared(1, **({"bus_ttl": 3} if shared.kind == "redis" else {}))
    one, other = service.join(2, patience=0.2)
    one.claim("s", "a")
    assert_refused(other.begin_claim("z", "b"))
    one.kill()
    if service.kind == "redis":
        assert_refused(other.begin_claim("z", "b"))

        def claimed() -> bool:
            return outcomes([other.begin_claim("z", "b")]) == [False]

        eventually(claimed, "a place")
    else:
        assert other.claim("z", "b") is False
    assert_refused(other.begin_claim("y", "c"))


def test_a_hanging_workers_streams_count(shared: Limited) -> None:
    """They may be live; but the session itself can go on elsewhere, within a second."""
    one, other, third = shared(1).join(3)
    one.claim("s", "a1")
    one.hang()
    refused = other.begin_claim("z", "b")
    assert_refused(refused)
    assert refused.seconds < 2
    claim = other.begin_claim("s", "a2")
    assert claim.result() is False
    assert claim.seconds < 2
    one.wake()
    eventually(lambda: one.ending("a1") == "superseded", "the old stream's end")
    assert_live(other, "a2")
    for member in (third, one, other):
        assert_refused(member.begin_claim("z", "b"))
    other.complete("a2")
    assert third.claim("z", "c") is False
    assert_refused(other.begin_claim("y", "b"))


def test_more_places_than_a_page_has_streams(shared: Limited) -> None:
    """Of those whose streams have ended each is found."""
    one, other = shared(300).join(2)
    one.begin("claim_many", count=300).result()
    assert_refused(other.begin_claim("z", "b", "many"))
    for number in (5, 295):
        one.complete(f"{'a' * 100}{number}")
    assert other.claim("y1", "c1", "many") is False
    assert other.claim("y2", "c2", "many") is False
    assert_refused(other.begin_claim("z", "b", "many"))


def test_who_is_superseded_gives_its_place_up_on_one_host(services: Services) -> None:
    """In that moment, and not when somebody asks: spare places are no lasting ones."""
    service = services.make("unix", max_streams_per_owner=3)
    one, other = service.join(2)
    one.claim("s", "a1")
    other.claim("s", "a2")
    assert holders_of(service) == {other.pid}
    one.claim("s", "a3")
    assert holders_of(service) == {one.pid}


def test_who_has_superseded_a_stream_is_not_refused(services: Services) -> None:
    """Somebody has been faster to take the place that this freed, and would have to give it up."""
    service = services.make("unix", max_streams_per_owner=1)
    one, other = service.join(2)
    one.claim("s", "a1")
    file = service.directory / f"names-{part_of('', NAMES):x}"
    thief = Peer(
        "from pathlib import Path",
        "from chatstream.bus.unix.record_locks import RecordLocks",
        f"locks = RecordLocks(Path({str(file)!r}))",
    )
    try:
        thief.begin(f"[1 for _ in iter(lambda: locks.take({base_of('')}), 0)] and None")
        assert other.claim("s", "a2") is False
        assert endings(one, other) == {"a1": "superseded", "a2": "live"}
        assert_refused(one.begin_claim("z", "b"))
    finally:
        thief.kill()


# A bus that is broken


def test_a_directory_that_went_away(services: Services) -> None:
    """No stream is refused for that; what lives counts again in the next one."""
    service = services.make("unix", max_streams_per_owner=2)
    one, other = service.join(2)
    one.claim("s1", "a1")
    other.claim("s2", "a2")
    shutil.rmtree(service.directory)

    def both_are_there() -> bool:
        with contextlib.suppress(OSError):
            return len(holders_of(service)) == 2
        return False

    eventually(both_are_there, "both places")
    for member in (one, other):
        assert_refused(member.begin_claim("s3", "a3"))


def test_a_directory_that_cannot_be_made(services: Services) -> None:
    """The process's own count holds, and others' streams are not known."""
    service = services.make("unix", max_streams_per_owner=1)
    one, other = service.join(2)
    one.claim("s1", "a1")
    base = service.directory.parent.parent
    shutil.rmtree(base)
    base.write_text("no directory")
    assert other.claim("s2", "a2") is False
    assert_refused(other.begin_claim("s3", "a3"))
    assert other.claim("s2", "a4") is False
    other.complete("a4")
    assert other.claim("s3", "a5") is False
    base.unlink()
    base.mkdir()
