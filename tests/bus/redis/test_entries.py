"""redis.entries: what stands in the server, for how long, and who takes it out."""

from __future__ import annotations

import contextlib

import pytest

from chatstream.errors import BusUnavailable, Refused, Unconfirmed
from tests.bus.conftest import Service, Services
from tests.bus.redis.conftest import only, places
from tests.bus.test_contract import AT_ONCE, assert_live
from tests.conftest import eventually
from tests.redis_server import RedisServer


def remaining(service: Service, key: str) -> int:
    """Milliseconds that a key has."""
    with contextlib.closing(service.client()) as client:
        return int(client.pttl(key))


def test_an_entry_outlives_its_time(services: Services) -> None:
    """Its worker has it last for as long as the stream is live, however short the time.

    So it is with a place, however long its stream is silent.
    """
    service = services.make("redis", bus_ttl=3.0, max_streams_per_owner=1)
    one, other = service.join(2)
    one.claim("s", "a")
    key, place = only(service.keys("session:*")), places(service)
    refreshed, before = 0, remaining(service, key)

    def refreshes() -> bool:
        nonlocal refreshed, before
        now = remaining(service, key)
        assert now > 0, "it has expired"
        refreshed, before = refreshed + (now > before), now
        return refreshed >= 3

    eventually(refreshes, "three refreshes")
    assert places(service) != place
    with pytest.raises(Refused):
        other.claim("z", "b")
    assert other.cancel("s") is True


def test_a_killed_workers_entries_expire(services: Services) -> None:
    """Case 33: until then a cancel is unconfirmed, then the session is unknown. No key is left.

    A session of its can go on before that.
    """
    service = services.make("redis", bus_ttl=2.0)
    one, other = service.join(2)
    one.claim("s", "a")
    one.claim("z", "b")
    one.kill()
    claim = other.begin_claim("z", "b2")
    with pytest.raises(Unconfirmed):
        other.cancel("s")
    assert claim.result() is False
    assert claim.seconds < 2
    assert other.cancel("z") is True
    other.release("b2")
    eventually(lambda: not service.keys("session:*"), "the entry's end")
    cancel = other.begin_cancel("s")
    assert cancel.result() is False
    assert cancel.seconds < AT_ONCE
    assert other.claim("s", "a") is False
    assert other.cancel("s") is True
    other.release("a")
    eventually(lambda: len(service.keys("worker:*")) == 1, "the other's key alone")


def test_keys_tell_nothing_and_all_expire(services: Services) -> None:
    """A name is in no key, nor in what stands for a place; whatever happens, no key stays."""
    service = services.make("redis", max_streams_per_owner=3)
    one, other = service.join(2)
    one.claim("secret-session", "secret-stream", "secret-owner")
    assert "secret" not in repr(places(service))
    other.cancel("secret-session", "early-stream", "secret-owner")
    assert other.cancel("secret-session", None, "secret-owner") is True
    keys = service.keys("*")
    kinds = {key.split(":")[1] for key in keys}
    assert kinds == {"session", "stream", "early", "places", "mail", "worker", "workers", "since"}
    assert not [key for key in keys if "secret" in key or "early-" in key]
    assert all(0 < remaining(service, key) <= 60_000 for key in keys if "since" not in key)
    one.release("secret-stream")
    assert not service.keys("places:*")


def test_a_worker_that_leaves_takes_its_keys(service: Service) -> None:
    """All that stays is that its stream has been, which is known for a while."""
    one, other = service.join(2)
    one.claim("s", "a")
    assert other.cancel("unknown") is False
    one.begin("stop").result()
    other.begin("stop").result()
    assert {key.split(":")[1] for key in service.keys("*")} <= {"session", "stream", "since"}
    (again,) = service.join(1)
    assert again.cancel("s", "a") is False
    assert again.claim("s", "a") is False
    assert_live(again, "a")


def test_a_flush_loses_nothing_that_lives(services: Services, redis_server: RedisServer) -> None:
    """What the server forgot while it was there is put back by the next refresh, places too."""
    service = services.make("redis", redis_server, bus_ttl=3.0, max_streams_per_owner=2)
    one, other = service.join(2)
    one.claim("s", "a")
    one.claim("z", "b")
    redis_server.command("FLUSHALL")
    eventually(lambda: len(service.keys("session:*")) == 2, "the entries")
    with pytest.raises(Refused):
        other.claim("y", "c")
    assert other.cancel("z") is True
    assert other.cancel("s") is True
    assert one.log() == other.log() == []


def test_redis_that_may_have_lost_some_is_not_believed(services: Services) -> None:
    """Until all workers have had the time to put back what they have."""
    service = services.make("redis")
    (one,) = service.join(1)
    with contextlib.closing(service.client()) as client:
        client.set(f"{service.settings['bus_prefix']}:since", 2**53)
        with pytest.raises(BusUnavailable):
            one.sessions()


def test_a_streams_cost_does_not_depend_on_the_number_of_workers(
    own: Service, redis_server: RedisServer
) -> None:
    """Two workers or ten: the same commands and keys for a start, a stop and an end."""
    one, other = own.join(2)

    def streams(first: int) -> tuple[dict[str, int], int]:
        keys = int(redis_server.command("DBSIZE"))  # type: ignore[call-overload]
        redis_server.command("CONFIG", "RESETSTAT")
        for number in range(first, first + 10):
            one.claim(f"s{number}", f"a{number}")
            assert other.cancel(f"s{number}") is True
            one.release(f"a{number}")
        with contextlib.closing(redis_server.client()) as client:
            stats = client.info("commandstats")
        counts = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}
        # A listener looks into its mailbox again after a second, whether there are streams or not.
        waits = ("xread", "get", "info", "config|resetstat", "dbsize")
        more_keys = int(redis_server.command("DBSIZE")) - keys  # type: ignore[call-overload]
        return {name: n for name, n in counts.items() if name not in waits}, more_keys

    streams(0)  # scripts, connections and mailboxes are made
    few = streams(100)
    prefix = own.settings["bus_prefix"]
    one.begin("crowd", url=redis_server.url, prefix=prefix, count=8).result()
    eventually(lambda: len(own.keys("worker:*")) == 10, "ten workers")
    assert streams(200) == few
    assert few[0]["evalsha"] == 30  # claim, find, release
    assert few[1] == 10  # each stream's, known to have been
