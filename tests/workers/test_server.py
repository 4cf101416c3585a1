"""server: the gunicorn worker that this process is, and what other servers show."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from chatstream.workers import server
from chatstream.workers.server import client_socket, gunicorn_worker
from tests.workers.conftest import SIGNALS, SignalledWorker


def test_no_worker() -> None:
    """Under another server there is none."""
    assert gunicorn_worker() is None


def test_gunicorns_master_is_no_worker(worker: SignalledWorker) -> None:
    """It has no sockets of its own."""
    worker.sockets = None
    assert gunicorn_worker() is None


@pytest.mark.parametrize("left", SIGNALS)
def test_the_worker_is_found(worker: SignalledWorker, left: signal.Signals) -> None:
    """Whichever of its signals an app has taken over: one that is left tells."""
    for number in {*SIGNALS} - {left}:
        signal.signal(number, lambda number, frame: None)
    assert gunicorn_worker() is worker


class Channel:
    """waitress's: its socket, and whether its main thread has it still."""

    def __init__(self, sock: socket.socket, threads: int = 4) -> None:
        self.socket = sock
        self.connected = True
        self.server = SimpleNamespace(adj=SimpleNamespace(threads=threads))

    def check_client_disconnected(self) -> bool:
        return not self.connected

    @property
    def environ(self) -> dict[str, Any]:
        return {"waitress.client_disconnected": self.check_client_disconnected}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("key", ["gunicorn.socket", "werkzeug.socket"])
def test_a_socket_that_is_shown(pair: Pair, key: str) -> None:
    """It is the server's, and stays open."""
    with client_socket({key: pair[0]}) as shown:
        assert shown is pair[0]
    assert pair[0].fileno() >= 0


def test_no_server_shows_anything() -> None:
    with client_socket({"waitress.client_disconnected": bool}) as shown:
        assert shown is None
    with client_socket({}) as shown:
        assert shown is None


def test_waitress(pair: Pair, nothing_left: None) -> None:
    """The same connection, by a descriptor of our own."""
    with client_socket(Channel(pair[0]).environ) as own:
        assert own is not None
        assert own.fileno() not in (-1, pair[0].fileno())
        assert os.path.sameopenfile(own.fileno(), pair[0].fileno())
    assert pair[0].fileno() >= 0


def test_waitress_has_closed_it(pair: Pair, nothing_left: None) -> None:
    """Before, or while it was looked for: its number may be another's by then."""
    marked = Channel(pair[0])
    marked.connected = False
    with client_socket(marked.environ) as shown:
        assert shown is None
    closed = socket.socket()
    closed.close()
    with client_socket(Channel(closed).environ) as shown:
        assert shown is None


@pytest.mark.parametrize("reused", [False, True], ids=["free", "a file's"])
def test_waitress_closes_it_meanwhile(nothing_left: None, reused: bool) -> None:
    """After its number was read: that names nothing then, or what is no socket."""
    sock = socket.socket()
    channel = Channel(sock)

    class Closing:
        def fileno(self) -> int:
            number = sock.fileno()
            channel.connected = False
            sock.close()
            if reused:
                assert os.dup2(file.fileno(), number) == number
            return number

    channel.socket = Closing()  # type: ignore[assignment]
    with open(os.devnull) as file:
        number = sock.fileno()
        with client_socket(channel.environ) as shown:
            assert shown is None
        if reused:
            os.close(number)


@pytest.fixture
def uwsgi(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """uWSGI's module."""
    module = SimpleNamespace(opt={"threads": b"8"})
    monkeypatch.setitem(sys.modules, "uwsgi", module)  # type: ignore[arg-type]
    return module


def test_uwsgi(uwsgi: SimpleNamespace, pair: Pair, nothing_left: None) -> None:
    """As with waitress; where the module only happens to be there, it is not asked."""
    uwsgi.connection_fd = pair[0].fileno
    with client_socket({"uwsgi.version": b"2.0.30"}) as own:
        assert own is not None
        assert os.path.sameopenfile(own.fileno(), pair[0].fileno())
    assert pair[0].fileno() >= 0
    with client_socket({}) as shown:
        assert shown is None


@pytest.mark.parametrize(
    ("threads", "streams"), [(1, 1), (2, 1), (4, 3), (8, 7), (16, 14), (64, 56)]
)
def test_slots_of_waitress(pair: Pair, threads: int, streams: int) -> None:
    """A thread gets whole requests there, so that few are enough for cancels."""
    assert server.slots_shown(Channel(pair[0], threads).environ) == streams


@pytest.mark.parametrize(("opt", "streams"), [({}, 1), ({"threads": b"8"}, 4)])
def test_slots_of_uwsgi(uwsgi: SimpleNamespace, opt: dict[str, bytes], streams: int) -> None:
    """A thread waits for its request's bytes there: the rule is gthread's."""
    uwsgi.opt = opt
    assert server.slots_shown({"uwsgi.version": b"2.0.30"}) == streams


def test_slots_elsewhere() -> None:
    assert server.slots_shown({}) is None
