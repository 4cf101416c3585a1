"""What lives, asked of all workers: the same for local, unix and redis, with real processes."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from chatstream import bus
from chatstream.bus import base
from chatstream.bus.base import Bus
from chatstream.bus.messages import (
    Claim,
    Name,
    Page,
    encode,
)
from chatstream.bus.unix.directory import living, service_directory
from chatstream.bus.unix.visitor import UnixVisitor
from chatstream.errors import BusUnavailable, Unconfirmed
from chatstream.settings.table import Settings
from tests.bus.conftest import Service, Services
from tests.bus.peer import Peer, listening
from tests.bus.test_contract import AT_ONCE
from tests.bus.worker import rooms_with
from tests.conftest import eventually


@contextlib.contextmanager
def visitor(service: Service) -> Iterator[Bus]:
    """This process, as one that is no worker of the service."""
    (visit,) = bus.visit(Settings(**service.settings), "0")
    with contextlib.closing(visit):
        yield visit


def streams(found: Mapping[int, list[str] | None]) -> set[str]:
    return {stream for each in found.values() for stream in each or ()}


def test_a_listing_has_the_streams_of_all_workers(service: Service) -> None:
    """Each under its worker, whoever asks; what has ended is not among them."""
    one, other = service.join(2)
    one.claim("s", "a")
    other.claim("z", "b")
    other.claim("y", "c")
    other.complete("c")
    here = {one.pid: ["a"], other.pid: ["b"]} if one is not other else {one.pid: ["a", "b"]}
    assert one.sessions() == other.sessions() == here
    one.release("a")
    other.release("b")
    assert streams(one.sessions()) == set()


def test_a_listing_of_an_owner_has_no_others(service: Service) -> None:
    """By the whole name, and an empty one is a name, too."""
    one, other = service.join(2)
    one.claim("s", "a", "me")
    other.claim("s", "b", "you")
    other.claim("s", "c", "")
    assert streams(one.sessions("me")) == {"a"}
    assert streams(one.sessions("you")) == {"b"}
    assert streams(other.sessions("")) == {"c"}
    assert streams(other.sessions("m")) == set()
    assert streams(other.sessions()) == {"a", "b", "c"}


def test_a_worker_that_hangs_is_named(shared: Service) -> None:
    """It takes nobody's time but the caller's, and what the others have is there."""
    one, other, third = shared.join(3, patience=0.3)
    for worker, name in ((one, "a"), (other, "b"), (third, "c")):
        worker.claim(name, name)
    one.hang()
    asked = other.begin("sessions", owner=None)
    found = {pid: answered and streams for pid, answered, streams in asked.result()}
    assert found == {one.pid: False, other.pid: ["b"], third.pid: ["c"]}
    assert 0.3 <= asked.seconds < 2 * base.PATIENCE
    one.wake()
    eventually(lambda: other.sessions()[one.pid] == ["a"], "the worker that woke")


def test_workers_that_have_left_are_not_named(shared: Service) -> None:
    """At once: nobody waits for them."""
    one, other = shared.join(2)
    one.claim("s", "a")
    one.begin("stop").result()
    asked = other.begin("sessions", owner=None)
    assert [pid for pid, _, _ in asked.result()] == [other.pid]
    assert asked.seconds < AT_ONCE


def test_a_killed_worker_is_not_named_for_long(services: Services, shared: Service) -> None:
    """On one host the kernel knows; Redis until its key has expired."""
    service = shared if shared.kind == "unix" else services.make("redis", bus_ttl=3)
    one, other = service.join(2)
    one.claim("s", "a")
    one.kill()
    if service.kind == "redis":
        assert other.sessions() == {one.pid: None, other.pid: []}
    eventually(lambda: other.sessions() == {other.pid: []}, "the others alone")
    if service.kind == "redis":
        with contextlib.closing(service.client()) as client:
            assert client.scard(f"{service.settings['bus_prefix']}:workers") == 1


def test_a_worker_with_more_streams_than_a_page_holds(shared: Service) -> None:
    """They come page by page, each once and in their order."""
    one, other = shared.join(2)
    one.begin("claim_many", count=300).result()
    here = other.sessions("many")
    assert here == {one.pid: [f"{'a' * 100}{number}" for number in range(300)], other.pid: []}


def test_what_is_said_of_a_stream(shared: Service) -> None:
    """Its names, what it is doing, for how long."""
    (one,) = shared.join(1)
    one.claim("s", "a", "\ud83d me\0")
    with visitor(shared) as visit:
        (found,) = visit.list().workers
    (live,) = found.streams
    assert live.name == Name("\ud83d me\0", "s", "a")
    assert (live.phase, live.events) == ("new", 0)
    assert 0 < live.seconds < 60
    assert found.worker.pid == one.pid
    assert found.worker.host


# Somebody who looks in


def trace(service: Service) -> object:
    """What is there of a service: its directory's entries, or its keys.

    Not its workers' mailboxes, which are there once they were written to.
    """
    if service.kind == "unix":
        return sorted(path.relative_to(service.directory) for path in service.directory.rglob("*"))
    mailboxes = {key.replace(":worker:", ":mail:") for key in service.keys("worker:*")}
    return service.keys("*") - mailboxes


def test_a_visitor_sees_and_stops_and_is_not_seen(shared: Service) -> None:
    """It is in no worker's listing, and leaves nothing behind."""
    one, other = shared.join(2)
    one.claim("s", "a", "me")
    other.claim("z", "b")
    before = trace(shared)
    with visitor(shared) as visit:
        found = {each.worker.pid: len(each.streams) for each in visit.list().workers}
        assert found == {one.pid: 1, other.pid: 1}
        assert set(one.sessions()) == {one.pid, other.pid}
        assert visit.cancel("you", "s", None) is False
        assert visit.cancel("me", "s", "a") is True
    assert one.ending("a") == "cancel"
    assert other.ending("b") == "live"
    eventually(lambda: trace(shared) == before, "nothing new")
    assert one.log() == []


def test_a_visitor_is_told_of_a_worker_that_hangs(
    shared: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cancel is not confirmed, and happens when the worker wakes."""
    for module in rooms_with("PATIENCE"):
        monkeypatch.setattr(module, "PATIENCE", 0.2)
    (one,) = shared.join(1)
    one.claim("s", "a")
    one.hang()
    with visitor(shared) as visit:
        (found,) = visit.list().workers
        assert (found.answered, found.streams) == (False, [])
        with pytest.raises(Unconfirmed):
            visit.cancel("", "s")
    one.wake()
    eventually(lambda: one.ending("a") == "cancel", "the stop")


def test_a_visitor_has_no_streams(shared: Service) -> None:
    """It is nobody that could be asked for them."""
    shared.join(1)
    with visitor(shared) as visit, pytest.raises(NotImplementedError):
        visit.claim(Claim(Name("", "s", "a"), 1), reject=False)


def test_where_nobody_is_nobody_is_found(
    services: Services, tmp_path: Path, shared: Service
) -> None:
    """Nor is anything made there: a prefix that is not in use is not to look like one."""
    empty = services.make(shared.kind)
    if shared.kind == "unix":
        assert bus.visit(Settings(**empty.settings), "0") == []
        assert not empty.directory.parent.exists()
        return
    settings = Settings(**{**empty.settings, "bus_prefix": "nobody"})
    (visit,) = bus.visit(settings, "0")
    with contextlib.closing(visit):
        assert visit.list().workers == []
    with contextlib.closing(empty.client()) as client:
        assert client.keys("nobody:*") == []


def test_a_bus_that_is_local_has_nobody_to_visit() -> None:
    assert bus.visit(Settings(bus="local"), "0") == []


def test_a_visitor_of_a_service_that_goes_away(services: Services) -> None:
    """The directory is gone; it does not make it anew."""
    service = services.make("unix")
    (one,) = service.join(1)
    with visitor(service) as visit:
        one.begin("stop").result()
        assert not service.directory.exists()
        with pytest.raises(BusUnavailable):
            visit.list()
        with pytest.raises(BusUnavailable):
            visit.cancel("", "s")
    assert not service.directory.exists()


def test_the_directories_of_an_app(services: Services) -> None:
    """Those in which somebody lives: not of other apps, not what a killed worker left."""
    service = services.make("unix")
    one, other = service.join(2)
    folder = Path(service.settings["bus"].removeprefix("unix://"))
    assert living(folder, "0") == living(folder, "") == [service.directory]
    assert living(folder, "1") == []
    (service.directory.parent / "removed-0").mkdir()
    one.kill()
    assert living(folder, "0") == [service.directory]
    other.kill()
    assert living(folder, "0") == []
    assert living(folder / "nowhere", "0") == []


def test_a_directory_that_was_lost_is_not_believed(services: Services) -> None:
    """The others may not have joined it again."""
    service = services.make("unix")
    one, _ = service.join(2)
    shutil.rmtree(service.directory)
    eventually(service.directory.exists, "another directory")
    with pytest.raises(BusUnavailable):
        one.sessions()


# Workers that are none


@pytest.fixture
def impostor(short_base: Path) -> Iterator[tuple[Peer, UnixVisitor]]:
    """A process that has entered a service and listens, and somebody who looks in."""
    path = service_directory(short_base, "service", "0")
    peer = listening(path)
    try:
        (visit,) = bus.visit(Settings(bus=f"unix://{short_base}"), "0")
        assert isinstance(visit, UnixVisitor)
        with contextlib.closing(visit):
            yield peer, visit
    finally:
        peer.kill()


def test_a_worker_that_ends_before_it_answers_is_not_named(
    impostor: tuple[Peer, UnixVisitor],
) -> None:
    """It has read the question, and is gone."""
    peer, visit = impostor
    peer.begin("(lambda c: (c.recv(65536), os._exit(0)))(sock.accept()[0])")
    assert visit.list().workers == []


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"chatstream": 1, "id": "x"}'])
def test_a_worker_of_another_release_is_silent(
    impostor: tuple[Peer, UnixVisitor], answer: bytes
) -> None:
    """It drops the question, or says what is no page of it."""
    peer, visit = impostor
    peer.begin(f"(lambda c: (c.recv(65536), c.send({answer!r}), c.close()))(sock.accept()[0])")
    (found,) = visit.list().workers
    assert (found.worker.pid, found.answered) == (peer.pid, False)
    peer.result()


def test_a_page_that_answers_something_else_is_none(impostor: tuple[Peer, UnixVisitor]) -> None:
    peer, visit = impostor
    page = encode(Page((), False, "another"))
    peer.begin(f"(lambda c: (c.recv(65536), c.send({page!r})))(sock.accept()[0])")
    (found,) = visit.list().workers
    assert not found.answered
    peer.result()


def test_more_questions_than_a_hanging_workers_socket_holds(
    impostor: tuple[Peer, UnixVisitor],
) -> None:
    """It is silent at once: whoever asks does not wait in line."""
    peer, visit = impostor
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.setblocking(False)
                sock.connect(str(visit._path / str(peer.pid)))
        (found,) = visit.list().workers
        assert not found.answered
