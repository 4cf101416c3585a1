"""What clients that linger cost the others: a cancel beside them, ours and gunicorn's own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from bench.client import Address, Connection, chat
from bench.rows import Row, Sizes, summary
from bench.systems import DETACHED, GEVENT, STREAM, System, cancel, up

THREADS = 16
CANCEL = 50.0
"""The issue's target, in ms."""

PATIENCE = 8.0
"""Seconds that an answer may take, to be one."""

_ATTEMPTS = 5  # batches of bad clients, each with a stream and its cancel
_HALF = b"POST /api/chat/stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
_HALF_BODY = _HALF + b'Content-Length: 1000\r\n\r\n{"messages": '
_CLOSE = b"POST /api/chat/cancel/nobody HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

_BEGINNINGS = {
    "silent": b"",
    "half a head": _HALF,
    "half a body": _HALF_BODY,
    "never close": _CLOSE,
}


_OWN = {DETACHED: "gthread", GEVENT: "gevent"}


def receiving(system: System, sizes: Sizes) -> Iterator[Row]:
    """A stream and its cancel over fresh connections, while others linger."""
    if system.name not in _OWN:
        return
    worker, settings = system.name, {"CHATSTREAM_THREADS": str(THREADS)}
    for whose in ("ours", "gunicorn's own"):
        if whose == "gunicorn's own":
            settings["GUNICORN_CMD_ARGS"] = f"--worker-class {_OWN[worker]}"
        with up(system, THREADS, settings=settings) as place:
            yield _row(worker, f"{whose}: nobody lingers", place.relay, lambda relay: [])
            for name, beginning in _BEGINNINGS.items():
                clients = _lingering(beginning, THREADS)
                yield _row(worker, f"{whose}: {THREADS} {name}", place.relay, clients)
            clients = _dripping(200)
            yield _row(worker, f"{whose}: 200 dripping", place.relay, clients)


def _row(
    worker: str, what: str, relay: Address, linger: Callable[[Address], list[socket.socket]]
) -> Row:
    times: list[tuple[float, float]] = []
    for number in range(_ATTEMPTS):
        others = linger(relay)
        time.sleep(0.2)  # until the server has taken them
        with contextlib.suppress(TimeoutError):
            times.append(_stream_and_cancel(relay, f"victim-{number}"))
        for other in others:
            other.close()
        time.sleep(0.2)
    firsts, cancels = ([pair[n] for pair in times] for n in (0, 1))
    figure = f"{len(times)} of {_ATTEMPTS} within {PATIENCE:g} s"
    figure += f", first event after {summary(firsts)[2]:.0f} ms at most" if times else ""
    spread = summary(cancels)
    if not what.startswith("ours"):
        return Row(worker, f"a cancel, {what}", figure, spread)
    met = len(times) == _ATTEMPTS and spread[2] <= CANCEL
    return Row(worker, f"a cancel, {what}", figure, spread, f"max ≤ {CANCEL:g}", met)


def _stream_and_cancel(relay: Address, name: str) -> tuple[float, float]:
    """ms to a stream's first event, and to the answer of its cancel."""
    began = time.perf_counter()
    with contextlib.closing(Connection(relay, timeout=PATIENCE)) as stream:
        stream.send(chat(STREAM, {"silent_after": 2, "rate": 100}, sessionId=name))
        stream.read_until(b"data: ")
        first = time.perf_counter()
        with contextlib.closing(Connection(relay, timeout=PATIENCE)) as other:
            asked = time.perf_counter()
            other.ask(cancel(name))
            return (first - began) * 1000, (time.perf_counter() - asked) * 1000


def _lingering(beginning: bytes, count: int) -> Callable[[Address], list[socket.socket]]:
    def linger(relay: Address) -> list[socket.socket]:
        others = [socket.create_connection(relay) for _ in range(count)]
        for other in others:
            other.sendall(beginning)
        return others

    return linger


def _dripping(count: int) -> Callable[[Address], list[socket.socket]]:
    def linger(relay: Address) -> list[socket.socket]:
        others = _lingering(_HALF_BODY, count)(relay)
        threading.Thread(target=_drip, args=(others,), daemon=True).start()
        return others

    return linger


def _drip(others: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # they were closed
        while True:
            for other in others:
                other.send(b" ")
            time.sleep(0.1)
