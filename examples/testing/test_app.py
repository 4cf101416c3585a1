"""What the app beside promises: real sockets, no key, no network. Run it with `pytest`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from app import create_app
from flask import Flask

from chatstream.testing import Live, Provider


@pytest.fixture
def ada(chatstream_live: Callable[[Flask], Live]) -> Live:
    """The app, served, and Ada's browser, logged in."""
    live = chatstream_live(create_app())
    assert live.post("/login", data={"name": "ada"}).status == 302
    return live


def test_a_stop_reaches_my_provider(chatstream_provider: Provider, ada: Live) -> None:
    chatstream_provider.script(rate=0.1)  # the second token comes after ten seconds
    answer = ada.ask("Tell me a story.")
    answer.stop()
    assert chatstream_provider.told(answer).tokens_after == 0
    assert ada.outcome(answer).words == "aborted by client/cancel"


def test_a_closed_tab_is_noticed_while_the_model_thinks(
    chatstream_provider: Provider, ada: Live
) -> None:
    chatstream_provider.script(silent_after=3)
    answer = ada.ask("What is the meaning of life?").wait(3)
    answer.close()
    assert chatstream_provider.told(answer).delivered == 3
    assert answer.text == "A stop button "  # what was read stays


def test_a_stop_before_the_first_word(chatstream_provider: Provider, ada: Live) -> None:
    answer = ada.ask("Are you there?", script={"headers_after": 600}, wait=False)
    chatstream_provider.wait(answer)
    assert answer.cancel().json == {"ok": True, "cancelled": True}
    assert chatstream_provider.told(answer).headers_ns is None
    assert (answer.status, answer.read(), answer.error) == (200, "", None)


def test_nobody_stops_somebody_elses_answer(chatstream_provider: Provider, ada: Live) -> None:
    mallory = ada.browser()
    mallory.post("/login", data={"name": "mallory"})
    answer = ada.ask("Tell me a story.")
    assert mallory.cancel(answer).status == 404
    assert chatstream_provider.figure(answer).open


def test_a_whole_answer_is_no_stop(chatstream_provider: Provider, ada: Live) -> None:
    chatstream_provider.script(text="Once upon a time.", tokens=4, rate=0)
    answer = ada.ask("Tell me a story.")
    assert answer.read() == "Once upon a time."
    assert chatstream_provider.wait(answer, "closed").closed_by == "finished"
    assert ada.outcome(answer).words == "completed"


def test_a_provider_that_refuses(chatstream_provider: Provider, ada: Live) -> None:
    chatstream_provider.script(status=429, retry_after=7)
    answer = ada.ask("Tell me a story.")
    assert answer.status == 429
    assert answer.json["reason"] == "upstream_rate_limited"
    assert answer.headers["Retry-After"] == "7"


def test_strangers_do_not_reach_the_provider(chatstream_provider: Provider) -> None:
    client = create_app().test_client()  # Flask's own, where a status is all that is asked for
    body = {"messages": [{"role": "user", "content": "Hello?"}]}
    assert client.post("/api/chat/stream", json=body).status_code == 401
    assert chatstream_provider.requests() == []
