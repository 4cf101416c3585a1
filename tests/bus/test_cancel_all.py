"""A stop of all that lives, in all workers: the same for local, unix and redis, as in test_listing.

And whether the others can be reached at all.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from time import monotonic

import pytest

from chatstream import bus
from chatstream.bus import base
from chatstream.bus.messages import Enquiry, decode, encode
from chatstream.bus.unix.directory import service_directory
from chatstream.errors import BusUnavailable
from chatstream.settings.table import Settings
from tests.bus.conftest import Service, Services, Worker
from tests.bus.peer import listening
from tests.bus.test_contract import AT_ONCE
from tests.bus.test_listing import streams, visitor
from tests.conftest import eventually


def reaches_others(member: Worker) -> bool:
    try:
        member.begin("check").result()
    except BusUnavailable:
        return False
    return True


def test_all_of_an_owner_are_stopped_and_named(service: Service) -> None:
    """In every worker, with cause CANCEL, and nobody else's."""
    one, other = service.join(2)
    one.claim("s1", "a1", "me")
    other.claim("s2", "a2", "me")
    other.claim("s3", "a3", "me")
    one.claim("s4", "a4", "mes")
    other.claim("s5", "a5", "")
    other.claim("s6", "a6", "me")
    other.complete("a6")
    stopped = one.cancel_all("me")
    assert streams(stopped) == {"a1", "a2", "a3"}
    if one is not other:
        assert stopped == {one.pid: ["a1"], other.pid: ["a2", "a3"]}
    everything = {**one.endings(), **other.endings()}
    assert [everything[f"a{number}"] for number in (1, 2, 3)] == ["cancel"] * 3
    assert [everything[f"a{number}"] for number in (4, 5, 6)] == ["live", "live", "completed"]
    assert streams(other.cancel_all("me")) == set()
    assert streams(other.cancel_all("")) == {"a5"}


def test_all_of_everybody(service: Service) -> None:
    """That is what no owner means."""
    one, other = service.join(2)
    one.claim("s", "a", "me")
    other.claim("s", "b", "you")
    other.claim("s", "c", "")
    assert streams(one.cancel_all(None)) == {"a", "b", "c"}
    assert set(one.endings().values()) | set(other.endings().values()) == {"cancel"}
    assert streams(one.sessions()) == set()


def test_what_is_stopped_twice_is_named_once(service: Service) -> None:
    """Two at once: each stream is in one of the two answers."""
    one, other = service.join(2)
    for number in range(20):
        (one, other)[number % 2].claim(f"s{number}", f"a{number}")
    asked = [one.begin("cancel_all", owner=""), other.begin("cancel_all", owner="")]
    found = [name for each in asked for _, _, names in each.result() for name in names]
    assert sorted(found) == sorted(f"a{number}" for number in range(20))


def test_a_worker_that_hangs_keeps_none_from_being_stopped(shared: Service) -> None:
    """Case 27. It is named, and stops what it had when it wakes: not what begins after that."""
    one, other, third = shared.join(3, patience=0.3)
    for member, name in ((one, "a"), (other, "b"), (third, "c")):
        member.claim(name, name)
    one.hang()
    asked = other.begin("cancel_all", owner="")
    found = {pid: answered and names for pid, answered, names in asked.result()}
    assert found == {one.pid: False, other.pid: ["b"], third.pid: ["c"]}
    assert 0.3 <= asked.seconds < 2 * base.PATIENCE
    assert {**other.endings(), **third.endings()} == {"b": "cancel", "c": "cancel"}
    begins = one.begin_claim("later", "d")
    one.wake()
    begins.result()
    eventually(lambda: one.ending("a") == "cancel", "the stop")
    third.cancel("nothing")
    # When it says that, it has read all that came before.
    eventually(lambda: other.sessions()[one.pid] == ["d"], "what it has")


def test_a_worker_that_was_killed_keeps_none_from_being_stopped(
    shared: Service,
) -> None:
    """Case 27: the rest still stop, whatever the bus knows of it by then."""
    one, other, third = shared.join(3, patience=0.3)
    for member, name in ((one, "a"), (other, "b"), (third, "c")):
        member.claim(name, name)
    one.kill()
    found = third.cancel_all("")
    assert found.pop(one.pid, None) is None
    assert found == {other.pid: ["b"], third.pid: ["c"]}
    assert {**other.endings(), **third.endings()} == {"b": "cancel", "c": "cancel"}


def test_more_than_a_page_holds(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are stopped, and each is named once; there is no bound, as there is for a listing."""
    monkeypatch.setattr(base, "MOST", 100)
    one, other = shared.join(2)
    one.begin("claim_many", count=400).result()
    other.claim("z", "b", "many")
    names = [f"{'a' * 100}{number}" for number in range(400)]
    with visitor(shared) as visit:
        listing = visit.cancel_all("many")
    assert not listing.cut
    found = {each.worker.pid: each for each in listing.workers}
    assert all(each.answered for each in found.values())
    assert [live.name.stream_id for live in found[one.pid].streams] == names
    assert [live.name.stream_id for live in found[other.pid].streams] == ["b"]
    for member in (one, other):
        assert set(member.endings().values()) == {"cancel"}


def test_more_than_a_page_holds_in_a_worker_that_hangs(shared: Service) -> None:
    """When it wakes nobody asks it for a second page: it stops them all."""
    one, other = shared.join(2, patience=0.2)
    one.begin("claim_many", count=400).result()
    one.hang()
    assert other.cancel_all(None) == {one.pid: None, other.pid: []}
    # Until nobody waits for it any more, by the clock of Redis too.
    until = monotonic() + base.PATIENCE
    eventually(lambda: monotonic() > until)
    one.wake()
    eventually(lambda: set(one.endings().values()) == {"cancel"}, "the stops")


def test_a_message_that_stops_all_needs_its_whole_form(shared: Service) -> None:
    """A word that is nearly it stops nothing."""
    one, other = shared.join(2)
    one.claim("s", "a")
    whole = encode(Enquiry(stop=True, origin="0" * 32))
    for word in (b"cancel_all", b"cancel-all ", b"all"):
        shared.post(one, whole.replace(b"cancel-all", word))
    assert other.sessions()[one.pid] == ["a"]


def test_a_stop_of_all_says_when_it_was_sent_on_one_host(short_base: Path) -> None:
    """As each request does: what begins later is not meant."""
    peer = listening(service_directory(short_base, "service", "0"))
    try:
        (visit,) = bus.visit(Settings(bus=f"unix://{short_base}"), "0")
        peer.begin("(lambda c: c.recv(65536))(sock.accept()[0])")
        with contextlib.closing(visit):
            begun = monotonic()
            visit.cancel_all("me")
        message = decode(peer.result())
    finally:
        peer.kill()
    assert isinstance(message, Enquiry)
    assert (message.owner, message.stop) == ("me", True)
    assert message.before is not None
    assert begun <= message.before <= monotonic()


# Where the bus is away


def test_without_a_directory_what_is_here_is_stopped(services: Services) -> None:
    """And it says that the others may not be."""
    us = services.make("unix")
    one, other = us.join(2)
    one.claim("s", "a")
    other.claim("z", "b")
    base_ = us.directory.parent.parent
    shutil.rmtree(base_)
    base_.write_text("no directory")
    with pytest.raises(BusUnavailable):
        one.cancel_all("")
    assert (one.ending("a"), other.ending("b")) == ("cancel", "live")
    with pytest.raises(BusUnavailable):
        one.begin("check").result()
    base_.unlink()
    base_.mkdir()
    eventually(lambda: reaches_others(one), "a directory")


def test_the_others_can_be_reached(service: Service) -> None:
    """With nobody else there, with a second worker, and with one that hangs."""
    one, other = service.join(2)
    check = one.begin("check")
    assert check.result() is None
    assert check.seconds < AT_ONCE
    if one is not other:
        other.hang()
        one.begin("check").result()


def test_who_has_left_reaches_nobody(shared: Service) -> None:
    """Its bus is closed."""
    shared.join(1)
    with visitor(shared) as visit:
        visit.check()
    with pytest.raises(BusUnavailable):
        visit.check()
