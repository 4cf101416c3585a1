"""cli.sessions: what is listed and what is stopped. The buses say what a test has them say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from chatstream import bus
from chatstream.bus.base import Bus
from chatstream.bus.messages import (
    Answer,
    Claim,
    Enquiry,
    Listing,
    Live,
    Name,
    Page,
    Request,
    Worker,
)
from chatstream.bus.unix.directory import service_directory
from chatstream.cli.sessions import show, stop, stop_all
from chatstream.cli.terminal import Terminal
from chatstream.errors import BusUnavailable, Unconfirmed
from chatstream.settings.table import Settings
from tests.bus.peer import Peer


class Fleet(Bus):
    """A service: by pid, what lives in its workers; None for one that is silent."""

    def __init__(self, workers: dict[int, list[Live] | None]) -> None:
        super().__init__(lambda request: Answer.ABSENT)
        self.workers = workers
        self.cancelled: list[tuple[str, str, str | None]] = []
        self.answer: bool | Exception = True
        self.closed = 0
        self.enquiries: list[Enquiry] = []

    def cancel(self, owner: str, session_id: str, stream_id: str | None = None) -> bool:
        self.cancelled.append((owner, session_id, stream_id))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def start(self) -> None: ...
    def release(self, claim: Claim) -> None: ...

    def close(self) -> None:
        self.closed += 1

    def check(self) -> None: ...

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        return False

    def cancel_elsewhere(self, request: Request) -> bool:
        return False

    def _here(self) -> Worker:
        return Worker("0", 0, "here")

    def _others(self) -> Iterable[Worker]:
        return [Worker(str(pid), pid, "web-1") for pid in self.workers]

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        self.enquiries += enquiries.values()
        pages: dict[Worker, Page | None] = {}
        for worker, enquiry in enquiries.items():
            lives = self.workers[worker.pid]
            if lives is None:
                pages[worker] = None
            else:
                mine = [each for each in lives if enquiry.owner in (None, each.name.owner)]
                pages[worker] = Page(tuple(mine), False, enquiry.id)
        return pages


def live(owner: str, session: str, stream: str) -> Live:
    return Live(Name(owner, session, stream), 1, "body", 1.25, 17)


class Console:
    """The commands, and what they said."""

    def __init__(self, *fleets: Fleet) -> None:
        self.fleets = fleets
        self.out, self.err = io.StringIO(), io.StringIO()
        self._terminal = Terminal(self.out, self.err)

    def show(self, owner: str | None = None, *, as_json: bool = False, **settings: Any) -> int:
        return show(Settings(**settings), "app", self._terminal, owner=owner, as_json=as_json)

    def stop(self, session: str, stream: str | None = None, owner: str | None = None) -> int:
        return stop(Settings(), "app", self._terminal, session, stream_id=stream, owner=owner)

    def stop_all(self, owner: str | None = None, **settings: Any) -> int:
        return stop_all(Settings(**settings), "app", self._terminal, owner=owner)

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()

    @property
    def complaints(self) -> list[str]:
        return self.err.getvalue().splitlines()


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`console(fleets…)`: the services that are there."""
    made: list[Fleet] = []

    def make(*fleets: Fleet) -> Console:
        made.extend(fleets)
        monkeypatch.setattr(bus, "visit", lambda settings, app: list(fleets))
        return Console(*fleets)

    yield make
    assert [fleet.closed for fleet in made] == [1] * len(made), "each is left, once"


def test_a_list_for_a_pipe(console: Any) -> None:
    """A head, and a line of fields for each stream of each worker of each service."""
    talk = console(
        Fleet({4711: [live("me", "s", "a")], 4712: []}), Fleet({4713: [live("", "z", "b")]})
    )
    assert talk.show() == 0
    assert talk.lines == [
        "session\tstream\towner\tphase\tseconds\tevents\tworker\thost",
        "s\ta\tme\tbody\t1.2\t17\t4711\tweb-1",
        "z\tb\t\tbody\t1.2\t17\t4713\tweb-1",
    ]
    assert talk.complaints == []


def test_a_list_of_an_owner(console: Any) -> None:
    talk = console(Fleet({1: [live("me", "s", "a"), live("you", "s", "b")]}))
    assert talk.show("you") == 0
    assert [line.split("\t")[1] for line in talk.lines[1:]] == ["b"]


def test_a_list_for_programs(console: Any) -> None:
    """Also which workers there are, and who does not answer."""
    talk = console(Fleet({1: [live("me", "s", "a")], 2: None}))
    assert talk.show(as_json=True) == 0
    found = json.loads(talk.out.getvalue())
    assert found["sessions"] == [
        {
            "session": "s",
            "stream": "a",
            "owner": "me",
            "phase": "body",
            "seconds": 1.25,
            "events": 17,
            "pid": 1,
            "host": "web-1",
        }
    ]
    assert found["workers"] == [
        {"pid": 1, "host": "web-1", "answered": True},
        {"pid": 2, "host": "web-1", "answered": False},
    ]
    assert found["cut"] is False
    assert talk.complaints == ["Worker 2 on web-1 does not answer."]


def test_a_session_is_stopped_by_its_whole_name(console: Any) -> None:
    """Whoever it belongs to, where that is one; and nothing else is."""
    mine, other = Fleet({1: [live("me", "s", "a"), live("me", "s-2", "b")]}), Fleet({2: []})
    talk = console(mine, other)
    assert talk.stop("s") == 0
    assert mine.cancelled == [("me", "s", "a")]
    assert other.cancelled == []
    assert talk.lines == ["stopped: session s, stream a"]


def test_only_the_stream_that_is_named(console: Any) -> None:
    fleet = Fleet({1: [live("me", "s", "a")], 2: [live("me", "s", "b")]})
    talk = console(fleet)
    assert talk.stop("s", "b") == 0
    assert fleet.cancelled == [("me", "s", "b")]


@pytest.mark.parametrize(
    ("session", "stream", "owner"),
    [("s-2", None, None), ("s", "b", None), ("s", None, "you"), ("S", None, None), ("", None, "")],
)
def test_what_is_not_there_is_unknown(
    console: Any, session: str, stream: str | None, owner: str | None
) -> None:
    """1, and a sentence; nothing is remembered for what may come."""
    fleet = Fleet({1: [live("me", "s", "a")]})
    talk = console(fleet)
    assert talk.stop(session, stream, owner) == 1
    assert fleet.cancelled == []
    assert talk.complaints == [f"No such session: {session}"]


def test_what_ended_in_between_is_unknown(console: Any) -> None:
    fleet = Fleet({1: [live("me", "s", "a")]})
    fleet.answer = False
    talk = console(fleet)
    assert talk.stop("s") == 1
    assert talk.lines == []


def test_a_session_of_two_owners_is_nobodys_to_guess(console: Any) -> None:
    """Nothing is stopped; they are listed, and with the owner it is."""
    fleet = Fleet({1: [live("me", "s", "a")], 2: [live("you", "s", "b")]})
    talk = console(fleet)
    assert talk.stop("s") == 1
    assert fleet.cancelled == []
    assert "--owner" in talk.complaints[0]
    assert [line.split("\t")[2] for line in talk.lines[1:]] == ["me", "you"]
    again = Fleet(fleet.workers)
    assert console(again).stop("s", None, "you") == 0
    assert again.cancelled == [("you", "s", "b")]


def test_a_worker_that_hangs_may_have_it(console: Any) -> None:
    """2: it is named; without the owner nobody can be told to stop anything."""
    fleet = Fleet({1: [], 2: None})
    talk = console(fleet)
    assert talk.stop("s") == 2
    assert fleet.cancelled == []
    assert talk.complaints[0] == "Worker 2 on web-1 does not answer."
    assert "--owner" in talk.complaints[1]


@pytest.mark.parametrize(
    ("answer", "code", "lines", "says"),
    [
        (Unconfirmed(), 2, [], "when it does"),
        (True, 0, ["stopped: session s"], ""),  # it has woken meanwhile
        (False, 2, [], ""),  # it has it not: nothing is certain, so it is not said to be unknown
    ],
    ids=["hangs", "woke", "absent"],
)
def test_a_worker_that_hangs_is_told_to_stop_it(
    console: Any, answer: bool | Exception, code: int, lines: list[str], says: str
) -> None:
    """Where the owner is known, the cancel waits for it."""
    fleet = Fleet({1: None})
    fleet.answer = answer
    talk = console(fleet)
    assert talk.stop("s", "a" if says else None, "me") == code
    assert fleet.cancelled == [("me", "s", "a" if says else None)]
    assert talk.lines == lines
    assert says in talk.err.getvalue()
    assert "--owner" not in talk.err.getvalue()


class Crowd(Fleet):
    """One in which more lives than is listed."""

    def list(self, owner: str | None = None) -> Listing:
        return super().list(owner)._replace(cut=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_more_than_is_listed_is_said(console: Any, as_json: bool) -> None:
    """Whichever of the services it is that has more."""
    talk = console(Crowd({1: [live("me", "s", "a")]}), Fleet({2: []}))
    assert talk.show(as_json=as_json) == 0
    assert talk.complaints == ["There are more: only some 10000 were asked for."]
    assert not as_json or json.loads(talk.lines[0])["cut"] is True


def test_what_was_not_listed_is_not_unknown(console: Any) -> None:
    """2, and what to say."""
    talk = console(Crowd({1: []}), Fleet({2: []}))
    assert talk.stop("s") == 2
    assert "--owner" in talk.complaints[-1]


def test_what_was_not_listed_is_stopped_by_its_name(console: Any) -> None:
    """As what a silent worker may have."""
    crowd = Crowd({1: []})
    assert console(crowd).stop("s", None, "me") == 0
    assert crowd.cancelled == [("me", "s", None)]


# All of them


@pytest.mark.parametrize(("owner", "streams"), [(None, ["a", "b", "c"]), ("you", ["b"])])
def test_all_are_stopped(console: Any, owner: str | None, streams: list[str]) -> None:
    """In all workers of all services: everybody's, or an owner's; each is named."""
    one = Fleet({1: [live("me", "s", "a"), live("you", "s", "b")], 2: []})
    talk = console(one, Fleet({3: [live("", "z", "c")]}))
    assert talk.stop_all(owner) == 0
    assert [line.rpartition(" ")[2] for line in talk.lines] == streams
    assert talk.lines[0].startswith("stopped: session s, stream ")
    assert talk.complaints == [f"{len(streams)} stopped."]
    for enquiry in (enquiry for fleet in talk.fleets for enquiry in fleet.enquiries):
        assert (enquiry.stop, enquiry.owner) == (True, owner)


def test_where_nothing_lives_all_is_stopped(console: Any) -> None:
    talk = console(Fleet({1: []}))
    assert talk.stop_all() == 0
    assert (talk.lines, talk.complaints) == ([], ["0 stopped."])


def test_a_list_stops_nothing(console: Any) -> None:
    """Nor does a cancel that asks first who has what."""
    fleet, other = Fleet({1: [live("me", "s", "a")]}), Fleet({1: []})
    console(fleet).show()
    console(other).stop("s")
    assert [enquiry.stop for each in (fleet, other) for enquiry in each.enquiries] == [False] * 2


def test_a_worker_that_hangs_stops_its_own_later(console: Any) -> None:
    """2: it is named, and so is what was stopped elsewhere."""
    talk = console(Fleet({1: [live("me", "s", "a")], 2: None}))
    assert talk.stop_all() == 2
    assert talk.lines == ["stopped: session s, stream a"]
    assert talk.complaints == [
        "Worker 2 on web-1 does not answer.",
        "What lives there ends when it does.",
    ]


@pytest.mark.parametrize("command", ["show", "stop", "stop all"])
@pytest.mark.parametrize("error", [BusUnavailable(), PermissionError("not yours")])
def test_a_bus_that_is_away(console: Any, command: str, error: Exception) -> None:
    """2, in words."""

    class Away(Fleet):
        def _others(self) -> Iterable[Worker]:
            raise error

    talk = console(Away({}))
    run = {"show": talk.show, "stop": lambda: talk.stop("s"), "stop all": talk.stop_all}
    assert run[command]() == 2
    assert talk.lines == []
    (sentence,) = talk.complaints
    assert ("bus is away" if isinstance(error, BusUnavailable) else "not yours") in sentence


# Nobody there


def test_local_says_what_to_set() -> None:
    talk = Console()
    assert (talk.show(bus="local"), talk.stop_all(bus="local")) == (2, 2)
    assert all("CHATSTREAM_BUS is local" in sentence for sentence in talk.complaints)


def test_no_worker_in_redis_names_the_prefix(console: Any) -> None:
    talk = console(Fleet({}))
    assert talk.show(bus="redis://nowhere/0", bus_prefix="mine") == 2
    assert "'mine' (CHATSTREAM_BUS_PREFIX)" in talk.complaints[0]


def test_no_worker_on_this_host(short_base: Path) -> None:
    """Where it was looked, and who else is there."""
    talk = Console()
    assert talk.show(bus=f"unix://{short_base}") == 2
    assert str(short_base) in talk.complaints[0]
    assert "uid" not in talk.complaints[0]
    (short_base / "chatstream-4242").mkdir()
    talk.show(bus=f"unix://{short_base}")
    assert "uid 4242: run this as that user" in talk.complaints[1]


def entered(path: Path) -> Peer:
    """A process that is in the directory of a service."""
    return Peer(
        "from pathlib import Path",
        "from chatstream.bus.unix.directory import Directory",
        f"one = Directory(Path({str(path)!r}))",
    )


def test_workers_of_another_app(short_base: Path) -> None:
    """They are not taken for this one's, and it is said that they are there."""
    path = service_directory(short_base, "service", "other")
    peer = entered(path)
    talk = Console()
    assert talk.show(bus=f"unix://{short_base}") == 2
    assert "CHATSTREAM_URL_PREFIX" in talk.complaints[0]
    peer.kill()
    talk.show(bus=f"unix://{short_base}")
    assert "CHATSTREAM_URL_PREFIX" not in talk.complaints[1]


def test_a_directory_of_another_pid_namespace_is_said(short_base: Path) -> None:
    """A container's: its pids mean something else here."""
    path = service_directory(short_base, "service", "app")
    peer = entered(path)
    (path / "pids").unlink()
    (path / "pids").symlink_to("pid:[1]")
    talk = Console()
    assert talk.show(bus=f"unix://{short_base}") == 2
    assert "pid namespace" in talk.complaints[0]
    peer.kill()
