"""stream_response: when an answer begins, and what an app may do to it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import flask
import pytest
import requests
import responses

from tests.web.chat import DONE, EVENT, KEY, URL, MakeChat, assert_refused

FAULTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "500": ({"status": 500}, 502, "upstream_error"),
    "401": ({"status": 401, "body": f'{{"error":"{KEY}"}}'}, 502, "upstream_auth"),
    "429": ({"status": 429, "headers": {"Retry-After": "7"}}, 429, "upstream_rate_limited"),
    "400": ({"status": 400, "json": {"error": {"message": "No."}}}, 400, "upstream_rejected"),
    "302": ({"status": 302, "headers": {"Location": "/x"}}, 502, "upstream_not_stream"),
    "HTML": ({"body": "<html>", "content_type": "text/html"}, 502, "upstream_not_stream"),
    "unreachable": ({"body": requests.ConnectionError("x")}, 502, "upstream_unreachable"),
    "no connection": ({"body": requests.ConnectTimeout("x")}, 502, "upstream_connect"),
    "no answer": ({"body": requests.ReadTimeout("x")}, 504, "upstream_timeout"),
    "a bug": ({"body": RuntimeError(KEY)}, 502, "upstream_error"),
}


@pytest.mark.parametrize(("answer", "status", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_provider_that_refuses_has_a_true_status(
    chat: MakeChat,
    provider: responses.RequestsMock,
    answer: dict[str, Any],
    status: int,
    reason: str,
) -> None:
    """Before the first byte a fault is a refusal like ours: status, JSON, nothing of the stream."""
    provider.post(URL, **answer)
    response = chat().post()
    assert_refused(response, status, reason)
    assert int(response.headers["Content-Length"]) == len(response.data)
    assert KEY.encode() not in response.data
    assert response.headers.get("Retry-After") == ("7" if status == 429 else None)
    if reason == "upstream_rejected":
        assert response.json["message"] == "No."  # type: ignore[index]


def test_no_context_is_held_while_it_streams(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """The app's contexts are torn down before the provider is called: its connections are free."""
    app = flask.Flask("host")
    torn_down: list[int] = []
    app.teardown_appcontext(lambda error: torn_down.append(len(answers.calls)))
    walk = chat(app).open()
    assert torn_down == [0]
    assert walk.started == []
    assert walk.next() == EVENT + DONE
    assert walk.contexts == [False]
    assert not flask.has_app_context()
    assert len(answers.calls) == 1
    walk.close()


def test_start_response_is_called_once_before_the_first_bytes(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """PEP 3333: status and headers are begun by the first `next`, and by no later one."""
    walk = chat().open()
    assert walk.started == []
    assert walk.next() == EVENT + DONE
    assert [walk.next(), walk.next()] == [b"", b""]
    assert len(walk.started) == 1
    walk.close()


def test_a_response_that_the_app_replaces_gives_its_slot_back(
    chat: MakeChat, provider: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An after_request of the app's that raises, or answers otherwise, leaves no stream behind."""
    app = flask.Flask("host")
    replaces: list[Callable[[Any], Any]] = [lambda response: 1 // 0]

    @app.after_request
    def after(response: Any) -> Any:
        return replaces[0](response)

    c = chat(app)
    # pytest keeps the records, their tracebacks, and so the response.
    monkeypatch.setattr(app.logger, "disabled", True)
    assert c.post().status_code == 500
    gc.collect()
    assert len(c.service.registry) == 0
    replaces[0] = lambda response: flask.Response("other")
    assert c.post().data == b"other"
    gc.collect()
    assert len(c.service.registry) == 0
    assert len(provider.calls) == 0


def test_an_after_request_may_add_headers(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """The app's own headers are on the answer, and on a refusal of the provider's."""
    app = flask.Flask("host")

    @app.after_request
    def after(response: flask.Response) -> flask.Response:
        response.headers["X-App"] = "1"
        return response

    c = chat(app)
    assert c.post().headers["X-App"] == "1"
    answers.reset()
    answers.post(URL, status=500)
    response = c.post()
    assert_refused(response, 502, "upstream_error")
    assert response.headers["X-App"] == "1"
