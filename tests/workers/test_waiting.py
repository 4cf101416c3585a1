"""waiting: who waits in a poller, and until when. With real sockets."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from chatstream.workers.arrival import Arrival
from chatstream.workers.waiting import GRAIN, Waiting, WaitingRoom

Enter = Callable[..., Waiting]
Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the instant, which is 0 at first."""

    def clock(now: float) -> None:
        monkeypatch.setattr("chatstream.workers.waiting.monotonic", lambda: now)

    clock(0)
    return clock


@pytest.fixture
def poller() -> Iterator[selectors.BaseSelector]:
    with contextlib.closing(selectors.DefaultSelector()) as poller:
        yield poller


@pytest.fixture
def room(poller: selectors.BaseSelector) -> WaitingRoom:
    return WaitingRoom(poller)


@pytest.fixture
def enter(room: WaitingRoom) -> Iterator[Enter]:
    """Has a connection, whose other end is its `client`, wait until `due`."""
    with contextlib.ExitStack() as stack:

        def enter(due: float, on_ready: Callable[[Waiting], Any] = lambda _: None) -> Waiting:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            waiting = Waiting(SimpleNamespace(sock=ours, client=theirs), due, on_ready)
            room.wait(waiting)
            return waiting

        yield enter


def events(poller: selectors.BaseSelector) -> list[Callable[[], object]]:
    """What is ready, each to be called as gunicorn does."""
    return [lambda key=key: key.data(key.fileobj) for key, _ in poller.select(5)]  # type: ignore[misc]


def test_an_event_for_what_has_ended(
    room: WaitingRoom, poller: selectors.BaseSelector, enter: Enter
) -> None:
    """Of two events that came together, the first may end whom the second is for."""
    ready: list[Waiting] = []

    def end_all(waiting: Waiting) -> None:
        ready.append(waiting)
        for each in list(room):
            room.forget(each)

    for one in [enter(60, end_all), enter(60, end_all)]:
        one.conn.client.send(b"GET")
    first, second = events(poller)
    first()
    second()
    assert len(ready) == 1
    assert not poller.get_map()


def test_who_listens_for_something_else(
    room: WaitingRoom, poller: selectors.BaseSelector, enter: Enter
) -> None:
    """A TLS handshake may want to write, and then to read again."""
    ready: list[Waiting] = []
    one = enter(60, ready.append)
    assert poller.select(0) == []
    room.listen(one, selectors.EVENT_WRITE)
    (event,) = events(poller)
    event()
    room.listen(one, selectors.EVENT_READ)
    assert poller.select(0) == []
    assert ready == [one]


def test_who_has_waited_too_long_is_out(
    room: WaitingRoom, poller: selectors.BaseSelector, enter: Enter, clock: Clock
) -> None:
    """And nobody else; until the next is due there is no need to look."""
    assert room.patience() == math.inf
    early, late, postponed = enter(10), enter(60), enter(10)
    room.postpone(postponed, 30)
    assert (room.patience(), room.expired()) == (10, [])
    clock(10)
    assert (room.patience(), room.expired()) == (0, [early])
    assert list(room) == [late, postponed]
    assert len(poller.get_map()) == 2
    assert room.patience() == 20


def test_those_that_wait_are_not_looked_through_all_the_time(
    room: WaitingRoom, enter: Enter, clock: Clock
) -> None:
    """Who is due just after another waits until a grain has passed."""
    one, other = enter(10), enter(10 + GRAIN / 4)
    clock(10)
    assert room.expired() == [one]
    clock(10 + GRAIN / 2)
    assert room.expired() == []
    assert room.patience() == pytest.approx(GRAIN / 2)
    clock(10 + GRAIN)
    assert room.expired() == [other]


def test_who_gives_way(room: WaitingRoom, enter: Enter) -> None:
    """Of those that ask for nothing, the first to come, also where it lingers; else nobody."""
    begun, idle, lingering = enter(60), enter(60), enter(60)
    begun.arrival, idle.arrival = Arrival(100), Arrival(100)
    begun.arrival.feed(b"GET")
    assert room.make_room() is idle.conn
    assert room.make_room() is lingering.conn
    assert room.make_room() is None
    assert list(room) == [begun]
