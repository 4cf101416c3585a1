"""gthread: what no client can bring about when a test wants it to. A worker without a process."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import TConn

from chatstream.workers import slots
from chatstream.workers.exchange import Kept
from chatstream.workers.gthread import ThreadWorker
from chatstream.workers.limits import LINGER, NO_DESCRIPTOR, Limits
from chatstream.workers.waiting import WaitingRoom
from tests.conftest import eventually


class Worker(ThreadWorker):  # type: ignore[misc]
    """One that has its poller; what would go to a thread is noted."""

    def __init__(self) -> None:
        cfg = Config()
        super().__init__(0, os.getppid(), [], None, 30, cfg, Logger(cfg))
        self.poller = selectors.DefaultSelector()
        self._room = WaitingRoom(self.poller)
        self._limits = Limits.load()
        self._tls = None
        self.served: list[Any] = []

    def enqueue_req(self, conn: Any) -> None:
        self.served.append(conn)


class Listener:
    """A listening socket that has nothing but an error to give."""

    def __init__(self, number: int) -> None:
        self._number = number

    def accept(self) -> Any:
        raise OSError(self._number, os.strerror(self._number))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Its end drains no service of another test's module: half a minute later that refuses."""
    monkeypatch.setattr("chatstream.workers.draining.services", list)
    worker = Worker()
    with contextlib.closing(worker.tmp), contextlib.closing(worker.poller):
        yield worker
        worker.murder_keepalived(force=True)
        assert worker.nr_conns == 0
        assert not worker.poller.get_map()


@contextlib.contextmanager
def connection(worker: Worker) -> Iterator[tuple[TConn, socket.socket]]:
    """A connection that was just accepted, and its client."""
    ours, theirs = socket.socketpair()
    worker.nr_conns += 1
    with ours, theirs:
        yield TConn(worker.cfg, ours, "", ""), theirs


def served(worker: Worker, conn: TConn, theirs: socket.socket) -> Future[bool]:
    """Has a request served, in no time. What comes of it is to be set."""
    worker._receive(conn, b"", time.monotonic() + 5)
    theirs.sendall(b"GET / HTTP/1.1\r\n\r\n")
    worker.wait_for_and_dispatch_events(5)
    assert worker.served.pop() is conn
    assert conn.parser.unreader.take_buffered() == b"GET / HTTP/1.1\r\n\r\n"
    return Future()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO, errno.EPERM])
def test_a_connection_that_ended_before_it_was_accepted(worker: Worker, number: int) -> None:
    """Is none; the worker goes on (accept(2))."""
    worker.accept(Listener(number))
    assert worker.nr_conns == 0
    assert worker._accept_again == 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_no_descriptor(worker: Worker, number: int) -> None:
    """Accepting pauses, and a full worker that has room again does not begin before its time."""
    worker.accept(Listener(number))
    assert 0 < worker._accept_again - time.monotonic() <= NO_DESCRIPTOR
    worker.set_accept_enabled(True)
    assert not worker._accepting
    worker._accept_again = 0.0
    worker.set_accept_enabled(True)
    assert worker._accepting


def test_a_broken_listener_is_not_hidden(worker: Worker) -> None:
    """What cannot get better ends the worker, as gunicorn has it."""
    with pytest.raises(OSError, match="Bad file"):
        worker.accept(Listener(errno.EBADF))


def test_an_app_that_closes_the_connection(worker: Worker) -> None:
    """And says that it can be kept: it is forgotten, and the worker goes on."""
    with connection(worker) as (conn, theirs):
        future = served(worker, conn, theirs)
        future.set_result(True)
        conn.sock.close()
        worker.finish_request(conn, future)
        assert worker.nr_conns == 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_connection_goes_on_or_lingers(worker: Worker, kept: bool) -> None:
    """Either way it waits in the poller, with its own time."""
    with connection(worker) as (conn, theirs):
        future = served(worker, conn, theirs)
        future.set_result(kept)
        begun = time.monotonic()
        worker.finish_request(conn, future)
        (waiting,) = worker._room
        patience = worker._limits.kept if kept else LINGER
        assert waiting.due - begun == pytest.approx(patience, abs=1)
        assert worker.nr_conns == 1
        theirs.close()
        worker.wait_for_and_dispatch_events(5)
        assert not list(worker._room)


def test_the_end_leaves_nobody(worker: Worker) -> None:
    """When the time to end is over, who still waits is dropped: half a request, and none."""
    with connection(worker) as (one, theirs), connection(worker) as (other, _):
        worker._receive(one, b"", time.monotonic() + 60)
        theirs.sendall(b"GET")
        worker.wait_for_and_dispatch_events(5)
        worker._receive(other, b"", time.monotonic() + 60)
        worker._cap_keepalive(time.monotonic() + 1)
        due = {waiting.conn: waiting.due - time.monotonic() for waiting in worker._room}
        assert due[one] > 5, "it has begun"
        assert due[other] <= 1
        worker.murder_keepalived(force=True)
        assert worker.nr_conns == 0


def test_a_quit_waits_for_no_lock_that_it_has_interrupted(worker: Worker) -> None:
    """A signal may come amid a `submit`, which holds the pool's lock: gunicorn's own hangs then."""
    worker.tpool = ThreadPoolExecutor(1)
    ended: list[BaseException] = []

    def quit_it() -> None:
        try:
            worker.handle_quit(signal.SIGQUIT, None)
        except SystemExit as error:
            ended.append(error)

    with worker.tpool._shutdown_lock:
        thread = threading.Thread(target=quit_it, daemon=True)
        thread.start()
        thread.join(5)
        assert ended
    assert not worker.alive
    worker.tpool.shutdown()


class NoMoreThreads(ThreadPoolExecutor):
    """A pool of one thread in a process that cannot start another."""

    def __init__(self) -> None:
        super().__init__(max_workers=8)
        self.submit(int).result()
        self._adjust_thread_count = self._fail  # type: ignore[method-assign]

    def _fail(self) -> None:
        raise RuntimeError("can't start new thread")


class Ended:
    """An exchange that the loop has nothing more to do with."""

    def finish(self) -> Kept:
        return Kept.YES


def test_a_connection_comes_back_though_no_thread_can_be_started(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the pool cannot grow, its threads do what the loop asks for, once, when they can."""
    finished: list[tuple[object, Kept]] = []
    monkeypatch.setattr(worker.method_queue, "defer", lambda call, *args: call(*args))
    monkeypatch.setattr(worker, "_keepalive_after", lambda conn, kept: kept)
    monkeypatch.setattr(
        worker, "finish_request", lambda conn, fs: finished.append((conn, fs.result()))
    )
    conn, busy = object(), threading.Event()
    with NoMoreThreads() as worker.tpool:
        with pytest.raises(RuntimeError):
            worker.tpool.submit(busy.wait, 10)
        worker.resume(conn, Ended())  # type: ignore[arg-type]
        busy.set()
        eventually(lambda: finished, "the connection")
    assert [(conn, Kept.YES)] == finished


def test_more_streams_than_descriptors_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn's master asks before the first worker is made."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    monkeypatch.setenv("CHATSTREAM_MAX_STREAMS", "5000")
    cfg = Config()
    with pytest.raises(SystemExit, match="CHATSTREAM_MAX_STREAMS=5000 needs"):
        ThreadWorker.check_config(cfg, Logger(cfg))


@pytest.mark.parametrize(("protocols", "detaches"), [("h1", True), ("h2,h1", False)])
def test_what_it_does_not_know_it_does_not_detach(protocols: str, detaches: bool) -> None:
    """HTTP/2 is gunicorn's own to send; slots go by that."""
    cfg = Config()
    cfg.set("http_protocols", protocols)
    worker = ThreadWorker(0, os.getppid(), [], None, 30, cfg, Logger(cfg))
    with contextlib.closing(worker.tmp):
        assert worker.detaches is detaches
