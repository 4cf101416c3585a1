"""lookout: one look at all clients, again and again, in the loop's thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from chatstream import Cause
from chatstream.service import lookout
from chatstream.service.lookout import Lookout
from chatstream.stream.stream import Stream


class StuckClient:
    """The client's socket, as the loop watches it."""

    def __init__(self, *, stalled: bool = False, vanished: bool = False) -> None:
        self._stalled, self._vanished = stalled, vanished
        self.asked: list[float] = []
        self.shut = False

    def stalled(self, timeout: float) -> bool:
        self.asked.append(timeout)
        return self._stalled

    def vanished(self) -> bool:
        return self._vanished

    def shutdown(self) -> None:
        self.shut = True

    def expect_end(self, patience: float) -> None: ...

    def release(self) -> None: ...


class Turns:
    """A loop that runs nothing by itself."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], object]] = []
        self.later: list[tuple[float, Callable[[], object]]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        self.later.append((delay, callback))

    @property
    def delays(self) -> list[float]:
        return [delay for delay, _ in self.later]


def streams(*clients: StuckClient | None) -> list[Stream]:
    made = []
    for number, client in enumerate(clients):
        stream = Stream("s", f"t-{number}")
        stream.client = client
        made.append(stream)
    return made


def look(held: list[Stream], timeout: float = 60, turns: Any = None) -> Lookout:
    made = Lookout(turns or Turns(), lambda: held)
    made.begin(timeout)
    return made


@pytest.mark.parametrize(
    ("client", "cause"),
    [
        (StuckClient(stalled=True), Cause.STALLED),
        (StuckClient(vanished=True), Cause.CLIENT),
        (StuckClient(stalled=True, vanished=True), Cause.CLIENT),
        (StuckClient(), None),
        (None, None),
    ],
)
def test_clients_are_looked_at(client: StuckClient | None, cause: Cause | None) -> None:
    """One that takes no bytes has STALLED, one that vanished is gone; its socket is shut down."""
    [stream] = held = streams(client)
    look(held)
    assert stream.cause is cause
    assert client is None or client.shut == (cause is not None)


def test_a_client_that_left_its_stream_is_not_asked_again() -> None:
    """Who is known to be gone needs no look, and the stream goes on without it."""
    client = StuckClient(stalled=True)
    [stream] = held = streams(client)
    stream.outlives_client = True
    stream.client_gone()
    look(held)
    assert (client.asked, client.shut, stream.ended) == ([], False, False)


@pytest.mark.parametrize("vanished", [True, False])
def test_a_stream_that_outlives_its_client_goes_on(vanished: bool) -> None:
    """Its socket is shut down all the same, so that nothing waits for it to take bytes."""
    client = StuckClient(stalled=not vanished, vanished=vanished)
    [stream] = held = streams(client)
    stream.outlives_client = True
    look(held)
    assert (stream.unattended, stream.ended, client.shut) == (True, False, True)


@pytest.mark.parametrize(("timeout", "interval"), [(30, 7.5), (600, 7.5), (2, 0.5)])
def test_how_often_clients_are_looked_at(timeout: float, interval: float) -> None:
    """So that 30 s are at most 37.5, and one that vanished is noticed however long they are."""
    turns = Turns()
    client = StuckClient()
    look(streams(client), timeout, turns)
    assert turns.delays == [interval]
    turns.later.pop()[1]()
    assert (turns.delays, client.asked) == ([interval], [timeout, timeout])


def test_many_clients_are_looked_at_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many at a time: between two turns the loop does what else it has to. Then it rests."""
    monkeypatch.setattr(lookout, "LOOKS", 4)
    clients = [StuckClient() for _ in range(10)]
    turns = Turns()
    look(streams(*clients), turns=turns)
    for expected in (4, 8):
        asked = sum(len(client.asked) for client in clients)
        assert (asked, len(turns.soon), turns.delays) == (expected, 1, [])
        turns.soon.pop()()
    assert [client.asked for client in clients] == [[60]] * 10
    assert (turns.soon, turns.delays) == ([], [7.5])


@pytest.mark.parametrize(("looks", "soon", "later"), [(1, 1, 0), (2, 0, 1)])
def test_one_that_cannot_be_looked_at_hides_no_other_for_ever(
    monkeypatch: pytest.MonkeyPatch, looks: int, soon: int, later: int
) -> None:
    """The others of its turn are looked at the next time; those of the next turns, now."""
    monkeypatch.setattr(lookout, "LOOKS", looks)
    broken = StuckClient()
    monkeypatch.setattr(broken, "vanished", lambda: 1 / 0)
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        look(streams(broken, StuckClient()), turns=turns)
    assert (len(turns.soon), len(turns.later)) == (soon, later)


def test_a_look_during_stop_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not begin a loop that nobody stops; what begins later looks again."""
    client, turns = StuckClient(), Turns()
    made = Lookout(turns, lambda: streams(client))  # type: ignore[arg-type]
    monkeypatch.setattr(client, "vanished", made.stop)
    made.begin(60)
    assert (turns.soon, turns.later) == ([], [])
    monkeypatch.undo()
    made.begin(60)
    assert len(turns.later) == 1


def test_it_begins_once_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream begins it: one clock is enough for all. What was forked needs its own."""
    turns = Turns()
    made = look([], turns=turns)
    made.begin(60)
    assert len(turns.later) == 1
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    made.begin(60)
    assert len(turns.later) == 2
