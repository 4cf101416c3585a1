"""Many streams in one thread of one process: cheap, and apart from the process that measures.

`python -m bench.load ORDER` prints a line of JSON once every stream has its first event, and one
for every line on standard input. It ends when that is closed.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import sys
import time
from typing import Any

from bench.client import chat

_PACE = 0.00525
"""Seconds between two beginnings: no part of 50 ms, so that the streams' tokens come in no step."""

_BEGINNING = 20
"""Streams that may wait for their first event at once."""


class _Streams:
    def __init__(self, order: dict[str, Any]) -> None:
        self._address = tuple(order["address"])
        self._request = chat("/api/chat/stream", order["simulate"])
        self._left = order["streams"]
        self._next = time.monotonic()
        self._epoll = select.epoll()
        self._epoll.register(0, select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._beginning: dict[int, bytes] = {}  # what came before the first event
        self._events = 0
        self._ended: list[str] = []

    def run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(self._begin()):
                if fd:
                    self._receive(fd)
                elif sys.stdin.readline():
                    self._report()
                else:
                    return

    def _begin(self) -> float:
        """Begins a stream if it is time; returns how long to wait for the next."""
        if not self._left or len(self._beginning) >= _BEGINNING:
            return -1
        if (wait := self._next - time.monotonic()) > 0:
            return wait
        self._next = time.monotonic() + _PACE
        self._left -= 1
        sock = socket.create_connection(self._address)
        sock.setblocking(False)
        sock.sendall(self._request)
        self._sockets[sock.fileno()] = sock
        self._beginning[sock.fileno()] = b""
        self._epoll.register(sock, select.EPOLLIN)
        return _PACE

    def _receive(self, fd: int) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = self._sockets[fd].recv(65536)
        self._events += data.count(b"data: ")  # the relay sends an event in one piece
        if fd in self._beginning:
            self._beginning[fd] += data
            if b"data: " in self._beginning[fd] or not data:
                self._ended += [] if data else [self._beginning[fd].decode()]
                del self._beginning[fd]
                if not self._beginning and not self._left:
                    self._report()
        elif not data:
            self._ended.append("closed")
        if not data:
            self._epoll.unregister(fd)

    def _report(self) -> None:
        print(json.dumps({"events": self._events, "ended": self._ended[:9]}), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _Streams(json.loads(sys.argv[1])).run()
