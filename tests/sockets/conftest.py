"""A loop, and two ends of a connection. What a test leaves behind fails it."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from chatstream.sockets.loop import Loop

Connected = Callable[[], AbstractContextManager[tuple[socket.socket, socket.socket]]]


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
