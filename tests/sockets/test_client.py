"""client: a client's socket, watched, and shut down if nothing moves. Real sockets, real time."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from chatstream.sockets import liveness
from chatstream.sockets.client import UNSENT, _send_queue
from chatstream.sockets.loop import Loop
from tests.conftest import eventually, fill
from tests.sockets.conftest import Connected, reset, settled, tcp_pair, unix_pair

pytestmark = pytest.mark.usefixtures("nothing_left")

PATIENCE = 0.2

SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it


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


# Clients that take nothing


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


# A writer that is stuck


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
