"""bus.places: the places of one process, which sessions have."""

from __future__ import annotations

import pytest

from chatstream.bus.messages import Claim, Name
from chatstream.bus.places import Places

Live = set[tuple[str, str]]


@pytest.fixture
def live() -> Live:
    """The sessions that are live."""
    return set()


@pytest.fixture
def places(live: Live) -> Places:
    return Places(lambda owner, session: (owner, session) in live)


def begin(live: Live, session: str, number: int = 1, owner: str = "me") -> Claim:
    """A claim of a stream that lives."""
    live.add((owner, session))
    return Claim(Name(owner, session, f"{session}-{number}"), number)


def test_so_many_sessions_have_one(places: Places, live: Live) -> None:
    """Each owner's are counted apart."""
    assert [places.take(begin(live, f"s{n}"), 2) for n in range(3)] == [True, True, False]
    assert places.take(begin(live, "s0", owner="you"), 2)


def test_a_session_has_one_for_all_its_streams(places: Places, live: Live) -> None:
    """Until the last claim is given back, and it is not live."""
    old, new = begin(live, "s", 1), begin(live, "s", 2)
    assert places.take(old, 1)
    assert places.take(new, 1)
    places.leave(old)
    assert not places.take(begin(live, "z"), 1)
    live.remove(("me", "s"))
    places.leave(new)
    assert places.take(begin(live, "z"), 1)


def test_a_session_that_is_live_keeps_it_without_a_claim(places: Places, live: Live) -> None:
    """Its next stream has yet to claim; if that is refused, nobody needs it."""
    old, new = begin(live, "s", 1), begin(live, "s", 2)
    places.take(old, 1)
    places.leave(old)
    assert not places.take(begin(live, "z"), 1)
    places.leave(new, refused=True)
    assert places.take(begin(live, "z"), 1)


def test_who_is_refused_leaves_others_theirs(places: Places, live: Live) -> None:
    """Another stream of the session has claimed."""
    old, new = begin(live, "s", 1), begin(live, "s", 2)
    places.take(old, 1)
    places.leave(new, refused=True)
    assert not places.take(begin(live, "z"), 1)


def test_who_has_ended_makes_room_when_it_is_needed(places: Places, live: Live) -> None:
    """Its claim may be given back much later, which changes nothing then."""
    old = begin(live, "s")
    places.take(old, 1)
    live.clear()
    assert places.take(begin(live, "z"), 1)
    places.leave(old)
    assert not places.take(begin(live, "y"), 1)


def test_vacating_says_whether_there_was_any(places: Places, live: Live) -> None:
    """Of that owner; what is live stays."""
    places.take(begin(live, "s"), 9)
    places.take(begin(live, "z"), 9)
    places.take(begin(live, "z", owner="you"), 9)
    assert not places.vacate("me")
    live.remove(("me", "z"))
    live.remove(("you", "z"))
    assert places.vacate("me")
    assert not places.vacate("me")
    assert not places.vacate("nobody")
    assert not places.take(begin(live, "y"), 1)


def test_what_is_counted_elsewhere_is_noted(places: Places, live: Live) -> None:
    """However many there are."""
    for number in range(3):
        places.note(begin(live, f"s{number}"))
    assert not places.take(begin(live, "z"), 3)
    assert places.take(begin(live, "s1", 2), 3)


def test_nothing_is_kept_of_who_has_left(places: Places, live: Live) -> None:
    """Owners do not accumulate."""
    claims = [begin(live, f"s{n % 7}", n, f"o{n % 3}") for n in range(100)]
    for claim in claims:
        places.note(claim)
    assert places
    live.clear()
    for claim in claims:
        places.leave(claim)
    assert not places
    assert vars(places)["_of"] == {}


def test_what_was_never_there_may_leave(places: Places, live: Live) -> None:
    """As a stream does whose claim has failed before it came to a place."""
    places.leave(begin(live, "s"))
    places.leave(begin(live, "s"), refused=True)
    places.take(begin(live, "z"), 1)
    places.clear()
    assert not places
