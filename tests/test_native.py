"""native: locks, threads and epoll of the operating system, with and without gevent."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import threading

import pytest

from chatstream import native


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


GEVENT = """
from chatstream import native      # imported before the patch, as with preload_app
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
