"""redis: what is particular to the bus of many hosts - a server that can be away, its keys, TLS."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from chatstream.bus import base
from chatstream.bus.messages import Action, Answer, Claim, Name, Request, encode
from chatstream.bus.redis import redis_bus
from chatstream.bus.redis.mail import LISTEN
from chatstream.bus.redis.redis_bus import RedisBus
from chatstream.bus.redis.server import COMMAND_TIMEOUT, check
from chatstream.errors import BusUnavailable, ConfigError, Refused, Unconfirmed
from tests.bus.conftest import Service, Services, Worker
from tests.bus.test_contract import AT_ONCE, assert_live, outcomes
from tests.conftest import PATIENCE, eventually
from tests.redis_server import RedisServer

AWAY, BACK = "[bus] redis is away", "[bus] redis is back"


@pytest.fixture
def service(services: Services) -> Service:
    return services.make("redis")


@pytest.fixture
def own(services: Services, redis_server: RedisServer) -> Service:
    """A service whose server the test may stop."""
    return services.make("redis", redis_server)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class OtherServer(RedisServer):
    """A server that is not started as `RedisServer` does it. `{port}` stands for its port."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._command = command
        super().__init__(folder)

    def start(self) -> None:
        while self.port > 50_000:  # a Cluster's server has another one, 10,000 above
            self.port = free_port()
        command = [word.format(port=self.port) for word in self._command]
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            eventually(self._answers, command[0])
        except BaseException:
            self.stop()
            raise


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., OtherServer]]:
    """Starts a server by its command."""
    with contextlib.ExitStack() as stack:

        def serve(*command: str) -> OtherServer:
            if shutil.which(command[0]) is None:
                pytest.skip(f"no {command[0]} here")
            server = OtherServer(tmp_path, *command)
            stack.callback(server.stop)
            return server

        yield serve


def changes(member: Worker) -> list[str]:
    """What a worker has said of its server."""
    known = (AWAY, BACK)
    return [next((text for text in known if text in line), line) for line in member.log()]


def assert_stays_away(member: Worker) -> None:
    eventually(lambda: changes(member) == [AWAY], "the line of a server that is away")


def assert_is_back(*members: Worker) -> None:
    for member in members:
        eventually(lambda member=member: changes(member)[-1] == BACK, "the line of its return")
        assert changes(member) == [AWAY, BACK]


def remaining(service: Service, key: str) -> int:
    """Milliseconds that a key has."""
    with contextlib.closing(service.client()) as client:
        return int(client.pttl(key))


def listeners(server: RedisServer) -> list[dict[str, Any]]:
    """The connections on which mail is awaited."""
    with contextlib.closing(server.client()) as client:
        return [entry for entry in client.client_list() if entry["cmd"] == "xread"]


def only(keys: set[str]) -> str:
    (key,) = keys
    return key


# Entries


def test_an_entry_outlives_its_time(services: Services) -> None:
    """Its worker has it last for as long as the stream is live, however short the time."""
    service = services.make("redis", bus_ttl=3.0)
    one, other = service.join(2)
    one.claim("s", "a")
    key = only(service.keys("session:*"))
    refreshed, before = 0, remaining(service, key)

    def refreshes() -> bool:
        nonlocal refreshed, before
        now = remaining(service, key)
        assert now > 0, "it has expired"
        refreshed, before = refreshed + (now > before), now
        return refreshed >= 3

    eventually(refreshes, "three refreshes")
    assert other.cancel("s") is True


def test_a_long_silence_ends_nothing(services: Services, redis_server: RedisServer) -> None:
    """Cases 29 and 34: redis-py's timeout of 5 s, and an entry's 3 s, pass without a word."""
    service = services.make("redis", redis_server, bus_ttl=3.0)
    one, other = service.join(2)
    one.claim("s", "a")
    key = only(service.keys("session:*"))
    before = {entry["id"] for entry in eventually(lambda: listeners(redis_server), "listeners")}

    def aged() -> bool:
        assert remaining(service, key) > 0, "the entry has expired"
        now = listeners(redis_server)
        return len(now) == 2 and all(int(entry["age"]) >= 6 for entry in now)

    eventually(aged, "connections of 6 s", patience=max(PATIENCE, 20))
    assert before <= {entry["id"] for entry in listeners(redis_server)}
    assert other.cancel("s") is True
    assert one.log() == other.log() == []


def test_a_killed_workers_entries_expire(services: Services) -> None:
    """Case 33: until then a cancel is unconfirmed, then the session is unknown. No key is left."""
    service = services.make("redis", bus_ttl=2.0)
    one, other = service.join(2)
    one.claim("s", "a")
    one.kill()
    with pytest.raises(Unconfirmed):
        other.cancel("s")
    eventually(lambda: not service.keys("session:*"), "the entry's end")
    cancel = other.begin_cancel("s")
    assert cancel.result() is False
    assert cancel.seconds < AT_ONCE
    assert other.claim("s", "a") is False
    assert other.cancel("s") is True
    other.release("a")
    eventually(lambda: len(service.keys("worker:*")) == 1, "the other's key alone")


def test_a_killed_workers_session_can_go_on_before_its_entries_expire(service: Service) -> None:
    """It is claimed within a second, and found."""
    one, other = service.join(2)
    one.claim("s", "a1")
    one.kill()
    claim = other.begin_claim("s", "a2")
    assert claim.result() is False
    assert claim.seconds < 2
    assert other.cancel("s") is True


def test_keys_tell_nothing_and_all_expire(service: Service) -> None:
    """A name is in no key; whatever happens, no key stays."""
    one, other = service.join(2)
    one.claim("secret-session", "secret-stream", "secret-owner")
    other.cancel("secret-session", "early-stream", "secret-owner")
    assert other.cancel("secret-session", None, "secret-owner") is True
    keys = service.keys("*")
    kinds = {key.split(":")[1] for key in keys}
    assert kinds == {"session", "stream", "early", "mail", "worker", "workers", "since"}
    assert not [key for key in keys if "secret" in key or "early-" in key]
    assert all(0 < remaining(service, key) <= 60_000 for key in keys if "since" not in key)


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
    """What the server forgot while it was there is put back by the next refresh."""
    service = services.make("redis", redis_server, bus_ttl=3.0)
    one, other = service.join(2)
    one.claim("s", "a")
    one.claim("z", "b")
    redis_server.command("FLUSHALL")
    eventually(lambda: len(service.keys("session:*")) == 2, "the entries")
    assert other.cancel("z") is True
    assert other.cancel("s") is True
    assert one.log() == other.log() == []


# A server that is away


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


class Member:
    """A bus in this process, and what is asked of it."""

    def __init__(self, service: Service) -> None:
        url, prefix = service.settings["bus"], service.settings["bus_prefix"]
        self.bus = RedisBus(self._receive, url, prefix=prefix, ttl=45.0)
        self.asked: list[Action] = []

    def _receive(self, request: Request) -> Answer:
        self.asked.append(request.action)
        return Answer.LIVE if request.action is Action.PROBE else Answer.STOPPED


@pytest.fixture
def member(service: Service) -> Iterator[Member]:
    member = Member(service)
    yield member
    member.bus.close()


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


def places(service: Service) -> list[str]:
    """What stands for the places of the one owner there is."""
    with contextlib.closing(service.client()) as client:
        return [value.decode() for value in client.hvals(only(service.keys("places:*")))]


def test_a_place_goes_back_to_whom_a_dead_claim_took_it_from(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session does, and its place with it."""
    service = services.make("redis", max_streams_per_owner=1)
    one, other = service.join(2)
    one.claim("s", "old")
    before = places(service)[0].rpartition(" ")[0]
    member = Member(service)
    try:
        member.bus.start()
        alive = iter([True])  # when it asks for the place, and not when it has it
        monkeypatch.setattr(member.bus, "_is_live", lambda claim: next(alive, False))
        claim = Claim(Name("", "s", "new"), 1)
        assert member.bus.claim(claim, reject=False, limit=1) is False
        assert places(service)[0].rpartition(" ")[0] == before
        assert one.endings() == {"old": "live"}
        member.bus.release(claim)
    finally:
        member.bus.close()
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
    member = Member(service)
    try:
        member.bus.start()
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
    finally:
        member.bus.close()
    assert one.endings() == {"a": "live"}


def test_a_server_that_goes_away_while_places_are_asked_for(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream begins all the same: this process's own count holds, and it is put in later."""
    service = services.make("redis", max_streams_per_owner=1)
    (one,) = service.join(1)
    one.claim("s", "a")
    member = Member(service)
    try:
        member.bus.start()
        eventually(lambda: member.bus._listener.up, "its arrival")
        claim = Claim(Name("", "z", "b"), 1)
        with monkeypatch.context() as broken:
            broken.setattr(member.bus._mail, "send", raises(redis.ConnectionError("gone")))
            assert member.bus.claim(claim, reject=False, limit=1) is False
        eventually(lambda: len(service.keys("session:*")) == 2, "its entry")
        member.bus.release(claim)
    finally:
        member.bus.close()


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


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


# The listener


@pytest.mark.parametrize("option", ["", "?socket_timeout=0.05", "?socket_timeout=30"])
def test_a_listener_waits_longer_for_the_server_than_the_server_for_mail(option: str) -> None:
    """Whatever an address says of commands: silence is not a fault."""
    bus = RedisBus(lambda request: Answer.ABSENT, f"redis://h/0{option}", prefix="p", ttl=45.0)
    assert bus._mail._mailbox.connection_pool.connection_kwargs["socket_timeout"] > LISTEN


def test_a_message_before_the_listener_listens_is_carried_out(service: Service) -> None:
    """Case 30: what is sent between a claim and the first look into the mailbox is read then."""
    received: list[Request] = []

    def receive(request: Request) -> Answer:
        received.append(request)
        return Answer.STOPPED

    url, prefix = service.settings["bus"], service.settings["bus_prefix"]
    late = RedisBus(receive, url, prefix=prefix, ttl=45.0)
    message = encode(Request(Action.CANCEL, "", "s", "a", origin="0" * 32))
    with contextlib.closing(service.client()) as client:
        client.xadd(f"{prefix}:mail:{late._worker}", {"message": message})
    late.start()
    try:
        (request,) = eventually(lambda: received, "the message")
        assert (request.action, request.session_id, request.stream_id) == (Action.CANCEL, "s", "a")
    finally:
        late.close()


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


def test_messages_of_a_foreign_shape_are_dropped(service: Service) -> None:
    """What is in the mailbox need not be ours, and no reply can be sent to some origins."""
    one, other = service.join(2)
    one.claim("s", "a")
    mailbox = service.address(one)
    with contextlib.closing(service.client()) as client:
        client.xadd(mailbox, {"other": "field"})
        client.xadd(mailbox, {"message": b'{"chatstream": 1}', "other": "field"})
        for origin in ("", "\\ud800", "a b", "x" * 5000):
            text = f'{{"chatstream":1,"id":"1","origin":"{origin}","action":"probe",'
            client.xadd(mailbox, {"message": text + '"owner":"","session":"s","stream":null}'})
    assert other.cancel("s") is True
    assert one.log() == ["[bus] redis: dropped a message that is none of ours"]


# gevent


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


# What it costs


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


# Servers that can be one, and others


def test_a_good_server_passes(shared_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of it."""
    check(shared_redis.url)
    assert caplog.records == []


@pytest.mark.parametrize("credentials", [":wrong@", "nobody:secret@", ""])
def test_a_wrong_password_is_a_fault_of_the_settings(
    redis_server: RedisServer, credentials: str
) -> None:
    """So is none where one is needed. The sentence does not tell it."""
    redis_server.command("CONFIG", "SET", "requirepass", "secret")
    check(f"redis://:secret@127.0.0.1:{redis_server.port}/0")
    with pytest.raises(ConfigError, match="refused the name or password") as caught:
        check(f"redis://{credentials}127.0.0.1:{redis_server.port}/0")
    assert "wrong" not in str(caught.value)


def test_a_cluster_is_refused(serve: Callable[..., OtherServer], tmp_path: Path) -> None:
    """A sentence says that one ordinary server is needed."""
    options = ["--port", "{port}", "--dir", str(tmp_path), "--save", ""]
    server = serve("redis-server", *options, "--cluster-enabled", "yes")
    with pytest.raises(ConfigError, match=r"runs as cluster.*one ordinary server"):
        check(server.url)


def test_a_sentinel_is_refused(serve: Callable[..., OtherServer], tmp_path: Path) -> None:
    """A sentence says what address to give in its place."""
    (tmp_path / "sentinel.conf").touch()
    server = serve(
        "redis-server", str(tmp_path / "sentinel.conf"), "--sentinel", "--port", "{port}"
    )
    with pytest.raises(ConfigError, match=r"runs as sentinel.*behind a Sentinel: of its master"):
        check(server.url)


def test_an_option_that_does_not_exist_is_refused() -> None:
    """At start-up, with its name, not with the first stream."""
    with pytest.raises(ConfigError, match="no_such_option"):
        check("redis://127.0.0.1:1/0?no_such_option=1")


def test_a_server_that_is_not_there_yet_may_come(caplog: pytest.LogCaptureFixture) -> None:
    """It is a warning: workers and their Redis may be started in any order."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        check(f"redis://127.0.0.1:{unused.getsockname()[1]}/0")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot be reached yet" in record.getMessage()


def test_valkey_is_as_good(
    services: Services, serve: Callable[..., OtherServer], tmp_path: Path
) -> None:
    """The same commands do the same there."""
    server = serve("valkey-server", "--port", "{port}", "--dir", str(tmp_path), "--save", "")
    check(server.url)
    one, other = services.make("redis", server).join(2)
    assert_two_workers_meet(one, other)


def test_tls(services: Services, tmp_path: Path) -> None:
    """rediss:// with a certificate of one's own authority; not with another's."""
    authority, foreign = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    foreign.cert_pem.write_to_path(tmp_path / "foreign.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    for option, name in (("cert", "cert"), ("key", "key"), ("ca-cert", "authority")):
        options += [f"--tls-{option}-file", str(tmp_path / f"{name}.pem")]
    server = RedisServer(tmp_path, *options)
    try:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={tmp_path}"
        check(f"{url}/authority.pem")
        service = services.make("redis", server, bus=f"{url}/authority.pem")
        one, other = service.join(2)
        assert_two_workers_meet(one, other)
        (stranger,) = services.make("redis", server, bus=f"{url}/foreign.pem").join(1, settle=False)
        assert_stays_away(stranger)
        assert stranger.claim("s", "c") is False
        with pytest.raises(BusUnavailable):
            stranger.cancel("z")
        services.end()
    finally:
        server.stop()


def assert_two_workers_meet(one: Worker, other: Worker) -> None:
    assert one.cancel("s", "a0") is False
    assert other.claim("s", "a0") is True
    one.claim("s", "a1")
    one.claim("z", "b")
    other.claim("s", "a2")
    assert one.ending("a1") == "superseded"
    assert one.cancel("s") is True
    assert other.cancel("z", "b") is True
    assert other.cancel("z") is False
    assert one.log() == other.log() == []
