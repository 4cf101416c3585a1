"""A worker of a service, in a process of its own, which does what a test says.

    python -m tests.bus.worker      stdin is a socket: a command on every line, back comes an answer

    {"id": 1, "do": "claim", "with": {"session": "s", "stream": "a"}, "at": 123.4}
    {"id": 1, "value": false, "seconds": 0.001}        or "error": the class, code, status, message

Every command has a thread of its own, so many can be under way; `at` is the monotonic instant at
which it begins. The service, its bus and its streams are the real ones; the provider is never
called, since nobody walks the streams.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from chatstream import bus
from chatstream.bus import base, create
from chatstream.bus.base import Bus, Lives, Receive
from chatstream.bus.messages import Action, Answer, Request
from chatstream.bus.redis import redis_bus
from chatstream.service.service import Service
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop
from chatstream.stream.iterable import StreamIterable
from chatstream.stream.outcome import Cause
from chatstream.stream.stream import Stream


def rooms_with(name: str) -> list[ModuleType]:
    """The modules of the bus that have a constant, each for itself."""
    loaded = [module for room, module in sys.modules.items() if room.startswith("chatstream.bus.")]
    return [module for module in loaded if hasattr(module, name)]


class Worker:
    """The commands. `tests.bus.conftest.Worker` has the same methods in a test's process."""

    def __init__(self) -> None:
        self._member: Service
        self._bus: Bus
        self._received: list[str] = []
        self._streams: dict[str, StreamIterable] = {}
        self._crowd: list[Bus] = []
        self._lines = _Lines()
        logging.getLogger("chatstream").addHandler(self._lines)

    def join(
        self,
        settings: dict[str, Any],
        remember: float = base.REMEMBER,
        patience: float = base.PATIENCE,
    ) -> None:
        """Joins a service, with nothing left of an earlier one.

        Args:
            settings: The service's.
            remember: In the place of `REMEMBER`, which is too long for a test.
            patience: In the place of `PATIENCE`, where a test is not about it.
        """
        for name, value in (("REMEMBER", remember), ("PATIENCE", patience)):
            for module in rooms_with(name):
                setattr(module, name, value)
        self._streams, self._lines.lines, self._received = {}, [], []
        bus.create = self._create
        self._member = Service(Settings(max_streams=1000, **settings))
        self._member.start()

    def _create(
        self,
        settings: Settings,
        receive: Receive,
        loop: Loop,
        app: str = "0",
        lives: Lives | None = None,
    ) -> Bus:
        """A service's bus, which counts what other workers ask for."""

        def counting(request: Request) -> Answer:
            if request.origin:
                self._received.append(request.action.value)
            return receive(request)

        self._bus = create(settings, counting, loop, app, lives)
        return self._bus

    def claim(self, session: str, stream: str, owner: str) -> bool:
        new = self._member.open(b"{}", session_id=session, stream_id=stream, owner=owner)
        self._streams[stream] = new
        return new.stream.cause is Cause.CANCEL

    def complete(self, stream: str) -> None:
        self._streams[stream].stream.complete()

    def release(self, stream: str) -> None:
        self._streams[stream].stream.complete()
        self._streams[stream].close()

    def cancel(self, session: str, stream: str | None, owner: str) -> bool:
        return self._member.abort(session, stream, owner=owner)

    def cancel_elsewhere(self, session: str, stream: str | None, owner: str) -> bool:
        """`cancel`, without a look at this process."""
        request = Request(Action.CANCEL, owner, session, stream)
        return self._bus.cancel_elsewhere(request)

    def claim_many(self, count: int) -> None:
        """Begins so many, each of a session and with names of a length that a page has few of."""
        for number in range(count):
            self.claim(f"{'s' * 100}{number}", f"{'a' * 100}{number}", "many")

    def sessions(self, owner: str | None) -> list[Any]:
        """For each worker: its pid, whether it answered, and the ids of its streams."""
        found = self._member.sessions(owner).workers
        return [
            [each.worker.pid, each.answered, [live.name.stream_id for live in each.streams]]
            for each in found
        ]

    def cancel_all(self, owner: str | None) -> list[Any]:
        """As `sessions`, of what it has stopped."""
        found = self._member.cancel_all(owner).workers
        return [
            [each.worker.pid, each.answered, [live.name.stream_id for live in each.streams]]
            for each in found
        ]

    def check(self) -> None:
        self._member.check_bus()

    def endings(self) -> dict[str, str]:
        streams = list(self._streams.items())  # other commands may be adding some
        return {name: _ending(iterable.stream) for name, iterable in streams}

    def log(self) -> list[str]:
        return list(self._lines.lines)

    def received(self) -> list[str]:
        return list(self._received)

    def crowd(self, url: str, prefix: str, count: int) -> None:
        """Joins a Redis `count` times more, as workers that have no stream."""
        for _ in range(count):
            self._crowd.append(redis_bus.RedisBus(_absent, url, prefix=prefix, ttl=45.0))
            self._crowd[-1].start()

    def hold_up(self, fifo: str) -> None:
        """Keeps this thread, and under gevent all greenlets, until somebody has closed `fifo`."""
        Path(fifo).read_bytes()

    def leave(self) -> None:
        for iterable in self._streams.values():
            iterable.close()
        self.stop()

    def stop(self) -> None:
        """What a worker's end does: streams are aborted, and the bus is left."""
        for each in self._crowd:
            each.close()
        self._crowd.clear()
        self._member.stop()


def _absent(request: Request) -> Answer:
    return Answer.ABSENT


def _ending(stream: Stream) -> str:
    if not stream.ended:
        return "live"
    return stream.cause.value if stream.cause is not None else "completed"


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def _serve(sock: socket.socket) -> None:
    worker = Worker()
    sending = threading.Lock()

    def obey(id: int, do: str, at: float, arguments: dict[str, Any]) -> None:
        time.sleep(max(0.0, at - time.monotonic()))
        answer = {"id": id, **_outcome(getattr(worker, do), arguments)}
        with sending:
            sock.sendall(json.dumps(answer).encode() + b"\n")

    for line in sock.makefile("rb"):
        command = json.loads(line)
        words = (command["id"], command["do"], command["at"], command["with"])
        threading.Thread(target=obey, args=words, daemon=True).start()


def _outcome(method: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        result = {"value": method(**arguments)}
    except Exception as error:
        what = {"code": getattr(error, "code", ""), "status": getattr(error, "status", 0)}
        result = {"error": {"class": type(error).__name__, "message": str(error), **what}}
    return {**result, "seconds": time.monotonic() - begun}


if __name__ == "__main__":
    _serve(socket.socket(fileno=os.dup(0)))
