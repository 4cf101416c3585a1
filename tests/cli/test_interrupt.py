"""cli.interrupt: real SIGINTs, in every moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from chatstream.cli import interrupt
from chatstream.cli.interrupt import Interrupt
from chatstream.sockets import native
from tests.conftest import eventually


@pytest.fixture
def entered() -> Iterator[Interrupt]:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as entered:
        yield entered
    assert signal.getsignal(signal.SIGINT) is before


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_at_the_prompt_it_leaves(entered: Interrupt) -> None:
    """As Python has it."""
    with pytest.raises(KeyboardInterrupt):
        press()


def test_during_an_answer_it_stops_that(entered: Interrupt) -> None:
    """In a thread of its own, since this one may hold any lock; and nothing is raised."""
    threads: list[int] = []
    with entered.answering():
        entered.stop_with(lambda: threads.append(threading.get_ident()))
        assert not entered.pressed
        press()
        eventually(lambda: threads, "the stop")
    assert entered.pressed
    assert threads != [threading.get_ident()]


def test_before_there_is_anything_to_stop_it_is_not_lost(entered: Interrupt) -> None:
    """While the stream is being opened: then it is stopped as soon as it is there."""
    stopped: list[bool] = []
    with entered.answering():
        press()
        entered.stop_with(lambda: stopped.append(True))
        assert stopped == [True]


def test_a_second_one_soon_after_does_not_leave(
    entered: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who presses twice wants the answer to stop, not the program; later it leaves again."""
    with entered.answering():
        press()
        press()
    press()
    monkeypatch.setattr(interrupt, "monotonic", lambda: entered._deaf_until)
    with pytest.raises(KeyboardInterrupt):
        press()


def test_an_answer_that_was_not_stopped_makes_nobody_deaf(entered: Interrupt) -> None:
    with entered.answering():
        pass
    with pytest.raises(KeyboardInterrupt):
        press()


def test_the_next_answer_begins_anew(entered: Interrupt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one's Ctrl-C is not its own, nor is what that stopped."""
    monkeypatch.setattr(native, "start_bare_thread", lambda target: target())
    stopped: list[str] = []
    with entered.answering():
        entered.stop_with(lambda: stopped.append("first"))
        press()
    with entered.answering():
        assert not entered.pressed
        press()
        assert entered.pressed
        assert stopped == ["first"]


def test_without_a_thread_it_is_raised(entered: Interrupt, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the program can still be left."""

    def none_left(target: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(native, "start_bare_thread", none_left)
    with entered.answering():
        entered.stop_with(lambda: None)
        with pytest.raises(KeyboardInterrupt):
            press()
