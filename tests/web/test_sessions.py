"""sessions: what lives, for who owns it and for who watches over the service."""

from __future__ import annotations

import os
from typing import Any

import pytest

from chatstream import BusUnavailable, Cause, Unconfirmed
from chatstream.bus.messages import Enquiry, Found, Listing, Live, Name, Worker
from tests.web.desk import Desk
from tests.web.other_workers import OtherWorkers

SESSIONS, CANCEL_ALL = "/api/chat/sessions", "/api/chat/cancel-all"


def test_ones_own_sessions(desk: Desk) -> None:
    """What lives of the caller's, and nothing that is for an admin."""
    answer = desk.client.get(SESSIONS)
    assert answer.status_code == 200
    assert answer.json is not None
    assert answer.json["complete"] is True
    shown = answer.json["sessions"]
    assert [(one["sessionId"], one["streamId"]) for one in shown] == [("a", "a-1"), ("b", "b-1")]
    assert set(shown[0]) == {"sessionId", "streamId", "phase", "seconds", "events"}
    assert (shown[0]["phase"], shown[0]["events"]) == ("new", 0)
    assert 0 <= shown[0]["seconds"] < 10
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("query", ["?owner=8", "?all=1", "?all=true", "?owner=", "?all=1&owner=7"])
@pytest.mark.parametrize(("path", "method"), [(SESSIONS, "GET"), (CANCEL_ALL, "POST")])
def test_those_of_others_are_for_an_admin(desk: Desk, path: str, method: str, query: str) -> None:
    """A 403, and nothing is told or stopped."""
    answer = desk.client.open(path + query, method=method)
    assert answer.status_code == 403
    assert answer.json is not None
    assert answer.json["reason"] == "forbidden"
    assert desk.causes == [None] * 4


def test_one_may_name_oneself(desk: Desk) -> None:
    """And say that it is not about all."""
    for query in ("?owner=7", "?all=0", "?all="):
        answer = desk.client.get(SESSIONS + query).json
        assert answer is not None
        assert [one["sessionId"] for one in answer["sessions"]] == ["a", "b"]


def test_where_nobody_is_an_admin(desk: Desk) -> None:
    """Without the hook it is as if it said no."""
    desk.service.admin = None
    assert desk.client.get(f"{SESSIONS}?all=1").status_code == 403


@pytest.mark.parametrize("said", [("no", 403), "no", object(), lambda: False])
def test_what_is_only_true_makes_no_admin(desk: Desk, said: Any) -> None:
    """A hook that is async, or that returned a method or a refusal, is a mistake, not a yes."""
    desk.admin = said
    for path, method in ((SESSIONS, "GET"), (CANCEL_ALL, "POST")):
        assert desk.client.open(path + "?all=1", method=method).status_code == 500
    assert desk.causes == [None] * 4


def test_an_async_hook_makes_no_admin(desk: Desk) -> None:
    """Its coroutine is true, whatever it would say."""

    async def admin() -> bool:
        return False

    coroutine = admin()
    desk.admin = coroutine  # type: ignore[assignment]
    assert desk.client.get(f"{SESSIONS}?all=1").status_code == 500
    coroutine.close()


@pytest.mark.parametrize("said", [None, 0, False])
def test_what_a_database_says_of_nobody(desk: Desk, said: Any) -> None:
    """Nothing, and no."""
    desk.admin = said
    assert desk.client.get(f"{SESSIONS}?all=1").status_code == 403
    desk.admin = 1  # type: ignore[assignment]
    assert desk.client.get(f"{SESSIONS}?all=1").status_code == 200


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("?all=1", [("7", "a"), ("7", "b"), ("8", "a"), ("", "c")]),
        ("?owner=8", [("8", "a")]),
        ("?owner=", [("", "c")]),
        ("?owner=nobody", []),
    ],
)
def test_an_admin_sees_whose_they_are(desk: Desk, query: str, names: list[tuple[str, str]]) -> None:
    """With the owner, and the worker that has it."""
    desk.admin = True
    answer = desk.client.get(SESSIONS + query).json
    assert answer is not None
    shown = answer["sessions"]
    assert [(one["owner"], one["sessionId"]) for one in shown] == names
    assert {one["pid"] for one in shown} <= {os.getpid()}
    assert all(one["host"] for one in shown)


def test_all_of_ones_own_are_stopped(desk: Desk) -> None:
    """Those that live, cause CANCEL; nobody else's."""
    desk.streams[1].abort(Cause.CLIENT)  # case 27: one is gone already
    answer = desk.client.post(CANCEL_ALL)
    assert (answer.status_code, answer.json) == (200, {"ok": True, "cancelled": 1})
    assert desk.causes == [Cause.CANCEL, Cause.CLIENT, None, None]
    assert desk.client.post(CANCEL_ALL).json == {"ok": True, "cancelled": 0}


def test_an_admin_stops_all(desk: Desk) -> None:
    """Everybody's; or one owner's."""
    desk.admin = True
    assert desk.client.post(f"{CANCEL_ALL}?owner=8").json == {"ok": True, "cancelled": 1}
    assert desk.causes == [None, None, Cause.CANCEL, None]
    assert desk.client.post(f"{CANCEL_ALL}?all=1").json == {"ok": True, "cancelled": 3}
    assert desk.causes == [Cause.CANCEL] * 4


def test_a_worker_that_does_not_answer(desk: Desk) -> None:
    """What is known is told and stopped, and that it is not all."""
    OtherWorkers(desk.service, Unconfirmed())
    desk.service._neighbours.bus._lives = desk.service._neighbours.lives
    answer = desk.client.get(SESSIONS).json
    assert answer is not None
    assert (answer["complete"], len(answer["sessions"])) == (False, 2)
    stopped = desk.client.post(CANCEL_ALL)
    assert stopped.status_code == 504
    assert stopped.json == {"ok": False, "reason": "unconfirmed", "cancelled": 2}


def test_too_many_are_not_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bus has not asked for the rest, the list says so."""
    live = Live(Name("7", "s", "t"), 1, "body", 1.23456, 5)
    listing = Listing([Found(Worker("w", 1, "h"), [live], True)], cut=True)
    monkeypatch.setattr(desk.service._neighbours.bus, "list", lambda owner: listing)
    answer = desk.client.get(SESSIONS).json
    assert answer is not None
    assert answer["complete"] is False
    assert answer["sessions"][0]["seconds"] == 1.235


def test_a_bus_that_is_away(desk: Desk) -> None:
    """503, and one's own process has been stopped all the same."""
    OtherWorkers(desk.service, BusUnavailable())
    desk.service._neighbours.bus._lives = desk.service._neighbours.lives
    answer = desk.client.get(SESSIONS)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    answer = desk.client.post(CANCEL_ALL)
    assert (answer.status_code, answer.json) == (503, {"ok": False, "reason": "bus_unavailable"})
    assert desk.causes == [Cause.CANCEL, Cause.CANCEL, None, None]


def test_an_enquiry_of_all_is_answered_by_a_process(desk: Desk) -> None:
    """What the bus asks of this process: its own list, or its end."""
    live = list(desk.service._neighbours.lives(Enquiry("7")))
    assert [one.name.session_id for one in live] == ["a", "b"]
