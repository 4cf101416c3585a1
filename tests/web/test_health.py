"""health: whether the process lives, and whether it may be asked."""

from __future__ import annotations

import flask

from chatstream import BusUnavailable, ChatStream
from tests.web.desk import Desk
from tests.web.other_workers import OtherWorkers


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
