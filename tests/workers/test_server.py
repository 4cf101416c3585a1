"""server: the gunicorn worker that this process is, and the word that it ends."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from chatstream.sockets import native
from chatstream.workers import draining, server
from chatstream.workers.draining import enrol, follow_signals, notice_end, post_worker_init
from chatstream.workers.server import client_socket, gunicorn_worker
from tests.conftest import eventually

ENDS = {signal.SIGTERM: False, signal.SIGQUIT: True, signal.SIGINT: True, signal.SIGABRT: True}
SIGNALS = [*ENDS, signal.SIGUSR1, signal.SIGWINCH]


class Worker:
    """As gunicorn's: its signal handlers are methods."""

    def __init__(self) -> None:
        self.sockets: Any = []
        self.alive = True
        self.handled: list[int] = []

    def handle(self, number: int, frame: object) -> None:
        self.handled.append(number)


class Service:
    """Notes what it is told, and by which thread."""

    settings = None

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.threads: list[int] = []
        self.may_drain = threading.Event()
        self.may_drain.set()
        self.joined = 0

    def join(self) -> None:
        self.joined += 1

    def at_rest(self) -> bool:
        return True

    def drain(self, *, at_once: bool = False) -> None:
        self.may_drain.wait(5)
        self.threads.append(threading.get_ident())
        self.told.append(at_once)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """This process is a worker of gunicorn's."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    worker = Worker()
    for number in SIGNALS:
        signal.signal(number, worker.handle)
    yield worker
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: faulthandler's


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """The only one that is enrolled."""
    monkeypatch.setattr(draining, "_services", type(draining._services)())
    service = Service()
    enrol(service)
    return service


def test_no_worker() -> None:
    """Under another server there is none, and no signal is touched."""
    before = signal.getsignal(signal.SIGTERM)
    assert gunicorn_worker() is None
    assert not follow_signals()
    assert signal.getsignal(signal.SIGTERM) is before


def test_gunicorns_master_is_no_worker(worker: Worker) -> None:
    """It has no sockets of its own, and its signals are not ours: with preload_app we are there."""
    worker.sockets = None
    assert gunicorn_worker() is None
    assert not follow_signals()


def test_the_worker_is_found_also_when_its_signals_are_followed(worker: Worker) -> None:
    """Before and after."""
    assert gunicorn_worker() is worker
    assert follow_signals()
    assert gunicorn_worker() is worker


def test_the_worker_is_found_where_an_app_has_taken_the_other_signals(worker: Worker) -> None:
    """Those that do not end it, as SIGUSR1 for a dump."""
    assert follow_signals()
    for number in (signal.SIGUSR1, signal.SIGWINCH):
        signal.signal(number, lambda number, frame: None)
    assert gunicorn_worker() is worker


@pytest.mark.parametrize(("number", "at_once"), ENDS.items())
def test_a_signal_is_told_and_passed_on(
    worker: Worker, service: Service, number: signal.Signals, at_once: bool
) -> None:
    """To the services, from a thread of its own, and to gunicorn."""
    follow_signals()
    signal.raise_signal(number)
    assert worker.handled == [number]
    eventually(lambda: service.told == [at_once], "the word")
    assert threading.get_ident() not in service.threads


def test_the_worker_does_not_wait_for_the_services(worker: Worker, service: Service) -> None:
    """A signal interrupts whoever may hold the very lock that a service needs."""
    follow_signals()
    service.may_drain.clear()
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM]
    assert service.told == []
    service.may_drain.set()
    eventually(lambda: service.told, "the word")


def test_to_follow_twice_tells_once(worker: Worker, service: Service) -> None:
    """Each app of a process asks, and each hook."""
    follow_signals()
    post_worker_init(worker)
    signal.raise_signal(signal.SIGTERM)
    eventually(lambda: service.told, "the word")
    assert worker.handled == [signal.SIGTERM]
    assert service.told == [False]


def test_the_hook_has_the_services_join(worker: Worker, service: Service) -> None:
    """Before the worker's first request, which need not wait for that then."""
    post_worker_init(worker)
    assert service.joined == 1


def test_another_thread_cannot_follow(worker: Worker) -> None:
    """As with a worker of threads and preload_app: the hook is for that."""
    followed: list[bool] = []
    thread = threading.Thread(target=lambda: followed.append(follow_signals()))
    thread.start()
    thread.join(5)
    assert followed == [False]
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM]


def test_a_process_that_the_app_has_forked(worker: Worker, service: Service) -> None:
    """It has the sockets of the worker's streams, and ending it (multiprocessing) ends none."""
    follow_signals()
    child = os.fork()
    if child == 0:
        try:
            with ThreadPoolExecutor() as pool:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGQUIT)
                pool.submit(time.sleep, 0.2).result()  # as long as a thread may take
            os._exit(10 * len(worker.handled) + len(service.told))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 20
    signal.raise_signal(signal.SIGTERM)
    eventually(lambda: service.told == [False], "the word")


def test_no_thread_can_be_had(
    worker: Worker, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is told all the same, and nothing is raised where it was interrupted."""

    def refuse(target: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(native, "start_bare_thread", refuse)
    follow_signals()
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM]
    worker.alive = False
    notice_end()  # the next request
    assert service.told == [False]


def test_an_apps_own_handler_is_kept(worker: Worker, service: Service) -> None:
    """Whatever was there comes after ours; what is no function is left alone."""
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    assert follow_signals()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGQUIT)
    assert got == [signal.SIGTERM]
    eventually(lambda: service.told == [False], "the word")


def test_a_worker_that_is_not_to_live_on(worker: Worker, service: Service) -> None:
    """`max_requests` sends no signal; the next request sees it."""
    notice_end()
    assert service.told == []
    worker.alive = False
    notice_end()
    assert service.told == [False]


def test_a_service_that_is_gone_is_not_told(worker: Worker, service: Service) -> None:
    """To be enrolled keeps nobody alive."""
    another = Service()
    enrol(another)
    assert set(draining.services()) == {service, another}
    del another
    gc.collect()
    assert draining.services() == [service]


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
