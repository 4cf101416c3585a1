"""bus.base: what every bus does, whatever carries it - the turns of a listing, a page, a cancel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pytest

from chatstream.bus import base
from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Live,
    Name,
    Page,
    Request,
    Worker,
)


class Scripted(Bus):
    """A bus whose workers say what a test has them say, page by page."""

    def __init__(
        self,
        script: dict[str, list[tuple[list[int], bool] | None]],
        here: Answer = Answer.ABSENT,
    ) -> None:
        super().__init__(lambda request: here)
        self._script = script
        self.asked: list[dict[str, int]] = []
        self.cancels: list[Request] = []

    def start(self) -> None: ...
    def close(self) -> None: ...
    def release(self, claim: Claim) -> None: ...

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        return False

    def check(self) -> None: ...

    def cancel_elsewhere(self, request: Request) -> bool:
        self.cancels.append(request)
        return True

    def _here(self) -> Worker:
        return Worker("0", 0, "here")

    def _others(self) -> Iterable[Worker]:
        return [Worker(name, 1, "there") for name in self._script]

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        self.asked.append({worker.id: each.after for worker, each in enquiries.items()})
        pages: dict[Worker, Page | None] = {}
        for worker in enquiries:
            if turns := self._script[worker.id]:
                said = turns.pop(0)
                lives = tuple(Live(Name("", "s", str(n)), n, "", 0, 0) for n in (said or [[]])[0])
                pages[worker] = Page(lives, said[1], "") if said else None
        return pages


@pytest.mark.parametrize("here", Answer)
def test_a_cancel_goes_elsewhere_if_nothing_was_stopped_here(here: Answer) -> None:
    """With the same names; what another worker says is its answer."""
    script = Scripted({}, here)
    assert script.cancel("o", "s", "t") is True
    names = [(each.action, each.owner, each.session_id, each.stream_id) for each in script.cancels]
    assert names == ([] if here is Answer.STOPPED else [(Action.CANCEL, "o", "s", "t")])


def test_only_those_that_have_more_are_asked_for_more() -> None:
    """From where they left off; the others are done, silent or gone."""
    script = Scripted({"a": [([1, 2], True), ([5], False)], "b": [([7], False)], "c": [None]})
    listing = script.list()
    assert script.asked == [{"a": 0, "b": 0, "c": 0}, {"a": 2}]
    facts = [(w.worker.id, [each.number for each in w.streams], w.answered) for w in listing[0]]
    assert facts == [("a", [1, 2, 5], True), ("b", [7], True), ("c", [], False)]


def test_a_worker_that_falls_silent_or_ends_in_between() -> None:
    """The one is named with what it has said, the other is not there."""
    listing = Scripted({"a": [([1], True), None], "b": [([1], True)]}).list()
    facts = [(each.worker.id, len(each.streams), each.answered) for each in listing.workers]
    assert facts == [("a", 1, False)]


def test_a_listing_has_a_bound_and_a_stop_of_all_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that is cut says so; the workers have answered all the same."""
    monkeypatch.setattr(base, "MOST", 2)
    turns = [([1, 2], True), ([3, 4], True), ([5], False)]
    for cut, listing in (
        (False, Scripted({"a": [*turns]}).cancel_all(None)),
        (True, Scripted({"a": [*turns]}).list()),
    ):
        (found,) = listing.workers
        assert found.answered
        assert [live.number for live in found.streams] == ([1, 2] if cut else [1, 2, 3, 4, 5])
        assert listing.cut is cut


def test_what_overflows_a_page_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has been stopped by then: nobody would hear of it otherwise."""
    monkeypatch.setattr(base, "PAGE", 1000)
    stopped: list[int] = []

    def lives(enquiry: Enquiry) -> Iterator[Live]:
        for number in range(enquiry.after + 1, 101):
            stopped.append(number)
            yield Live(Name("", "s", "t" * 100), number, "new", 0.0, 0)

    ours = LocalBus(lambda request: Answer.ABSENT, lives)
    page = ours._page(Enquiry(stop=True), "me")
    assert page.more
    assert [live.number for live in page.streams] == stopped
    assert len(stopped) < 20
    last = ours._page(Enquiry(stop=True, after=stopped[-1]), "me", awaited=False)
    assert not last.more
    assert stopped == list(range(1, 101))
