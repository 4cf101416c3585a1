"""handle: any thread can shut a socket down, in whatever phase its connection is."""

from __future__ import annotations

import socket
import threading

import pytest

from chatstream.sockets.handle import SocketHandle
from tests.conftest import descriptors

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_shutdown_wakes_a_blocked_reader(pair: tuple[socket.socket, socket.socket]) -> None:
    """A thread that sleeps in `recv` on the socket itself returns at once."""
    ours, _ = pair
    ours.settimeout(30)
    handle = SocketHandle(ours)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(ours.recv(1)))
    reader.start()
    handle.shutdown()
    reader.join(5)
    assert got == [b""]


def test_made_before_connect_it_reaches_the_connection() -> None:
    """So that no phase of a call is out of reach; before that there is nothing to shut down."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as ours:
        early, handle = SocketHandle(ours), SocketHandle(ours)
        early.shutdown()
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(5)
            handle.shutdown()
            assert theirs.recv(1) == b""


def test_closed_it_leaves_the_connection_as_it_is(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Its descriptor is given back; what comes after that finds nothing to shut down."""
    ours, theirs = pair
    before = descriptors()
    handle = SocketHandle(ours)
    assert descriptors() == before + 1
    handle.close()
    assert descriptors() == before
    handle.shutdown()
    ours.sendall(b"x")
    assert theirs.recv(1) == b"x"
