"""bus.local: the bus of one process. What it remembers of cancels that come early or late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chatstream.bus.base import REMEMBER, REMEMBER_PER_OWNER
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Answer, Claim, Name, Request


class Process:
    """The live streams of a process, and what its bus has asked it."""

    def __init__(self) -> None:
        self.live: set[Name] = set()
        self.asked: list[Request] = []

    def receive(self, request: Request) -> Answer:
        self.asked.append(request)
        name = Name(request.owner, request.session_id or "", request.stream_id or "")
        if name not in self.live:
            return Answer.ABSENT
        self.live.remove(name)
        return Answer.STOPPED


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def bus(process: Process) -> LocalBus:
    bus = LocalBus(process.receive)
    bus.start()
    return bus


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The bus's clock, in the test's hand."""
    now = [1000.0]
    monkeypatch.setattr("chatstream.bus.local.monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def born_cancelled(bus: LocalBus, session: str, stream: str, owner: str = "") -> bool:
    """Whether a stream that begins now is cancelled already."""
    return bus.claim(Claim(Name(owner, session, stream), 1), reject=False)


def gone(bus: LocalBus, session: str, stream: str, owner: str = "") -> None:
    """A stream's whole life."""
    claim = Claim(Name(owner, session, stream), 1)
    bus.claim(claim, reject=False)
    bus.release(claim)


# Cancels that find their stream


def test_a_stream_that_begins_in_the_middle_of_its_cancel_is_stopped() -> None:
    """Claimed after the first look: looked for once more, and nothing is left for the next."""
    looks: list[Request] = []

    def receive(request: Request) -> Answer:
        looks.append(request)
        if len(looks) == 2:
            return Answer.STOPPED
        assert bus.claim(claim, reject=False) is False
        return Answer.ABSENT

    claim = Claim(Name("", "s", "t"), 1)
    bus = LocalBus(receive)
    assert bus.cancel("", "s", "t") is True
    assert len(looks) == 2
    bus.release(claim)
    assert born_cancelled(bus, "s", "t") is False


def test_nothing_has_to_be_left() -> None:
    """A bus that was never started, and one that is closed twice, are as good."""
    bus = LocalBus(lambda request: Answer.ABSENT)
    assert bus.cancel("", "s", "t") is False
    assert born_cancelled(bus, "s", "t") is True
    bus.close()
    bus.close()


# Cancels that come early


@pytest.mark.parametrize(("seconds", "remembered"), [(0, True), (29.9, True), (30.1, False)])
def test_an_early_cancel_is_kept_for_thirty_seconds(
    bus: LocalBus, pass_time: Callable[[float], None], seconds: float, remembered: bool
) -> None:
    """Remembered for 30 s, and forgotten then."""
    bus.cancel("", "s", "t")
    pass_time(seconds)
    assert remembered is born_cancelled(bus, "s", "t")


def test_each_early_cancel_has_its_own_thirty_seconds(
    bus: LocalBus, pass_time: Callable[[float], None]
) -> None:
    """A later cancel of the same owner neither lengthens nor shortens an earlier one's time."""
    bus.cancel("", "s", "t-1")
    pass_time(20)
    bus.cancel("", "s", "t-2")
    pass_time(15)
    bus.cancel("", "s", "t-3")
    assert born_cancelled(bus, "s", "t-1") is False
    pass_time(16)
    assert born_cancelled(bus, "s", "t-2") is False
    assert born_cancelled(bus, "s", "t-3") is True


def test_a_repeated_early_cancel_counts_from_the_last(
    bus: LocalBus, pass_time: Callable[[float], None]
) -> None:
    """A user who presses Stop twice is remembered from the second time."""
    bus.cancel("", "s", "t")
    pass_time(20)
    bus.cancel("", "s", "t")
    pass_time(20)
    assert born_cancelled(bus, "s", "t") is True


def test_the_same_early_cancel_many_times_is_one(bus: LocalBus) -> None:
    """Repeating one cancel does not push another out."""
    bus.cancel("", "s", "t-1")
    for _ in range(200):
        bus.cancel("", "s", "t-2")
    assert born_cancelled(bus, "s", "t-1") is True


def test_a_repeated_early_cancel_is_the_owners_newest(bus: LocalBus) -> None:
    """Repeated, a cancel is the last to be pushed out."""
    for n in range(REMEMBER_PER_OWNER):
        bus.cancel("", "s", f"t-{n}")
    bus.cancel("", "s", "t-0")
    bus.cancel("", "s", "one more")
    assert born_cancelled(bus, "s", "t-1") is False
    assert born_cancelled(bus, "s", "t-0") is True


# Cancels that come late


def test_only_the_stream_that_has_been_is_known_to_have_been(bus: LocalBus) -> None:
    """Another owner's stream, session or name may still come, and is cancelled early."""
    gone(bus, "s", "t", "me")
    for name in (("s", "t", "you"), ("s2", "t", "me"), ("s", "t2", "me")):
        bus.cancel(name[2], name[0], name[1])
        assert born_cancelled(bus, *name) is True


def test_a_cancel_of_a_stream_that_ends_is_late_not_early(bus: LocalBus) -> None:
    """A stream that is over and not yet released has been: nothing is kept for the next."""
    claim = Claim(Name("", "s", "t"), 1)
    bus.claim(claim, reject=False)
    assert bus.cancel("", "s", "t") is False
    bus.release(claim)
    assert born_cancelled(bus, "s", "t") is False


def test_a_name_is_claimed_until_its_last_stream_is_released(bus: LocalBus) -> None:
    """An older stream of the name may be released after the next one was claimed."""
    old, new = Claim(Name("", "s", "t"), 1), Claim(Name("", "s", "t"), 2)
    bus.claim(old, reject=False)
    bus.claim(new, reject=False)
    bus.release(old)
    bus._gone.pop(old.name)  # as after its time
    assert bus.cancel("", "s", "t") is False
    bus.release(new)
    assert born_cancelled(bus, "s", "t") is False


def test_what_was_claimed_of_another_bus_may_be_released(bus: LocalBus) -> None:
    """After a stop the process has a new bus, and streams of the old one may still be closed."""
    claim = Claim(Name("", "s", "t"), 1)
    bus.release(claim)
    assert bus.cancel("", "s", "t") is False
    assert born_cancelled(bus, "s", "t") is False


# What is kept


def test_owners_do_not_accumulate(
    bus: LocalBus, process: Process, pass_time: Callable[[float], None]
) -> None:
    """What ten thousand callers left behind is gone with the first use after its time."""
    for n in range(10_000):
        bus.cancel(f"owner-{n}", "s", "t")
        gone(bus, "s", "t2", f"owner-{n}")
    assert len(bus._early._names) >= 10_000
    pass_time(REMEMBER + 1)
    bus.cancel("last", "s", "t")
    gone(bus, "s", "t2", "last")
    for recent in (bus._early, bus._gone):
        assert list(recent._names) == ["last"]
        assert len(recent._owners) == 1
    assert bus._claimed == {}


def test_an_owner_that_never_pauses_does_not_accumulate(
    bus: LocalBus, pass_time: Callable[[float], None]
) -> None:
    """One owner that cancels for ever, a second apart, keeps only what is young enough."""
    for n in range(1000):
        bus.cancel("me", "s", f"t-{n}")
        pass_time(1.0)
    assert len(bus._early._names["me"]) <= REMEMBER_PER_OWNER
    assert len(bus._early._owners) == 1


def test_an_owner_of_many_streams_does_not_accumulate(bus: LocalBus) -> None:
    """Of the streams that have been, too, an owner's last ones are known."""
    for n in range(1000):
        gone(bus, "s", f"t-{n}", "me")
    assert len(bus._gone._names["me"]) == REMEMBER_PER_OWNER
    bus.cancel("me", "s", "t-999")
    assert born_cancelled(bus, "s", "t-999", "me") is False
