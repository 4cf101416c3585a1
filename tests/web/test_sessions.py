"""watching: the routes for those who watch over a service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import flask
import pytest
from flask.testing import FlaskClient

from chatstream import BusUnavailable, Cause, ChatStream, Service, Stream, Unconfirmed
from chatstream.bus.messages import Enquiry, Found, Listing, Live, Name, Worker
from tests.web.test_chat import OtherWorkers

PAYLOAD = b'{"messages":[{"role":"user","content":"hi"}]}'


class Desk:
    """An app with some live streams, and who looks at them."""

    def __init__(self, **settings: Any) -> None:
        self.caller: Any = "7"
        self.admin = False
        app = flask.Flask("watching")
        app.config.from_mapping(
            CHATSTREAM_UPSTREAM_URL="http://127.0.0.1:9/", CHATSTREAM_HEALTH="/", **settings
        )
        app.config["CHATSTREAM_MAX_STREAMS"] = 8
        ChatStream(app, identify=lambda: self.caller, admin=lambda: self.admin)
        self.service: Service = app.extensions["chatstream"]
        self.client: FlaskClient = app.test_client()
        self._opened = [
            self.service.open(PAYLOAD, session_id=name, stream_id=f"{name}-1", owner=owner)
            for owner, name in (("7", "a"), ("7", "b"), ("8", "a"), ("", "c"))
        ]

    @property
    def streams(self) -> list[Stream]:
        return [iterable.stream for iterable in self._opened]

    @property
    def causes(self) -> list[Cause | None]:
        return [stream.cause for stream in self.streams]

    def close(self) -> None:
        for iterable in self._opened:
            iterable.close()
        self.service.stop()


@pytest.fixture
def desk(nothing_left: None) -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


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


@pytest.mark.parametrize("path", [SESSIONS, CANCEL_ALL])
def test_who_has_no_name_is_told_to_log_in(desk: Desk, path: str) -> None:
    """As on the other routes; and a response of the app's is sent as it is."""
    method = "GET" if path == SESSIONS else "POST"
    desk.caller = None
    assert desk.client.open(path, method=method).status_code == 401
    desk.caller = ("to the login", 302)
    assert desk.client.open(path, method=method).status_code == 302
    assert desk.causes == [None] * 4


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


def test_other_methods(desk: Desk) -> None:
    """Are refused, and say which there are."""
    assert desk.client.post(SESSIONS).headers["Allow"] == "GET, HEAD, OPTIONS"
    answer = desk.client.get(CANCEL_ALL)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "OPTIONS, POST")
    assert desk.client.post("/healthz").status_code == 405
    assert desk.client.delete("/readyz").status_code == 405
    assert desk.causes == [None] * 4


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


def test_the_state_of_the_process(desk: Desk) -> None:
    """Alive and ready, whoever asks; with HEAD too."""
    desk.caller = None
    for path in ("/healthz", "/readyz"):
        answer = desk.client.get(path)
        assert (answer.status_code, answer.json) == (200, {"ok": True})
        assert desk.client.head(path).status_code == 200


def test_not_ready_where_the_bus_is_away(desk: Desk) -> None:
    """Alive, but a cancel could not be sure: another process had better be asked."""
    for error in (BusUnavailable(), OSError("away")):
        OtherWorkers(desk.service, error)
        assert desk.client.get("/healthz").status_code == 200
        answer = desk.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json is not None
        assert (answer.json["reason"], answer.headers["Retry-After"]) == ("bus_unavailable", "1")


def test_not_ready_while_it_drains(desk: Desk) -> None:
    """A process that is to end takes no more streams, though it still answers."""
    desk.service.drain()
    assert desk.client.get("/healthz").status_code == 200
    answer = desk.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json is not None
    assert answer.json["reason"] == "shutting_down"


def test_they_are_where_the_settings_have_them(nothing_left: None) -> None:
    """Nowhere, unless that is said; under any path."""
    for place, path, status in (
        ("off", "/healthz", 404),
        ("/state", "/state/healthz", 200),
        ("/state", "/healthz", 404),
    ):
        app = flask.Flask("where")
        app.config["CHATSTREAM_HEALTH"] = place
        ChatStream(app)
        assert app.test_client().get(path).status_code == status


def test_an_enquiry_of_all_is_answered_by_a_process(desk: Desk) -> None:
    """What the bus asks of this process: its own list, or its end."""
    live = list(desk.service._neighbours.lives(Enquiry("7")))
    assert [one.name.session_id for one in live] == ["a", "b"]
