"""native: locks, threads and epoll of the operating system, with and without gevent."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import threading

import pytest

from chatstream.sockets import native


def test_without_gevent_nothing_is_patched() -> None:
    """In a plain process the standard library is what it says."""
    assert not native.patched()


def test_the_lock_excludes() -> None:
    """Two holders at once are not possible, and the lock is given back at the end of `with`."""
    lock = native.allocate_lock()
    with lock:
        assert not lock.acquire(False)  # type: ignore[attr-defined]
    with lock:
        pass


@pytest.mark.parametrize(
    ("leave", "gone"),
    [
        (lambda peer: None, False),
        (lambda peer: peer.sendall(b"pipelined"), False),
        (lambda peer: (peer.sendall(b"pipelined"), peer.close()), True),
        (lambda peer: peer.shutdown(socket.SHUT_WR), True),
        (lambda peer: peer.close(), True),
    ],
    ids=["there", "sending", "sent and closed", "half-closed", "closed"],
)
def test_hung_up(leave, gone: bool) -> None:  # type: ignore[no-untyped-def]
    """A peer that closed or half-closed has hung up, also behind bytes; one that sends has not."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        leave(theirs)
        assert gone == native.hung_up(ours.fileno())


def test_a_thread_runs_named_and_as_a_daemon() -> None:
    """The loop's thread has a name for stack dumps and does not keep a process alive."""
    seen: list[threading.Thread] = []
    done = threading.Event()

    def target() -> None:
        seen.append(threading.current_thread())
        done.set()

    native.start_thread(target, "chatstream-test")
    assert done.wait(5)
    seen[0].join(5)
    assert seen[0].name == "chatstream-test"
    assert seen[0].daemon


def test_epoll_tells_of_a_readable_socket() -> None:
    """The epoll object is a working one."""
    ours, theirs = socket.socketpair()
    with ours, theirs, native.epoll() as epoll:
        epoll.register(ours.fileno(), select.EPOLLIN)
        theirs.send(b"x")
        assert [(ours.fileno(), select.EPOLLIN)] == epoll.poll(5)


def test_the_runner_runs_it_soon_and_elsewhere() -> None:
    """What must not run in a native thread runs in a thread of its own; who asks does not wait."""
    run = native.runner()
    go, done = threading.Event(), threading.Event()
    seen: list[threading.Thread] = []

    def call() -> None:
        seen.append(threading.current_thread())
        assert go.wait(5)
        done.set()

    native.start_thread(lambda: (run(call), go.set()), "asks")  # type: ignore[arg-type]
    assert done.wait(5)
    seen[0].join(5)
    assert seen[0].name != "asks"
    assert seen[0].daemon


def test_the_runner_runs_each_of_many() -> None:
    """None is lost, though one of them never ends."""
    run = native.runner()
    held, ran = threading.Event(), threading.Semaphore(0)
    run(lambda: held.wait(10))
    for _ in range(20):
        run(ran.release)
    assert all(ran.acquire(timeout=5) for _ in range(20))
    held.set()


GEVENT = """
from chatstream.sockets import native      # imported before the patch, as with preload_app
assert not native.patched()
from gevent import monkey
monkey.patch_all()
import _thread, select, socket, threading, time, gevent

assert native.patched()
assert not hasattr(select, "epoll")
assert type(native.allocate_lock()).__module__ == "_thread", type(native.allocate_lock())
with native.epoll() as epoll:
    assert [] == epoll.poll(0)

ours, theirs = socket.socketpair()
assert not native.hung_up(ours.fileno())
theirs.close()
assert native.hung_up(ours.fileno())

get_ident = monkey.get_original("_thread", "get_ident")
idents = []
native.start_thread(lambda: idents.append(get_ident()), "n")
end = time.monotonic() + 5
while not idents and time.monotonic() < end:
    pass                           # no switch to the hub: only a native thread gets to run
assert idents and idents[0] != get_ident(), idents
print("native")
"""


def test_under_gevent_all_is_the_operating_systems() -> None:
    """Patched after the import, all of it stays native: a thread runs while no greenlet yields."""
    pytest.importorskip("gevent")
    run = subprocess.run(
        [sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.returncode, run.stdout) == (0, "native\n"), run.stderr


RUNNER = """
from gevent import monkey
monkey.patch_all()
import gevent, os, time
from gevent.event import Event
from chatstream.sockets import native

get_ident = monkey.get_original("_thread", "get_ident")
here, main = get_ident(), gevent.getcurrent()
run = native.runner()
asked, ran, done = [], [], Event()

def call():
    gevent.sleep(0.01)             # a greenlet: it may wait, for a lock of logging's, say
    ran.append((get_ident(), gevent.getcurrent() is main))
    if len(ran) == 20:
        done.set()

def native_thread():
    for _ in range(20):
        run(call)
        asked.append(get_ident())

native.start_thread(native_thread, "n")
begin = time.monotonic()
while len(asked) < 20 and time.monotonic() < begin + 5:
    pass                           # no switch to the hub: and yet who asks does not wait
assert len(asked) == 20 and here not in asked
assert ran == [], ran
assert done.wait(5)
assert set(ran) == {(here, False)}, ran

def asleep():
    with open(f"/proc/self/task/{os.getpid()}/stat") as stat:
        return stat.read().rpartition(") ")[2].startswith("S")

def native_thread_that_waits():
    while not asleep():
        pass
    run(woken.set)

woken = Event()
native.start_thread(native_thread_that_waits, "n")
assert woken.wait(5)               # the hub sleeps in the kernel, and is woken
print("greenlets")
"""


def test_under_gevent_the_runner_runs_it_in_a_greenlet() -> None:
    """In the thread that made the runner, woken from its sleep; the native thread never waits."""
    pytest.importorskip("gevent")
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.returncode, run.stdout) == (0, "greenlets\n"), run.stderr
