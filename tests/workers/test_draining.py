"""draining: how a process ends - the server's word for it, and streams that are drained first."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from chatstream.sockets import native
from chatstream.workers import draining
from chatstream.workers.draining import (
    drain_at_sigterm,
    enrol,
    follow_signals,
    notice_end,
    post_worker_init,
)
from chatstream.workers.server import gunicorn_worker
from tests.conftest import eventually
from tests.workers.conftest import SIGNALS, SignalledWorker

ENDS = {signal.SIGTERM: False, signal.SIGQUIT: True, signal.SIGINT: True, signal.SIGABRT: True}


class Service:
    """One stream, which is over when the test says so. Notes what it is told, and where."""

    settings = SimpleNamespace(drain=60.0)

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.threads: list[int] = []
        self.may_drain = threading.Event()
        self.may_drain.set()
        self.joined = 0
        self._rest = False
        self._listeners: list[Callable[[], object]] = []

    def drain(self, *, at_once: bool = False) -> None:
        self.may_drain.wait(5)
        self.threads.append(threading.get_ident())
        self.told.append(at_once)
        if at_once:
            self.over()

    def join(self) -> None:
        self.joined += 1

    def at_rest(self) -> bool:
        return self._rest

    def on_rest(self, listener: Callable[[], object]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def stop(self) -> None:
        """Not here."""

    def over(self) -> None:
        self._rest = True
        for listener in list(self._listeners):
            listener()

    @property
    def is_awaited(self) -> bool:
        return bool(self._listeners)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """The only one that is enrolled."""
    monkeypatch.setattr(draining, "_services", type(draining._services)())
    service = Service()
    enrol(service)
    return service


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """As it comes; and as it was."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_service_that_is_gone_is_not_told(service: Service) -> None:
    """To be enrolled keeps nobody alive."""
    another = Service()
    enrol(another)
    assert set(draining.services()) == {service, another}
    del another
    gc.collect()
    assert draining.services() == [service]


# gunicorn's workers


def test_where_there_is_no_worker_no_signal_is_touched() -> None:
    """Under another server."""
    assert not follow_signals()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_masters_signals_are_not_ours(worker: SignalledWorker) -> None:
    """With preload_app we are there."""
    worker.sockets = None
    assert not follow_signals()
    assert signal.getsignal(signal.SIGTERM) == worker.handle


def test_the_worker_is_found_also_when_its_signals_are_followed(worker: SignalledWorker) -> None:
    """By those that end it, where an app has taken the others, as SIGUSR1 for a dump."""
    assert follow_signals()
    for number in {*SIGNALS} - {*ENDS}:
        signal.signal(number, lambda number, frame: None)
    assert gunicorn_worker() is worker


@pytest.mark.parametrize(("number", "at_once"), ENDS.items())
def test_a_signal_is_told_and_passed_on(
    worker: SignalledWorker, service: Service, number: signal.Signals, at_once: bool
) -> None:
    """To the services, from a thread of its own, and to gunicorn."""
    follow_signals()
    signal.raise_signal(number)
    assert worker.handled == [number]
    eventually(lambda: service.told == [at_once], "the word")
    assert threading.get_ident() not in service.threads


def test_the_worker_does_not_wait_for_the_services(
    worker: SignalledWorker, service: Service
) -> None:
    """A signal interrupts whoever may hold the very lock that a service needs."""
    follow_signals()
    service.may_drain.clear()
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM]
    assert service.told == []
    service.may_drain.set()
    eventually(lambda: service.told, "the word")


def test_to_follow_twice_tells_once(worker: SignalledWorker, service: Service) -> None:
    """Each app of a process asks, and each hook."""
    follow_signals()
    post_worker_init(worker)
    signal.raise_signal(signal.SIGTERM)
    eventually(lambda: service.told, "the word")
    assert worker.handled == [signal.SIGTERM]
    assert service.told == [False]


def test_the_hook_has_the_services_join(worker: SignalledWorker, service: Service) -> None:
    """Before the worker's first request, which need not wait for that then."""
    post_worker_init(worker)
    assert service.joined == 1


def test_another_thread_cannot_follow(worker: SignalledWorker) -> None:
    """As with a worker of threads and preload_app: the hook is for that."""
    followed: list[bool] = []
    thread = threading.Thread(target=lambda: followed.append(follow_signals()))
    thread.start()
    thread.join(5)
    assert followed == [False]
    signal.raise_signal(signal.SIGTERM)
    assert worker.handled == [signal.SIGTERM]


def test_a_process_that_the_app_has_forked(worker: SignalledWorker, service: Service) -> None:
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
    worker: SignalledWorker, service: Service, monkeypatch: pytest.MonkeyPatch
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


def test_an_apps_own_handler_is_kept(worker: SignalledWorker, service: Service) -> None:
    """Whatever was there comes after ours; what is no function is left alone."""
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    assert follow_signals()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGQUIT)
    assert got == [signal.SIGTERM]
    eventually(lambda: service.told == [False], "the word")


def test_a_worker_that_is_not_to_live_on(worker: SignalledWorker, service: Service) -> None:
    """`max_requests` sends no signal; the next request sees it."""
    notice_end()
    assert service.told == []
    worker.alive = False
    notice_end()
    assert service.told == [False]


# Other servers


def wait_for_the_end(what: Callable[[], object]) -> None:
    """Where a server's main thread would wait."""

    def wait() -> None:
        what()
        eventually(lambda: False, "the end")

    with pytest.raises(SystemExit) as ended:
        wait()
    assert ended.value.code == 0


def test_the_process_goes_when_its_streams_have_gone(service: Service) -> None:
    """Not before: and the listener that waited for it goes as well."""
    assert drain_at_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    eventually(lambda: service.is_awaited, "the wait")
    assert service.told == [False]
    wait_for_the_end(service.over)
    assert not service.is_awaited


def test_a_second_sigterm_is_impatient(service: Service) -> None:
    """Streams end at once, and with them the process."""
    drain_at_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    eventually(lambda: service.is_awaited, "the wait")
    wait_for_the_end(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert service.told == [False, True]


def test_the_wait_has_an_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that does not go, keeps nobody: after CHATSTREAM_DRAIN and a grace it is left."""
    monkeypatch.setattr(service, "settings", SimpleNamespace(drain=0.1))
    monkeypatch.setattr(draining, "GRACE", 0.1)
    drain_at_sigterm()
    wait_for_the_end(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not service.at_rest()


def test_an_apps_own_handler_stays(service: Service) -> None:
    """As does gunicorn's, whose workers drain without it."""
    handled: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    assert not drain_at_sigterm()
    signal.raise_signal(signal.SIGTERM)
    assert handled == [signal.SIGTERM]
    assert service.told == []


def test_a_forked_process_ends_as_any(service: Service) -> None:
    """It has the handler, and no streams: SIGTERM is the end of it."""
    drain_at_sigterm()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, b"!")  # Python forgets signals that come before
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pass
        os._exit(1)
    os.read(reading, 1)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert service.told == []


@pytest.fixture
def uwsgi(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """uWSGI's module, as its master has it."""
    module = SimpleNamespace(has_threads=1, worker_id=lambda: 0)
    monkeypatch.setitem(sys.modules, "uwsgi", module)  # type: ignore[arg-type]
    return module


def test_uwsgis_master_is_left_alone(uwsgi: SimpleNamespace) -> None:
    """Its workers are told when they are forked, and a hook that was there is called, too."""
    called: list[str] = []
    uwsgi.post_fork_hook = lambda: called.append("theirs")
    assert drain_at_sigterm()
    threads = threading.active_count()
    uwsgi.post_fork_hook()  # of a mule's: no worker
    assert called == ["theirs"]
    assert threading.active_count() == threads
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_uwsgi_without_threads(uwsgi: SimpleNamespace) -> None:
    """There none of ours would run: it says that it is of no use."""
    uwsgi.has_threads = 0
    assert not drain_at_sigterm()
    assert not hasattr(uwsgi, "post_fork_hook")
