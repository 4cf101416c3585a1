"""redis.redis_bus: claims and cancels, and the places that go with them; under gevent, too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from chatstream.bus.messages import Action, Claim, Name, Request
from chatstream.bus.redis import redis_bus
from chatstream.errors import Refused
from tests.bus.conftest import Service, Services
from tests.bus.redis.conftest import Member, joining, places
from tests.bus.test_contract import outcomes
from tests.conftest import PATIENCE, eventually


def test_a_stream_that_begins_before_its_worker_has_reached_redis(
    service: Service, member: Member
) -> None:
    """It waits for the listener, and supersedes as any other; what stands there is no rival."""
    (other,) = service.join(1)
    for number in range(5):
        other.claim(f"s-{number}", f"old-{number}")
    claims = [Claim(Name("", f"s-{n}", f"new-{n}"), n + 1) for n in range(5)]
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(member.bus.claim, claim, reject=False) for claim in claims]
        looked = member.bus._listener._looked
        eventually(lambda: looked.is_set() or threading.active_count() > 5, "them")
        member.bus.start()
        assert [claim.result(10) for claim in waiting] == [False] * 5
    # A claim waits for the other's word, but no longer than `PATIENCE`: a busy machine may need it.
    eventually(lambda: set(other.endings().values()) == {"superseded"}, "the end of all")
    # Whoever asks the other worker is answered in turn: so would a question to us have been.
    assert other.cancel("s-0") is True
    assert Action.SUPERSEDE not in member.asked
    for claim in claims:
        member.bus.release(claim)


def test_a_cancel_waits_for_no_first_look(
    service: Service, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has only just joined: what is found is stopped, and the reply is then read."""
    monkeypatch.setattr(redis_bus, "PATIENCE", PATIENCE)
    (other,) = service.join(1)
    other.claim("s", "a")
    with ThreadPoolExecutor(1) as pool:
        cancel = pool.submit(member.bus.cancel_elsewhere, Request(Action.CANCEL, "", "s"))
        eventually(lambda: other.ending("a") == "cancel", "the stream's end, while nobody listens")
        member.bus.start()
        assert cancel.result(PATIENCE) is True


def test_who_leaves_keeps_no_connection(service: Service, nothing_left: None) -> None:
    """Nor does it wait for a garbage collection."""
    with joining(service) as member:
        claim = Claim(Name("", "s", "a"), 1)
        member.bus.claim(claim, reject=False)
        assert member.bus.list().workers == []
        member.bus.release(claim)


@pytest.mark.parametrize("gevent_has", ["the stream", "the cancel"])
def test_workers_under_gevent(service: Service, gevent_has: str) -> None:
    """They stop, supersede and are told of early cancels as others are."""
    (one,) = service.join(1, gevent=gevent_has == "the stream")
    (other,) = service.join(1, gevent=gevent_has == "the cancel")
    one.claim("s", "a1")
    one.claim("z", "b")
    assert other.cancel("s") is True
    other.claim("z", "b2")
    assert one.endings() == {"a1": "cancel", "b": "superseded"}
    assert sorted(outcomes([one.begin_cancel("z") for _ in range(20)])) == [False] * 19 + [True]
    assert one.cancel("s", "a3") is False
    assert other.claim("s", "a3") is True
    one.hang()
    one_more = other.begin_cancel("unknown")
    assert one_more.result() is False


# Places


def test_a_place_goes_back_to_whom_a_dead_claim_took_it_from(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session does, and its place with it."""
    service = services.make("redis", max_streams_per_owner=1)
    one, other = service.join(2)
    one.claim("s", "old")
    before = places(service)[0].rpartition(" ")[0]
    with joining(service) as member:
        alive = iter([True])  # when it asks for the place, and not when it has it
        monkeypatch.setattr(member.bus, "_is_live", lambda claim: next(alive, False))
        claim = Claim(Name("", "s", "new"), 1)
        assert member.bus.claim(claim, reject=False, limit=1) is False
        assert places(service)[0].rpartition(" ")[0] == before
        assert one.endings() == {"old": "live"}
        member.bus.release(claim)
    with pytest.raises(Refused):
        other.claim("z", "b")
    one.complete("old")
    assert other.claim("z", "b") is False


def test_an_older_stream_takes_no_newer_ones_place(service: Service, member: Member) -> None:
    """Of one worker, where the older one's claim is the later one."""
    member.bus.start()
    older, newer = (Claim(Name("", "s", f"a{number}"), number) for number in (1, 2))
    for claim in (newer, older):
        assert member.bus.claim(claim, reject=False, limit=1) is False
    assert places(service)[0].split(" ")[1] == "2"
    member.bus.release(older)
    assert places(service)[0].split(" ")[1] == "2"
    member.bus.release(newer)
    assert not service.keys("places:*")


def test_a_place_that_is_another_streams_by_now_is_not_given_away(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker said that nothing lived there, and then something began."""
    service = services.make("redis", max_streams_per_owner=1)
    (one,) = service.join(1)
    one.claim("s", "a")
    with joining(service) as member:
        asked: list[list[bytes]] = []

        def said_too_early(owner: str, taken: list[bytes]) -> list[bytes]:
            asked.append(taken)
            stale = [place.rpartition(b" ")[0] + b" 99" for place in taken]
            return stale if len(asked) == 1 else []

        monkeypatch.setattr(member.bus, "_ended", said_too_early)
        with pytest.raises(Refused):
            member.bus.claim(Claim(Name("", "z", "b"), 1), reject=False, limit=1)
        assert len(asked) == 2
        assert asked[0] == asked[1]
    assert one.endings() == {"a": "live"}


def test_a_server_that_goes_away_while_places_are_asked_for(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream begins all the same: this process's own count holds, and it is put in later."""
    service = services.make("redis", max_streams_per_owner=1)
    (one,) = service.join(1)
    one.claim("s", "a")
    with joining(service) as member:
        claim = Claim(Name("", "z", "b"), 1)
        with monkeypatch.context() as broken:
            broken.setattr(member.bus._mail, "send", raises(redis.ConnectionError("gone")))
            assert member.bus.claim(claim, reject=False, limit=1) is False
        eventually(lambda: len(service.keys("session:*")) == 2, "its entry")
        member.bus.release(claim)


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail
