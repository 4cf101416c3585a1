"""loop: the one native thread that waits on sockets and clocks. Real sockets, real time."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import pytest

from chatstream.errors import Busy
from chatstream.sockets import liveness, native
from chatstream.sockets.client import UNSENT, _send_queue
from chatstream.sockets.loop import Loop
from tests.conftest import eventually, fill

PATIENCE = 0.2

SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it

Connected = Callable[[], AbstractContextManager[tuple[socket.socket, socket.socket]]]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a descriptor behind."""
    fds, threads = len(descriptors()), set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= threads, "threads as before")
    eventually(lambda: len(descriptors()) <= fds, "descriptors as before")


@pytest.fixture
def loop(nothing_left: None) -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.stop()


@pytest.fixture
def pair(nothing_left: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection: the server's end and the client's."""
    with tcp_pair() as (server, client):
        yield server, client


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with server, client:
        yield server, client


@contextmanager
def unix_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    server, client = socket.socketpair()
    with server, client:
        yield server, client


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """The process can open `count` more descriptors; then EMFILE."""
    probes = [os.dup(0) for _ in range(count + 1)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for probe in probes:
        os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probes[-1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def settled(loop: Loop) -> None:
    """Returns when the loop has done what it had to do up to now."""
    for _ in range(2):
        done = threading.Event()
        loop.call_later(0.0, done.set)
        assert done.wait(5)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# Clients that leave

WAYS = {
    "FIN": lambda sock: sock.close(),
    "RST": reset,
    "half-close": lambda sock: sock.shutdown(socket.SHUT_WR),
    "pipelined bytes then close": lambda sock: (sock.sendall(b"GET / HTTP/1.1\r\n"), sock.close()),
}


@pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
def test_a_client_that_leaves_is_noticed(
    loop: Loop,
    pair: tuple[socket.socket, socket.socket],
    leave: Callable[[socket.socket], object],
) -> None:
    """Case 12: each way of leaving calls back, once, without a write and without a ping."""
    server, client = pair
    calls: list[int] = []
    called = threading.Event()
    watch = loop.watch(server, lambda: (calls.append(threading.get_ident()), called.set()))
    settled(loop)
    assert calls == []
    leave(client)
    assert called.wait(5)
    settled(loop)
    assert len(calls) == 1
    assert threading.get_ident() not in calls
    watch.release()


def test_a_client_that_left_before_the_watch_is_noticed(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Case 14: a client that is gone when the watch begins is noticed at once."""
    server, client = pair
    client.close()
    called = threading.Event()
    watch = loop.watch(server, called.set)
    assert called.wait(5)
    watch.release()


@pytest.mark.parametrize("make", [tcp_pair, unix_pair])
def test_a_watched_client_is_noticed_when_it_vanishes(loop: Loop, make: Connected) -> None:
    """The kernel probes it while it is watched; what it had of options is back after that."""
    with make() as (server, _):
        is_tcp = server.family == socket.AF_INET
        before = server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        watch = loop.watch(server, lambda: None)
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == is_tcp
        watch.release()
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == before


def test_the_next_request_has_the_connections_own_send_buffer(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """What waits for a client is bounded while it has a stream, not when it has a download."""
    unsent = (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    before = pair[0].getsockopt(*unsent)
    watch = loop.watch(pair[0], lambda: None)
    assert pair[0].getsockopt(*unsent) == UNSENT
    watch.release()
    assert pair[0].getsockopt(*unsent) == before


def test_a_client_that_vanished(
    loop: Loop, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel says, until the socket is released: its number may be another's then.

    What the kernel is asked has tests of its own, and one with a link that goes down.
    """
    watch = loop.watch(pair[0], lambda: None)
    assert not watch.vanished()
    monkeypatch.setattr(liveness, "has_vanished", lambda sock: sock.fileno() == watch.fd)
    assert watch.vanished()
    watch.release()
    assert not watch.vanished()


@pytest.mark.parametrize("make", [tcp_pair, unix_pair])
def test_a_client_that_takes_no_bytes_has_stalled(loop: Loop, make: Connected) -> None:
    """Once it took none between two looks that are so far apart, and some wait for it."""
    with make() as (server, client):
        watch = loop.watch(server, lambda: None)
        assert not watch.stalled(0.05)
        fill(server)
        assert not watch.stalled(0.05), "it was not seen before"
        eventually(lambda: watch.stalled(0.05), "the stall")
        client.recv(1 << 20)
        fill(server)
        eventually(lambda: not watch.stalled(30.0), "it took some")
        watch.release()
        assert not watch.stalled(0.0)


def deafen(sock: socket.socket) -> None:
    """From now on `sock` gets nothing: a classic BPF program that returns 0 (socket(7))."""
    instruction = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def test_a_client_whose_first_acknowledgement_is_on_its_way_has_not_stalled(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A look that comes right after the first bytes of a connection has seen nothing yet."""
    server, client = pair
    watch = loop.watch(server, lambda: None)
    deafen(client)
    server.sendall(b"the first bytes")
    assert not watch.stalled(30.0)
    eventually(lambda: watch.stalled(0.1), "the stall, in time")
    watch.release()


def test_what_was_sent_after_a_silence_has_its_time(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """That nothing was taken while nothing was sent does not count."""
    server, client = pair
    watch = loop.watch(server, lambda: None)
    server.sendall(b"all there is")
    eventually(lambda: not _send_queue(watch._sock), "its acknowledgement")
    assert not watch.stalled(0.05)
    until = time.monotonic() + 0.1
    eventually(lambda: time.monotonic() > until)
    deafen(client)
    server.sendall(b"more")
    assert not watch.stalled(0.05)
    eventually(lambda: watch.stalled(0.05), "the stall, in time")
    watch.release()


def test_a_client_for_whom_nothing_waits_has_not_stalled(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """It has taken all there is, however long ago that was."""
    watch = loop.watch(pair[0], lambda: None)
    pair[0].sendall(b"all there is")
    eventually(lambda: not _send_queue(watch._sock), "its acknowledgement")
    assert not watch.stalled(0.0)
    until = time.monotonic() + 0.1
    eventually(lambda: time.monotonic() > until)
    assert not watch.stalled(0.05)
    watch.release()


def test_a_shutdown_wakes_who_writes(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """The server's thread comes back from its write; after `release` nothing happens."""
    server, _ = pair
    watch = loop.watch(server, lambda: None)
    fill(server)
    server.setblocking(True)
    woken = threading.Event()

    def write() -> None:
        with suppress(OSError):
            server.sendall(bytes(1 << 24))
        woken.set()

    threading.Thread(target=write, daemon=True).start()
    watch.shutdown()
    assert woken.wait(5)
    watch.release()
    watch.shutdown()


def test_little_waits_for_a_client(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """The kernel takes no more than it can send, and 64 KB."""
    watch = loop.watch(pair[0], lambda: None)
    assert pair[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT
    watch.release()


def test_a_client_that_sends_has_not_left(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Bytes of a next request are no hang-up, and the loop does not take them from the server."""
    server, client = pair
    called = threading.Event()
    watch = loop.watch(server, called.set)
    client.sendall(b"GET / HTTP/1.1\r\n")
    settled(loop)
    assert not called.is_set()
    assert server.recv(100) == b"GET / HTTP/1.1\r\n"
    watch.release()


def test_each_client_has_its_own_watch(loop: Loop) -> None:
    """Of many clients only the one that left is reported."""
    left: list[int] = []
    event = threading.Event()
    pairs = [socket.socketpair() for _ in range(20)]
    watches = [
        loop.watch(ours, lambda n=n: (left.append(n), event.set()))  # type: ignore[misc]
        for n, (ours, _) in enumerate(pairs)
    ]
    pairs[7][1].close()
    assert event.wait(5)
    settled(loop)
    assert left == [7]
    for watch, (ours, theirs) in zip(watches, pairs, strict=True):
        watch.release()
        ours.close()
        theirs.close()


def test_a_released_watch_is_never_called(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """After `release` a client may leave unnoticed: the next request's stream is another's."""
    server, client = pair
    called = threading.Event()
    loop.watch(server, called.set).release()
    client.close()
    settled(loop)
    assert not called.is_set()


def test_release_leaves_the_connection_as_it_is(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A kept-alive connection carries the next request after the watch is gone."""
    server, client = pair
    watch = loop.watch(server, lambda: None)
    watch.release()
    watch.release()
    client.sendall(b"next")
    assert server.recv(10) == b"next"
    server.sendall(b"answer")
    assert client.recv(10) == b"answer"


def test_release_is_possible_from_the_callback(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A callback may release its own watch, and anybody may do so once more."""
    server, client = pair
    released = threading.Event()
    watches = []
    watches.append(loop.watch(server, lambda: (watches[0].release(), released.set())))
    client.close()
    assert released.wait(5)
    watches[0].release()


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


def test_a_reader_that_raises_does_not_end_the_loop(
    loop: Loop, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is told on standard error, and called again for what comes next."""
    seen: list[bytes] = []

    def callback(ours: socket.socket) -> None:
        seen.append(ours.recv(9))
        raise ValueError("in a reader")

    with readable(loop, callback) as theirs:
        for data in (b"1", b"2"):
            theirs.send(data)
            eventually(lambda data=data: seen[-1:] == [data])  # type: ignore[misc]
        settled(loop)
    assert capfd.readouterr().err.count("ValueError: in a reader") == 2


def test_a_stopped_loop_reads_no_more(loop: Loop) -> None:
    """Readers are forgotten with all the rest, and can be there again when it is."""
    seen: list[bytes] = []
    with readable(loop, lambda ours: seen.append(ours.recv(9))) as theirs:
        loop.stop()
        theirs.send(b"x")
        settled(loop)  # started again
        assert seen == []
    with readable(loop, lambda ours: seen.append(ours.recv(9))) as theirs:
        theirs.send(b"y")
        eventually(lambda: seen == [b"y"])


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


def test_what_is_soon_and_fails(loop: Loop, capfd: pytest.CaptureFixture[str]) -> None:
    """It is told on standard error, and what comes after it runs."""
    ran = threading.Event()
    loop.call_soon(lambda: [][0])
    loop.call_soon(ran.set)
    assert ran.wait(5)
    assert "IndexError" in capfd.readouterr().err


def test_what_was_soon_is_forgotten_by_a_stop(loop: Loop) -> None:
    """As timers are."""
    busy, go = threading.Event(), threading.Event()
    ran: list[str] = []
    loop.call_soon(lambda: (busy.set(), go.wait(5)))
    assert busy.wait(5)
    loop.call_soon(lambda: ran.append("soon"))
    loop.stop()
    go.set()
    settled(loop)
    assert ran == []


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


def test_a_callback_that_raises_does_not_end_the_loop(
    loop: Loop, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every stop depends on the thread: a fault is written to stderr, and the loop goes on."""
    ours, theirs = socket.socketpair()
    watch = loop.watch(ours, lambda: 1 // 0)
    loop.call_later(0.0, lambda: [][0])
    theirs.close()
    settled(loop)
    ran = threading.Event()
    loop.call_later(0.0, ran.set)
    assert ran.wait(5)
    err = capfd.readouterr().err
    assert "ZeroDivisionError" in err
    assert "IndexError" in err
    watch.release()
    ours.close()


# A client that takes no bytes


class Writer:
    """A thread that writes to a socket until that fails, as a server's does."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.ended = threading.Event()
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._sock.sendall(b"x" * 65536)
        except OSError:
            self.ended_at = time.monotonic()
            self.ended.set()

    def join(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)


@contextmanager
def stuck_writer(server: socket.socket) -> Iterator[Writer]:
    """A writer to `server`; hands it over once the kernel takes no more."""
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    writer = Writer(server)
    poll = select.poll()
    poll.register(server, select.POLLOUT)
    try:
        eventually(lambda: not poll.poll(0))
        yield writer
    finally:
        try:
            writer.join()
        except OSError:  # shut down already
            writer._thread.join(5)


@pytest.mark.parametrize("connected", [tcp_pair, unix_pair])
def test_a_peer_that_takes_nothing_is_shut_down(loop: Loop, connected: Connected) -> None:
    """A writer stuck on a client that does not read is freed, and the client sees the end."""
    with connected() as (server, client), stuck_writer(server) as writer:
        watch = loop.watch(server, lambda: None)
        assert not writer.ended.wait(3 * PATIENCE)  # nothing but expect_end does it
        watch.expect_end(PATIENCE)
        assert writer.ended.wait(5)
        client.settimeout(5)
        while client.recv(1 << 20):
            pass
        watch.release()


def test_it_is_shut_down_after_its_patience_not_twice_that(loop: Loop) -> None:
    """The patience is counted from `expect_end`: 2 s without a byte taken are 2 s, not 4."""
    # Not TCP: its receiver goes on acknowledging for some 0.3 s after the sender got stuck.
    with unix_pair() as (server, _), stuck_writer(server) as writer:
        watch = loop.watch(server, lambda: None)
        begin = time.monotonic()
        watch.expect_end(0.5)
        assert writer.ended.wait(5)
        assert 0.5 <= writer.ended_at - begin < 0.9
        watch.release()


def test_a_peer_that_keeps_reading_is_left_alone(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A slow client that takes bytes all the time is not shut down, however full the buffers."""
    server, client = pair
    stop, five_times = threading.Event(), threading.Event()

    def read() -> None:
        while not stop.wait(0.01):
            client.recv(65536)

    with stuck_writer(server) as writer:
        reader = threading.Thread(target=read)
        reader.start()
        watch = loop.watch(server, lambda: None)
        watch.expect_end(PATIENCE)
        loop.call_later(5 * PATIENCE, five_times.set)
        assert five_times.wait(5)
        assert not writer.ended.is_set()
        stop.set()
        reader.join(5)
        assert writer.ended.wait(5)  # and is, once it has stopped reading
        watch.release()


def test_a_peer_that_has_taken_all_is_left_alone(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A silent client with nothing waiting for it owes nothing: its connection lives on."""
    server, client = pair
    watch = loop.watch(server, lambda: None)
    watch.expect_end(0.05)
    later = threading.Event()
    loop.call_later(0.3, later.set)
    assert later.wait(5)
    server.sendall(b"next")
    assert client.recv(10) == b"next"
    watch.release()


def test_a_released_socket_is_not_shut_down(loop: Loop) -> None:
    """`release` ends the patience too: the connection may carry another response by then."""
    with tcp_pair() as (server, _), stuck_writer(server) as writer:
        watch = loop.watch(server, lambda: None)
        watch.expect_end(0.05)
        watch.release()
        watch.expect_end(0.05)
        later = threading.Event()
        loop.call_later(0.3, later.set)
        assert later.wait(5)
        assert not writer.ended.is_set()


def test_patience_ends_with_its_watch(loop: Loop) -> None:
    """Stopped streams whose clients were let go leave no timers behind."""
    with unix_pair() as (server, _):
        for _ in range(300):
            watch = loop.watch(server, lambda: None)
            watch.expect_end(60)
            watch.release()
    assert len(loop._timers) < 150


# The thread


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
    before = len(descriptors())
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
    eventually(lambda: len(descriptors()) == before)


def test_a_stopped_loop_forgets(loop: Loop) -> None:
    """What was watched or due before `stop` is not called after a new start."""
    ours, theirs = socket.socketpair()
    called: list[str] = []
    watch = loop.watch(ours, lambda: called.append("hang-up"))
    loop.call_later(0.05, lambda: called.append("timer"))
    loop.stop()
    eventually(lambda: not threads_named("chatstream-loop"))
    theirs.close()
    done = threading.Event()
    loop.call_later(0.15, done.set)
    assert done.wait(5)
    assert called == []
    watch.release()
    ours.close()


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
