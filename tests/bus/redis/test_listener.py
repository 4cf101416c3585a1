"""redis.listener: a server that is away, hangs, comes back or loses its data."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from chatstream.bus import base
from chatstream.bus.messages import Action, Claim, Name, Request, encode
from chatstream.bus.redis.server import COMMAND_TIMEOUT
from chatstream.errors import BusUnavailable, Refused, Unconfirmed
from tests.bus.conftest import Service, Services
from tests.bus.redis.conftest import AWAY, Member, assert_is_back, assert_stays_away, changes
from tests.bus.test_cancel_all import reaches_others
from tests.bus.test_contract import AT_ONCE, assert_live, outcomes
from tests.conftest import eventually
from tests.redis_server import RedisServer


def test_without_a_server_streams_go_on(own: Service, redis_server: RedisServer) -> None:
    """Case 29: local stops work, streams start without waiting, other stops are not confirmed."""
    one, other = own.join(2)
    one.claim("s", "a")
    one.claim("z", "b")
    redis_server.stop()
    assert one.cancel("s") is True
    for cancel in (other.begin_cancel("z"), other.begin_cancel("unknown", "u")):
        with pytest.raises(BusUnavailable):
            cancel.result()
        assert cancel.seconds < AT_ONCE
    claims = [one.begin_claim("y", "c"), other.begin_claim("x", "d")]
    assert outcomes(claims) == [False, False]
    assert max(claim.seconds for claim in claims) < AT_ONCE
    one.release("a")
    assert_live(one, "b")
    for member in (one, other):
        assert_stays_away(member)


def test_a_server_that_comes_back_empty_learns_what_lives(
    own: Service, redis_server: RedisServer
) -> None:
    """Streams from before and from meanwhile are found again, what has ended is not."""
    one, other = own.join(2)
    one.claim("s", "a")
    one.claim("y", "c")
    redis_server.stop()
    for member in (one, other):
        assert_stays_away(member)
    one.claim("z", "b")
    one.release("c")
    redis_server.start()
    assert_is_back(one, other)
    assert "2 streams" in one.log()[-1]
    assert [other.cancel("s", "a"), other.cancel("z")] == [True, True]
    with pytest.raises(BusUnavailable):  # a third worker might not have said yet what it has
        other.cancel("y")
    assert other.claim("y", "c2") is False
    assert one.cancel("y", "c2") is True


def test_streams_of_a_session_that_could_not_know_of_each_other(
    own: Service, redis_server: RedisServer
) -> None:
    """Both began while the server was away: when it is back one is superseded, the other found."""
    one, other = own.join(2)
    redis_server.stop()
    for member in (one, other):
        assert_stays_away(member)
    one.claim("s", "a")
    other.claim("s", "b")
    redis_server.start()
    assert_is_back(one, other)

    def endings() -> dict[str, str]:
        return {**one.endings(), **other.endings()}

    eventually(lambda: sorted(endings().values()) == ["live", "superseded"], "one that lives")
    (live,) = [name for name, how in endings().items() if how == "live"]
    assert {"a": other, "b": one}[live].cancel("s") is True
    assert endings()[live] == "cancel"


def test_without_a_server_what_is_here_is_stopped(
    services: Services, redis_server: RedisServer
) -> None:
    """And it says that the others may not be; so does the check, until it is back."""
    us = services.make("redis", redis_server)
    one, other = us.join(2)
    one.claim("s", "a")
    other.claim("z", "b")
    one.begin("check").result()
    redis_server.stop()
    with pytest.raises(BusUnavailable):
        one.cancel_all("")
    assert (one.ending("a"), other.ending("b")) == ("cancel", "live")
    for _ in range(2):
        check = one.begin("check")
        with pytest.raises(BusUnavailable):
            check.result()
        assert check.seconds < 1.2
    redis_server.start()
    eventually(lambda: reaches_others(one), "the server")


def test_a_server_that_hangs_fails_the_check(services: Services, redis_server: RedisServer) -> None:
    """Within about a second, also before the listener has found out."""
    us = services.make("redis", redis_server)
    (one,) = us.join(1)
    one.begin("check").result()
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    try:
        check = one.begin("check")
        with pytest.raises(BusUnavailable):
            check.result()
        assert check.seconds < 1.2
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)


def test_without_a_server_a_process_counts_its_own(
    services: Services, redis_server: RedisServer
) -> None:
    """The process's own count holds meanwhile; what lives is put back and counts again."""
    service = services.make("redis", redis_server, max_streams_per_owner=1)
    one, other = service.join(2)
    one.claim("s1", "a1")
    with pytest.raises(Refused):
        other.claim("s2", "a2")
    redis_server.stop()
    assert other.claim("s2", "a2") is False
    with pytest.raises(Refused):
        other.claim("s3", "a3")
    other.complete("a2")
    redis_server.start()
    eventually(lambda: service.keys("places:*"), "what lives")
    eventually(lambda: outcomes([other.begin_claim("s3", "a3")]) != [False], "a refusal")


def test_a_sessions_entry_of_a_dead_worker_gives_way(
    services: Services, redis_server: RedisServer
) -> None:
    """A stream that began while the server was paused takes the place of what cannot answer."""
    dead, one, other = services.make("redis", redis_server, bus_ttl=9.0).join(3)
    dead.claim("s", "a")
    dead.kill()
    redis_server.process.send_signal(signal.SIGSTOP)
    for member in (one, other):
        assert_stays_away(member)
    one.claim("s", "b")
    redis_server.process.send_signal(signal.SIGCONT)
    assert_is_back(one, other)
    eventually(lambda: outcomes([other.begin_cancel("s")]) == [True], "the new stream's stop", 8)
    assert one.ending("b") == "cancel"


def test_a_server_that_comes_back_with_another_clock(
    own: Service, redis_server: RedisServer
) -> None:
    """Case 35: the numbers of its new messages may be lower than those that were read before."""
    one, other = own.join(2)
    one.claim("s", "a1")
    assert other.cancel("s") is True
    one.claim("s", "a2")
    mailbox = own.address(one)
    redis_server.stop()
    assert_stays_away(one)
    redis_server.start()
    assert_is_back(one)
    message = encode(Request(Action.CANCEL, "", "s", "a2", origin="0" * 32))
    redis_server.command("XADD", mailbox, "1-1", "message", message)
    eventually(lambda: one.ending("a2") == "cancel", "the stream's end")


def test_a_server_that_was_never_there(services: Services, redis_server: RedisServer) -> None:
    """Workers that start without one serve their own streams, and join when it comes."""
    redis_server.stop()
    service = services.make("redis", redis_server)
    one, other = service.join(2, settle=False)
    one.claim("s", "a")
    with pytest.raises(BusUnavailable):
        other.cancel("s")
    for member in (one, other):
        assert_stays_away(member)
    redis_server.start()
    assert_is_back(one, other)
    assert other.cancel("s") is True


def pause(server: RedisServer, how: str) -> Callable[[], object]:
    """Has a server not answer. Returns what has it answer again."""
    if how == "hangs":
        server.process.send_signal(signal.SIGSTOP)
        return lambda: server.process.send_signal(signal.SIGCONT)
    if how == "pauses writes":
        server.command("CLIENT", "PAUSE", 60_000, "WRITE")
        return lambda: server.command("CLIENT", "UNPAUSE")
    server.command("CLIENT", "PAUSE", 1500, "ALL")
    return lambda: None  # it cannot be told, and ends by itself


@pytest.mark.parametrize("how", ["hangs", "pauses", "pauses writes"])
def test_a_server_that_does_not_answer(own: Service, redis_server: RedisServer, how: str) -> None:
    """It counts as away: no false answer, nobody waits for long, and then all is found again."""
    one, other = own.join(2)
    one.claim("s", "a")
    one.claim("x", "d")
    go_on = pause(redis_server, how)
    remote, by_session = other.begin_cancel("s", "a"), other.begin_cancel("x")
    unknown, claim = one.begin_cancel("unknown", "u"), other.begin_claim("z", "b")
    for cancel in (remote, by_session, unknown):
        with pytest.raises((BusUnavailable, Unconfirmed)):
            cancel.result()
        assert cancel.seconds < 2
    assert claim.result() is False
    assert claim.seconds < 2
    for member in (one, other):
        eventually(lambda member=member: AWAY in changes(member), "the line of its absence")
    if how != "pauses":  # which may be over by now
        late = one.begin_claim("y", "c")
        assert late.result() is False
        assert late.seconds < AT_ONCE
        assert one.cancel("y") is True
    go_on()
    assert_is_back(one, other)
    assert one.cancel("z") is True
    assert other.cancel("s") is True
    assert one.ending("a") == "cancel"


def test_a_worker_leaves_without_a_server(own: Service, redis_server: RedisServer) -> None:
    """It does not wait for it."""
    one, other = own.join(2)
    one.claim("s", "a")
    redis_server.process.send_signal(signal.SIGSTOP)
    leaving = one.begin("stop")
    leaving.result()
    assert leaving.seconds < 5
    assert one.ending("a") == "shutdown"
    redis_server.stop()
    leaving = other.begin("stop")
    leaving.result()
    assert leaving.seconds < 5


# In this process


def test_a_first_look_may_take_its_time(
    service: Service, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine: whoever needs it waits for it, longer than for one command."""
    (other,) = service.join(1)
    waited: list[float | None] = []

    def slow(timeout: float | None = None) -> bool:
        waited.append(timeout)
        member.bus.start()
        return bool(eventually(lambda: member.bus._listener.up, "the first look"))

    monkeypatch.setattr(member.bus._listener._looked, "wait", slow)
    assert [worker.pid for worker in member.bus._others()] == [other.pid]
    assert waited == [base.PATIENCE]
    assert base.PATIENCE > COMMAND_TIMEOUT


def test_a_refresh_amid_a_claim(
    service: Service, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listener leaves alone what is being claimed, and keeps it from then on."""
    (other,) = service.join(1)
    other.claim("s", "old")
    member.bus.start()
    claim = Claim(Name("", "s", "new"), 1)
    script = member.bus._entries._claim_script

    def refreshes_first(*arguments: Any) -> Any:
        registered = member.bus._listener.refresh()
        assert claim not in registered
        return script(*arguments)

    monkeypatch.setattr(member.bus._entries, "_claim_script", refreshes_first)
    assert member.bus.claim(claim, reject=False) is False
    assert other.endings() == {"old": "superseded"}
    assert Action.SUPERSEDE not in member.asked
    assert member.bus._listener.refresh() == {claim}
    member.bus.release(claim)
    assert member.bus._listener.refresh() == set()


def test_a_server_that_loses_its_data_amid_a_claim(
    service: Service, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was claimed is lost with the rest, and put back at the listener's next look."""
    member.bus.start()
    claim = Claim(Name("", "s", "new"), 1)
    script = member.bus._entries._claim_script

    def is_lost(*arguments: Any) -> Any:
        found = script(*arguments)
        with contextlib.closing(service.client()) as client:
            for key in service.keys("*"):
                client.delete(f"{service.settings['bus_prefix']}:{key}")
        member.bus._listener.refresh()
        return found

    monkeypatch.setattr(member.bus._entries, "_claim_script", is_lost)
    member.bus.claim(claim, reject=False)
    eventually(lambda: service.keys("session:*"), "its entry")
    member.bus.release(claim)
