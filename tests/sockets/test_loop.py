"""loop: the one native thread that waits on sockets and clocks. Real sockets, real time."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from chatstream.errors import Busy
from chatstream.sockets import native
from chatstream.sockets.loop import Loop
from tests.conftest import descriptors, eventually, fill
from tests.sockets.conftest import descriptors_left, reset, settled, tcp_pair

pytestmark = pytest.mark.usefixtures("nothing_left")


# Whose number it is


def test_a_released_watchs_event_is_not_the_next_ones(loop: Loop) -> None:
    """An event that epoll has told already is dropped when its descriptor number has a new owner.

    Two clients leave while the loop is busy, so that one epoll call tells of both. The first one's
    callback releases the second's watch and watches a client that is there, under that number.
    """
    (a, a_peer), (b, b_peer), (c, c_peer) = (socket.socketpair() for _ in range(3))
    called: list[str] = []
    busy, go = threading.Event(), threading.Event()

    def first() -> None:
        called.append("first")
        number = second.fd
        second.release()
        watches.append(loop.watch(c, lambda: called.append("third")))
        assert number == watches[-1].fd

    watches = [loop.watch(a, first)]
    second = loop.watch(b, lambda: called.append("second"))
    loop.call_later(0.0, lambda: (busy.set(), go.wait(5)))
    assert busy.wait(5)
    a_peer.close()
    b_peer.close()
    go.set()
    settled(loop)
    assert called == ["first"]
    c_peer.close()
    eventually(lambda: called == ["first", "third"])
    for watch in watches:
        watch.release()
    for sock in (a, b, c):
        sock.close()


def test_a_reused_number_is_never_mistaken(loop: Loop) -> None:
    """A client leaves in the moment its watch is released and its number used again: 300 times.

    The watch that has the number now belongs to a client that is there; it is never called.
    """
    wrong: list[int] = []
    reused = 0
    with tcp_pair() as (there, _):
        for _ in range(300):
            ours, theirs = socket.socketpair()
            peer = fcntl.fcntl(theirs, fcntl.F_DUPFD, 200)  # so that its number is not the next
            theirs.close()
            old = loop.watch(ours, lambda: None)
            closer = threading.Thread(target=os.close, args=(peer,))
            closer.start()
            old.release()
            new = loop.watch(there, lambda: wrong.append(1))
            reused += new.fd == old.fd
            closer.join(5)
            new.release()
            ours.close()
        settled(loop)
    assert wrong == []
    assert reused > 200


def test_no_descriptor_for_the_watch_is_busy(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """EMFILE is Busy, which the client gets as a 503; the loop works on once there is room."""
    server, client = pair
    settled(loop)
    with descriptors_left(0), pytest.raises(Busy):
        loop.watch(server, lambda: None)
    called = threading.Event()
    watch = loop.watch(server, called.set)
    client.close()
    assert called.wait(5)
    watch.release()


@pytest.mark.parametrize("left", [0, 1, 2])
def test_no_descriptor_for_the_loop_itself_is_busy(
    loop: Loop, pair: tuple[socket.socket, socket.socket], left: int
) -> None:
    """A loop that cannot start for want of descriptors says Busy, and starts when there is room."""
    server, client = pair
    with descriptors_left(left), pytest.raises(Busy):
        loop.watch(server, lambda: None)
    called = threading.Event()
    watch = loop.watch(server, called.set)
    client.close()
    assert called.wait(5)
    watch.release()


# What arrives for the worker


@contextmanager
def readable(loop: Loop, callback: Callable[[socket.socket], object]) -> Iterator[socket.socket]:
    """Has the loop read what is sent to the socket that this gives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        loop.on_readable(ours.fileno(), lambda: callback(ours))
        try:
            yield theirs
        finally:
            loop.forget_ready(ours.fileno())


def test_what_arrives_is_read_in_the_loops_thread(loop: Loop) -> None:
    """The callback runs whenever there is something, as often as something comes."""
    seen: list[tuple[bytes, int]] = []
    with readable(loop, lambda ours: seen.append((ours.recv(9), threading.get_ident()))) as theirs:
        settled(loop)
        assert seen == []
        for n in range(3):
            theirs.send(b"%d" % n)
            eventually(lambda n=n: len(seen) == n + 1)  # type: ignore[misc]
    assert [data for data, _ in seen] == [b"0", b"1", b"2"]
    assert len({ident for _, ident in seen} - {threading.get_ident()}) == 1


def test_what_arrived_before_is_read_too(loop: Loop) -> None:
    """Something that waits already when the watch begins."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    called = threading.Event()
    with ours, theirs:
        theirs.send(b"x")
        loop.on_readable(ours.fileno(), lambda: (ours.recv(9), called.set()))
        assert called.wait(5)
        loop.forget_ready(ours.fileno())


def test_what_one_callback_leaves_calls_again(loop: Loop) -> None:
    """A callback may take a part: for the rest it is called again, and others have their turn."""
    seen: list[bytes] = []
    with readable(loop, lambda ours: seen.append(ours.recv(9))) as theirs:
        busy, go = threading.Event(), threading.Event()
        loop.call_later(0.0, lambda: (busy.set(), go.wait(5)))
        assert busy.wait(5)
        for n in range(20):
            theirs.send(b"%d" % n)
        go.set()
        eventually(lambda: len(seen) == 20)
    assert seen == [b"%d" % n for n in range(20)]


def test_what_is_forgotten_is_not_read(loop: Loop) -> None:
    """After `forget_ready` nothing is called. What is not there can be forgotten as well."""
    seen: list[bytes] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        loop.on_readable(ours.fileno(), lambda: seen.append(b"read"))
        loop.forget_ready(ours.fileno())
        loop.forget_ready(ours.fileno())
        loop.forget_ready(theirs.fileno())
        theirs.send(b"x")
        settled(loop)
        assert seen == []
        assert ours.recv(9) == b"x"
        loop.on_readable(ours.fileno(), lambda: seen.append(ours.recv(9)))
        theirs.send(b"again")
        eventually(lambda: seen == [b"again"])
        loop.forget_ready(ours.fileno())


def test_a_reader_may_forget_itself(loop: Loop) -> None:
    """In its own callback, as a bus that closes while it answers."""
    calls: list[int] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:

        def callback() -> None:
            calls.append(1)
            loop.forget_ready(ours.fileno())

        loop.on_readable(ours.fileno(), callback)
        theirs.send(b"x")
        eventually(lambda: calls)
        settled(loop)
        assert calls == [1]


def test_readers_and_watches_do_not_mix(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A client's hang-up calls its watch, and what arrives calls the reader."""
    server, client = pair
    called: list[str] = []
    watch = loop.watch(server, lambda: called.append("hang-up"))
    with readable(loop, lambda ours: called.append(ours.recv(9).decode())) as theirs:
        client.sendall(b"GET / HTTP/1.1\r\n")
        theirs.send(b"a")
        eventually(lambda: called == ["a"])
        client.close()
        eventually(lambda: called == ["a", "hang-up"])
        theirs.send(b"b")
        eventually(lambda: called == ["a", "hang-up", "b"])
    watch.release()


def test_a_readers_number_can_be_a_watchs_next(loop: Loop) -> None:
    """An event that epoll has told already is dropped when the reader's number has a new owner.

    While the loop is busy something arrives and a client leaves, so that one epoll call tells of
    both. The client's callback ends the reader and watches a client that is there, by its number.
    """
    called: list[str] = []
    (a, a_peer), (c, c_peer) = socket.socketpair(), socket.socketpair()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    busy, go = threading.Event(), threading.Event()
    watches = []

    def hang_up() -> None:
        called.append("hang-up")
        number = ours.fileno()
        loop.forget_ready(number)
        ours.close()
        watches.append(loop.watch(c, lambda: called.append("another's")))
        assert number == watches[-1].fd

    watches.append(loop.watch(a, hang_up))
    loop.on_readable(ours.fileno(), lambda: called.append("read"))
    loop.call_later(0.0, lambda: (busy.set(), go.wait(5)))
    assert busy.wait(5)
    a_peer.close()
    theirs.send(b"x")
    go.set()
    settled(loop)
    assert called == ["hang-up"]
    for watch in watches:
        watch.release()
    for sock in (a, c, c_peer, theirs):
        sock.close()


@pytest.mark.parametrize("left", [0, 1])
def test_no_descriptor_to_read_is_busy(loop: Loop, left: int) -> None:
    """A loop that cannot start says Busy, as for a watch, and reads when there is room."""
    seen: list[bytes] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        with descriptors_left(left), pytest.raises(Busy):
            loop.on_readable(ours.fileno(), lambda: seen.append(ours.recv(9)))
        theirs.send(b"x")
        loop.on_readable(ours.fileno(), lambda: seen.append(ours.recv(9)))
        eventually(lambda: seen == [b"x"])
        loop.forget_ready(ours.fileno())


# Room to write


def test_room_to_write(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """The callback runs as long as there is some, and again when there is some again."""
    server, client = pair
    ran = threading.Event()
    fill(server)
    loop.on_writable(server.fileno(), ran.set)
    settled(loop)
    assert not ran.is_set()
    while not ran.wait(0.01):
        client.recv(1 << 20)
    loop.forget_ready(server.fileno())
    settled(loop)
    ran.clear()
    settled(loop)
    assert not ran.is_set()


@pytest.mark.parametrize("leave", [lambda sock: sock.close(), reset], ids=["FIN", "RST"])
def test_nobody_to_write_to(
    loop: Loop,
    pair: tuple[socket.socket, socket.socket],
    leave: Callable[[socket.socket], object],
) -> None:
    """Who waits for room is told when the peer is gone: the write says so then."""
    server, client = pair
    fill(server)
    failed = threading.Event()

    def write() -> None:
        with suppress(BlockingIOError):
            try:
                server.send(b"x")
            except ConnectionError:
                loop.forget_ready(server.fileno())
                failed.set()

    loop.on_writable(server.fileno(), write)
    leave(client)
    assert failed.wait(5)


def test_one_waits_for_room_and_is_watched(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The watch has a descriptor of its own: each says what it is for."""
    server, client = pair
    left, room = threading.Event(), threading.Event()
    watch = loop.watch(server, left.set)
    loop.on_writable(server.fileno(), room.set)
    assert room.wait(5)
    loop.forget_ready(server.fileno())
    assert not left.is_set()
    client.close()
    assert left.wait(5)
    watch.release()


# What is to be done soon


def test_what_is_soon_runs_in_the_loops_thread_in_its_order(loop: Loop) -> None:
    """From any thread, and from the loop's own; once each."""
    ran: list[int] = []
    idents: set[int] = set()
    done = threading.Event()

    def step(number: int) -> None:
        ran.append(number)
        idents.add(threading.get_ident())
        if number == 9:
            loop.call_soon(done.set)

    for number in range(10):
        loop.call_soon(lambda number=number: step(number))  # type: ignore[misc]
    assert done.wait(5)
    assert ran == list(range(10))
    assert len(idents - {threading.get_ident()}) == 1


def test_what_is_soon_wakes_a_sleeping_loop(loop: Loop) -> None:
    """Soon is not when the next timer is due."""
    settled(loop)
    ran = threading.Event()
    begin = time.monotonic()
    loop.call_soon(ran.set)
    assert ran.wait(5)
    assert time.monotonic() - begin < 1


def test_what_asks_for_itself_again_leaves_others_their_turn(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A callback that goes on for ever does so a turn at a time: sockets and timers have theirs."""
    server, client = pair
    going = True

    def again() -> None:
        if going:
            loop.call_soon(again)

    loop.call_soon(again)
    left, late = threading.Event(), threading.Event()
    watch = loop.watch(server, left.set)
    loop.call_later(0.01, late.set)
    client.close()
    assert left.wait(5)
    assert late.wait(5)
    going = False
    watch.release()


# Clocks


def test_timers_run_in_the_order_of_their_time(loop: Loop) -> None:
    """What is due earlier runs earlier, whatever came first; what is due together, as it came."""
    ran: list[str] = []
    done = threading.Event()
    ready, go = threading.Event(), threading.Event()
    loop.call_later(0.0, lambda: (ready.set(), go.wait(5)))
    assert ready.wait(5)
    for delay, name in [(0.08, "last"), (0.02, "a"), (0.05, "c"), (0.02, "b")]:
        loop.call_later(delay, lambda name=name: ran.append(name))  # type: ignore[misc]
    loop.call_later(0.1, done.set)
    go.set()
    assert done.wait(5)
    assert ran == ["a", "b", "c", "last"]


def test_a_timer_is_not_early_and_wakes_a_sleeping_loop(loop: Loop) -> None:
    """A timer that is due before the one the loop sleeps for wakes it, and none runs early."""
    never = loop.call_later(60, lambda: None)
    settled(loop)
    ran = threading.Event()
    begin = time.monotonic()
    times: list[float] = []
    loop.call_later(0.05, lambda: (times.append(time.monotonic()), ran.set()))
    assert ran.wait(5)
    assert times[0] - begin >= 0.05
    loop.cancel(never)


def test_a_cancelled_timer_does_not_run(loop: Loop) -> None:
    """A cancelled timer is forgotten, another of the same time is not; cancelling is idempotent."""
    ran: list[str] = []
    done = threading.Event()
    timer = loop.call_later(0.05, lambda: ran.append("cancelled"))
    loop.call_later(0.05, lambda: ran.append("kept"))
    loop.call_later(0.06, done.set)
    loop.cancel(timer)
    loop.cancel(timer)
    assert done.wait(5)
    assert ran == ["kept"]


def test_cancelling_a_timer_that_ran_is_nothing(loop: Loop) -> None:
    """Every stream cancels its deadline at its end, also one that was due; timers go on."""
    for _ in range(200):
        done = threading.Event()
        timer = loop.call_later(0.0, done.set)
        assert done.wait(5)
        loop.cancel(timer)
    settled(loop)
    assert len(loop._timers) == 0


def test_cancelled_timers_do_not_accumulate(loop: Loop) -> None:
    """Ten thousand deadlines set and cancelled leave a small heap, and the live one in it."""
    ran = threading.Event()
    live = loop.call_later(0.3, ran.set)
    for _ in range(10_000):
        loop.cancel(loop.call_later(60, lambda: None))
    assert len(loop._timers) < 200
    assert ran.wait(5)
    loop.cancel(live)


# The thread


Ask = Callable[[Loop, Callable[[], object]], Callable[[], object]]
"""Has a callback called at once; returns what ends that."""


def by_hang_up(loop: Loop, callback: Callable[[], object]) -> Callable[[], object]:
    ours, theirs = socket.socketpair()
    watch = loop.watch(ours, callback)
    theirs.close()
    return lambda: (watch.release(), ours.close())


def by_reading(loop: Loop, callback: Callable[[], object]) -> Callable[[], object]:
    reading = readable(loop, lambda ours: (ours.recv(9), callback()))
    reading.__enter__().send(b"x")
    return lambda: reading.__exit__(None, None, None)


def by_timer(loop: Loop, callback: Callable[[], object]) -> Callable[[], object]:
    timer = loop.call_later(0.0, callback)
    return lambda: loop.cancel(timer)


def by_soon(loop: Loop, callback: Callable[[], object]) -> Callable[[], object]:
    loop.call_soon(callback)
    return lambda: None


@pytest.mark.parametrize("ask", [by_hang_up, by_reading, by_timer, by_soon])
def test_a_callback_that_raises_does_not_end_the_loop(
    loop: Loop, capfd: pytest.CaptureFixture[str], ask: Ask
) -> None:
    """Every stop depends on the thread: a fault is written to stderr, and the loop goes on."""
    ends: list[Callable[[], object]] = []
    for _ in range(2):
        ends.append(ask(loop, lambda: [][0]))
        settled(loop)
    settled(loop)
    for end in ends:
        end()
    assert capfd.readouterr().err.count("IndexError") == 2


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_the_thread_starts_when_first_needed_and_is_one(loop: Loop) -> None:
    """No thread before the first use, so none is lost in a fork; one for any number of uses."""
    assert threads_named("chatstream-loop") == []
    for _ in range(5):
        settled(loop)
    assert len(threads_named("chatstream-loop")) == 1


def test_many_first_uses_at_once_start_one_thread(loop: Loop) -> None:
    """The first requests of a worker come together: one thread starts."""
    barrier = threading.Barrier(16)
    threads = [threading.Thread(target=lambda: (barrier.wait(5), settled(loop))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(threads_named("chatstream-loop")) == 1


def test_a_thread_that_could_not_start_is_started_later(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of threads, the first use fails; it does not leave a loop that nothing runs."""

    def exhausted(target: Callable[[], None], name: str) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(native, "start_thread", exhausted)
        with pytest.raises((RuntimeError, Busy)):
            loop.call_later(0.0, lambda: None)
    settled(loop)


def test_stop_ends_the_thread_and_closes_what_it_held(loop: Loop) -> None:
    """After `stop` neither thread nor descriptors are left; stopping twice, or unused, is fine."""
    before = descriptors()
    loop.stop()
    ours, theirs = socket.socketpair()
    watch = loop.watch(ours, lambda: None)
    timer = loop.call_later(60, lambda: None)
    loop.stop()
    loop.stop()
    eventually(lambda: not threads_named("chatstream-loop"))
    loop.cancel(timer)
    watch.release()
    ours.close()
    theirs.close()
    eventually(lambda: descriptors() == before)


def test_a_stopped_loop_forgets(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """What was watched, read, due or soon before `stop` is not called after a new start."""
    server, client = pair
    called: list[str] = []
    watch = loop.watch(server, lambda: called.append("hang-up"))
    with readable(loop, lambda ours: called.append("read")) as theirs:
        busy, go = threading.Event(), threading.Event()
        loop.call_soon(lambda: (busy.set(), go.wait(5)))
        assert busy.wait(5)
        loop.call_soon(lambda: called.append("soon"))
        loop.call_later(0.05, lambda: called.append("timer"))
        loop.stop()
        go.set()
        eventually(lambda: not threads_named("chatstream-loop"))
        theirs.send(b"x")
        client.close()
        done = threading.Event()
        loop.call_later(0.15, done.set)
        assert done.wait(5)
    assert called == []
    with readable(loop, lambda ours: called.append(ours.recv(9).decode())) as theirs:
        theirs.send(b"read again")
        eventually(lambda: called == ["read agai"])
    watch.release()


def test_a_loop_started_right_after_its_stop_has_one_thread(loop: Loop) -> None:
    """A start that overtakes the old thread's end leaves one thread, and the next stop none."""
    busy, go = threading.Event(), threading.Event()
    loop.call_later(0.0, lambda: (busy.set(), go.wait(5)))
    assert busy.wait(5)
    loop.stop()
    ran = threading.Event()
    loop.call_later(0.0, ran.set)  # the old thread has not noticed yet
    assert ran.wait(5)
    go.set()
    eventually(lambda: len(threads_named("chatstream-loop")) == 1)
    loop.stop()
    eventually(lambda: not threads_named("chatstream-loop"))


def test_a_stop_in_the_middle_of_a_start(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by another thread while its own is being started, a loop works at its next use."""
    start_thread = native.start_thread

    stopper = threading.Thread(target=loop.stop)

    def overtaken(target: Callable[[], None], name: str) -> None:
        stopper.start()
        stopper.join(0.2)  # it is done, or waits for the start to be
        start_thread(target, name)

    with monkeypatch.context() as patch:
        patch.setattr(native, "start_thread", overtaken)
        loop.call_later(0.0, lambda: None)
    stopper.join(5)
    settled(loop)
    eventually(lambda: len(threads_named("chatstream-loop")) == 1)


def test_starts_and_stops_can_race(loop: Loop) -> None:
    """Timers set while another thread stops the loop: no error, and nothing left in the end."""
    errors: list[BaseException] = []
    over = threading.Event()

    def stop_again_and_again() -> None:
        try:
            while not over.is_set():
                loop.stop()
        except BaseException as error:
            errors.append(error)

    stopper = threading.Thread(target=stop_again_and_again)
    stopper.start()
    try:
        for _ in range(500):
            loop.call_later(0.0, lambda: None)
    finally:
        over.set()
        stopper.join(5)
    assert errors == []


def switches(thread_id: int) -> int:
    with open(f"/proc/self/task/{thread_id}/status") as status:
        return sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)


def test_an_idle_loop_sleeps(loop: Loop) -> None:
    """With clients to watch and clocks far away the loop does not wake: no polling."""
    ids: list[int] = []
    loop.call_later(0.0, lambda: ids.append(threading.get_native_id()))
    pairs = [socket.socketpair() for _ in range(50)]
    watches = [loop.watch(ours, lambda: None) for ours, _ in pairs]
    far = loop.call_later(60, lambda: None)
    settled(loop)
    before = switches(ids[0])
    threading.Event().wait(0.5)  # this time itself is what is measured
    assert switches(ids[0]) - before <= 1
    loop.cancel(far)
    for watch, (ours, theirs) in zip(watches, pairs, strict=True):
        watch.release()
        ours.close()
        theirs.close()


FORK = """
import os, socket, sys, threading
from chatstream.sockets.loop import Loop

loop = Loop()
called = []
ours, theirs = socket.socketpair()
watch = loop.watch(ours, lambda: called.append("inherited"))
first = threading.Event()
loop.call_later(0, first.set)
assert first.wait(5)
late = loop.call_later(0.1, lambda: called.append("timer"))

pid = os.fork()
a, b = socket.socketpair()
done, left = threading.Event(), threading.Event()
mine = loop.watch(a, left.set)
loop.call_later(0.2, done.set)
assert done.wait(5), "no timer"
b.close()
assert left.wait(5), "no hang-up"
mine.release()
loop.stop()
if pid == 0:
    assert called == [], called     # what the parent set is the parent's
    os._exit(42)
assert called == ["timer"], called
_, status = os.waitpid(pid, 0)
print("child", os.waitstatus_to_exitcode(status))
"""


def test_a_fork_starts_its_own(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Case 36: after a fork each process has a working loop, and the child none of the parent's."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=tmp_path,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "child 42\n", "")
