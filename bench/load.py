"""Many streams in one thread of one process: cheap, and apart from the process that measures.

`python -m bench.load ORDER` prints a line of JSON once no stream waits for its first event any
more, and one for every line on standard input. It ends when that is closed.
"""

from __future__ import annotations

import contextlib
import json
import re
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

_RECEIVE = 262_144
_STAMP = re.compile(rb"@(\d{20})")
_RESOLUTION = 10_000  # ns: latencies are counted, not kept


class _Streams:
    def __init__(self, order: dict[str, Any]) -> None:
        self._address = tuple(order["address"])
        self._request = chat(order["path"], order["simulate"])
        self._stamped = bool(order["simulate"].get("stamp"))
        self._patience = order["patience"]
        self._pace: float = order.get("pace", _PACE)
        self._left = order["streams"]
        self._next = time.monotonic()
        self._within = order["within"]
        self._until = self._next + self._within
        self._epoll = select.epoll()
        self._epoll.register(0, select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._beginning: dict[int, tuple[float, bytes]] = {}  # since when, what came
        self._held = 0
        self._events = self._bytes = 0
        self._delays: dict[int, int] = {}  # in units of the resolution: how many
        self._ended: list[str] = []

    def run(self) -> None:
        if not self._left:
            self._report()
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
        now = time.monotonic()
        if self._beginning and now > next(iter(self._beginning.values()))[0] + self._patience:
            self._give_up()
        if self._left and now > self._until:
            self._ended.append(f"{self._left} not begun within {self._within:g} s")
            self._left = 0
            if not self._beginning:
                self._report()
        if not self._left or len(self._beginning) >= _BEGINNING:
            return 0.5 if self._beginning else -1
        if (wait := self._next - now) > 0:
            return wait
        self._next = now + self._pace
        self._left -= 1
        sock = socket.create_connection(self._address)
        sock.setblocking(False)
        sock.sendall(self._request)
        self._sockets[sock.fileno()] = sock
        self._beginning[sock.fileno()] = (now, b"")
        self._epoll.register(sock, select.EPOLLIN)
        return self._pace

    def _give_up(self) -> None:
        """The first of those that wait has waited too long: begins no more."""
        self._ended.append(f"no first event within {self._patience:g} s")
        for fd in self._beginning:
            self._epoll.unregister(fd)
            self._sockets[fd].close()
        self._beginning.clear()
        self._left = 0
        self._report()

    def _receive(self, fd: int) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = self._sockets[fd].recv(_RECEIVE)
        if fd in self._beginning:
            self._begun(fd, data)
        elif not data:
            self._held -= 1
            self._ended.append("closed")
        self._events += data.count(b"data: ")  # a relay sends an event in one piece
        self._bytes += len(data)
        if self._stamped:
            now = time.monotonic_ns()
            for stamp in _STAMP.findall(data):
                delay = (now - int(stamp)) // _RESOLUTION
                self._delays[delay] = self._delays.get(delay, 0) + 1
        if not data:
            self._epoll.unregister(fd)

    def _begun(self, fd: int, data: bytes) -> None:
        since, before = self._beginning[fd]
        self._beginning[fd] = (since, before + data)
        if b"data: " not in before + data and data:
            return
        self._held += bool(data)
        if not data:  # refused
            self._ended.append((before or b"nothing was sent").decode(errors="replace")[:300])
            self._left = 0
        del self._beginning[fd]
        if not self._beginning and not self._left:
            self._report()

    def _report(self) -> None:
        figures = {
            "ns": time.monotonic_ns(),
            "events": self._events,
            "bytes": self._bytes,
            "held": self._held,
            "ended": self._ended[:9],
            "delays": [[unit * _RESOLUTION, count] for unit, count in self._delays.items()],
        }
        self._delays.clear()
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _Streams(json.loads(sys.argv[1])).run()
