"""ending: SIGTERM drains where the server would not, and nothing is taken from who has it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from chatstream.workers import draining
from chatstream.workers.draining import drain_at_sigterm, enrol
from tests.conftest import eventually


class Service:
    """One stream, which is over when the test says so."""

    settings = SimpleNamespace(drain=60.0)

    def __init__(self) -> None:
        self.told: list[bool] = []
        self._rest = False
        self._listeners: list[Callable[[], object]] = []

    def drain(self, *, at_once: bool = False) -> None:
        self.told.append(at_once)
        if at_once:
            self.over()

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
