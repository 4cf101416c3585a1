"""unix_bus: what is particular to the bus of one host - its directory, its sockets, gevent."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatstream.bus.messages import Action, Request, decode, encode
from chatstream.bus.unix.record_locks import RecordLocks
from chatstream.errors import BusUnavailable, Unconfirmed
from tests.bus.conftest import Service, Services, Worker
from tests.bus.test_contract import AT_ONCE, assert_live, outcomes
from tests.conftest import PATIENCE, eventually


@pytest.fixture
def service(services: Services) -> Service:
    return services.make("unix")


def listener(path: Path | str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE)
    sock.bind(str(path))
    sock.listen()
    return sock


# The directory


def test_nobody_else_can_send(service: Service) -> None:
    """A worker's socket is its user's own, as the directory is."""
    (one,) = service.join(1)
    assert stat.S_IMODE(os.lstat(service.address(one)).st_mode) == 0o600


def test_a_directory_that_others_can_enter_is_not_used(service: Service) -> None:
    """The worker says so once and serves its own streams; of others it knows nothing.

    It tries again: when it can enter, what lives is registered, and one line says so.
    """
    service.directory.parent.mkdir(mode=0o755)
    one, other = service.join(2)
    (line,) = one.log()
    assert line.startswith("[bus] unix is away: ")
    assert str(service.directory.parent) in line
    assert one.claim("s", "a") is False
    assert one.cancel("s") is True
    assert one.claim("z", "b") is False
    one.release("a")
    with pytest.raises(BusUnavailable):
        one.cancel("unknown")
    service.directory.parent.chmod(0o700)
    eventually(lambda: len(one.log()) == 2, "its way in")
    assert one.log()[1] == "[bus] unix is back; 1 streams are registered"
    eventually(lambda: len(other.log()) == 2, "the other's")
    assert other.cancel("z") is True


def test_what_a_killed_worker_left_is_swept(service: Service) -> None:
    """Its socket goes with the next worker that starts, and the last to leave takes the rest."""
    one, other = service.join(2)
    address = Path(service.address(one))
    one.kill()
    assert address.is_socket()
    (third,) = service.join(1)
    assert not address.exists()
    other.begin("stop").result()
    assert service.directory.exists()
    third.begin("stop").result()
    assert not service.directory.exists()


def test_a_removed_directory_is_made_again(service: Service) -> None:
    """Local stops work; nothing is said of others' streams until all have found each other."""
    one, other = service.join(2)
    one.claim("s", "a")
    other.claim("z", "b")
    shutil.rmtree(service.directory.parent)
    assert one.cancel("s") is True
    one.release("a")
    with pytest.raises(BusUnavailable):
        one.cancel("unknown", "u")
    eventually(lambda: one.log() and other.log(), "the return of both")
    assert one.cancel("z") is True
    assert other.ending("b") == "cancel"
    assert one.log() == ["[bus] unix is back; 0 streams are registered"]
    assert other.log() == ["[bus] unix is back; 1 streams are registered"]


# A worker that dies, or hangs


@pytest.mark.parametrize("reject", [False, True])
def test_a_killed_workers_streams_are_gone_at_once(service: Service, reject: bool) -> None:
    """Case 33: the session is unknown, and its ids can be used again."""
    one, other, third = service.join(3, reject=reject)
    one.claim("s", "a")
    one.claim("z", "b")
    one.kill()
    commands = [other.begin_cancel("s"), third.begin_cancel("z")]
    assert outcomes(commands) == [False, False]
    commands += [other.begin_claim("s", "a"), third.begin_claim("z", "b")]
    assert outcomes(commands) == [False] * 4
    assert max(command.seconds for command in commands) < AT_ONCE
    assert third.cancel("s", "a") is True


def test_a_session_that_went_on_elsewhere_is_superseded_there(service: Service) -> None:
    """Its first place is free again, as the worker that hung there is gone; its second is not."""
    one, other, third = service.join(3, patience=0.3)
    one.claim("s", "a1")
    one.hang()
    other.claim("s", "a2")
    one.kill()
    assert third.claim("s", "a3") is False
    assert other.ending("a2") == "superseded"
    assert_live(third, "a3")


def test_more_cancels_than_a_hanging_workers_socket_holds(service: Service) -> None:
    """None waits longer than the others for it, none is answered falsely."""
    one, other = service.join(2)
    one.claim("s", "a")
    one.hang()
    cancels = [other.begin_cancel("s") for _ in range(30)]
    assert {type(outcome) for outcome in outcomes(cancels)} == {Unconfirmed}
    assert max(cancel.seconds for cancel in cancels) < 2
    one.wake()
    eventually(lambda: one.ending("a") == "cancel", "the stream's end")


@pytest.fixture
def impostor(service: Service) -> Iterator[tuple[Worker, socket.socket]]:
    """A worker that asks for another's stream, and a socket that is asked in the other's place."""
    one, other = service.join(2)
    one.claim("s", "a")
    one.hang()
    os.unlink(service.address(one))
    with contextlib.closing(listener(service.address(one))) as sock:
        yield other, sock


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"yes",
        b'{"chatstream": 2, "id": "1", "origin": "1", "answer": "stopped"}',
        b'{"chatstream": 1, "id": "1", "origin": "1", "answer": "yes"}',
        b'{"chatstream": 1, "id": "1", "origin": "1"}',
    ],
)
def test_a_reply_of_another_format_confirms_nothing(
    impostor: tuple[Worker, socket.socket], reply: bytes
) -> None:
    """A worker of another release, say: it is not known what it did."""
    other, sock = impostor
    cancel = other.begin_cancel("s")
    connection, _ = sock.accept()
    with connection:
        data = connection.recv(65536)
        connection.send(reply)
    with pytest.raises(Unconfirmed):
        cancel.result()
    request = decode(data)
    assert isinstance(request, Request)
    assert (request.action, request.owner) == (Action.CANCEL, "")
    assert (request.session_id, request.stream_id) == ("s", None)
    assert request.origin == str(other.pid)


# What it costs


def test_other_workers_are_not_asked(service: Service) -> None:
    """Of 34 workers a stream's start, stop and end concern those two that have it to do."""
    one, other = service.join(2)
    locks = RecordLocks(service.directory / "locks")
    with contextlib.ExitStack() as stack:
        stack.callback(locks.close)
        crowd = []
        for pid in range(4_190_000, 4_190_032):  # none that is running
            assert locks.take(pid) == 0
            crowd.append(listener(service.directory / str(pid)))
            stack.callback(crowd[-1].close)
        for number in range(20):
            one.claim(f"s{number}", f"a{number}")
            assert other.cancel(f"s{number}") is True
            one.release(f"a{number}")
            assert other.cancel("unknown", f"u{number}") is False
        for sock in crowd:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.accept()
    assert one.received() == ["cancel"] * 20
    assert other.received() == []


# Messages


def test_a_message_longer_than_any_of_ours_is_dropped(service: Service) -> None:
    """What follows it is read."""
    one, other = service.join(2)
    one.claim("s", "a")
    service.post(one, b" " * 100_000 + encode(Request(Action.CANCEL, "", "s", "a")))
    one.claim("z", "b")
    assert other.cancel("z") is True
    assert_live(one, "a")


# gevent


@pytest.mark.parametrize("gevent_has", ["the stream", "the cancel", "both"])
def test_workers_under_gevent(service: Service, gevent_has: str) -> None:
    """They stop, supersede and are told of early cancels as others are."""
    (one,) = service.join(1, gevent=gevent_has != "the cancel")
    (other,) = service.join(1, gevent=gevent_has != "the stream")
    one.claim("s", "a1")
    one.claim("z", "b")
    assert other.cancel("s") is True
    other.claim("z", "b2")
    assert one.endings() == {"a1": "cancel", "b": "superseded"}
    assert sorted(outcomes([one.begin_cancel("z") for _ in range(20)])) == [False] * 19 + [True]
    assert one.cancel("s", "a3") is False
    assert other.claim("s", "a3") is True
    service.post(one, b"of another")
    one.claim("s", "a4")
    assert other.cancel("s") is True
    eventually(lambda: len(one.log()) == 1, "a warning")


def test_a_busy_greenlet_delays_no_stop(service: Service, tmp_path: Path) -> None:
    """The loop's thread is the system's: it stops a stream while no greenlet can run."""
    (one,) = service.join(1, gevent=True)
    (other,) = service.join(1)
    one.claim("s", "a")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    holding = one.begin("hold_up", fifo=str(fifo))
    with fifo.open("wb"):  # returns when the worker has opened it
        cancel = other.begin_cancel("s")
        assert cancel.result() is True
        assert not holding.ready
    holding.result()
    assert one.ending("a") == "cancel"


def test_a_hanging_worker_under_gevent(service: Service) -> None:
    """Who waits for another worker's answer lets its own greenlets go on."""
    (one,) = service.join(1)
    (other,) = service.join(1, gevent=True)
    one.claim("s", "a")
    one.hang()
    stuck = other.begin_cancel("s")
    assert other.claim("z", "b") is False
    assert not stuck.ready
    with pytest.raises(Unconfirmed):
        stuck.result()
