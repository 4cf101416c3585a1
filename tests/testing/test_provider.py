"""testing.provider: what a test says to the provider, and what it hears of it."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import pytest
import requests
from flask import Flask

from chatstream import ChatStream
from chatstream.testing import Figure, Live, Provider
from chatstream.testing.provider import without_proxy

pytestmark = pytest.mark.usefixtures("nothing_left")

BODY = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture
def provider(nothing_left: None, chatstream_provider: Provider) -> Provider:
    """Its limits are short: a test that waits for what does not come is not to take long."""
    chatstream_provider.timeout = 5
    return chatstream_provider


@pytest.fixture
def live(provider: Provider, chatstream_live: Callable[[Flask], Live]) -> Live:
    return chatstream_live(mounted())


def mounted(**config: object) -> Flask:
    app = Flask("host")
    app.config.update(config)
    ChatStream(app)
    return app


def ask(provider: Provider, name: str, **simulate: object) -> requests.Response:
    """A whole exchange with the provider itself."""
    body = {**BODY, "stream": True, "simulate": {"id": name, **simulate}}
    return requests.post(provider.url, json=body, timeout=10)


# The script


def test_a_script_is_for_the_requests_to_come(provider: Provider) -> None:
    """Each takes the place of the one before; without any it is as at first."""
    provider.script(tokens=2, rate=0, text="ho ")
    assert ask(provider, "a").text.count("ho ") == 2
    provider.script(status=503)
    assert ask(provider, "b").status_code == 503
    assert ask(provider, "c", status=418).status_code == 418
    provider.script()
    assert ask(provider, "d", rate=0).status_code == 200
    assert provider.figure("d").tokens == 200


def test_a_wrong_script_says_what_is_wrong(provider: Provider) -> None:
    """In the test's own words, and what held before holds."""
    provider.script(tokens=2, rate=0)
    with pytest.raises(ValueError, match=r"^silent is not known; known are: .*silent_after"):
        provider.script(silent=3)
    with pytest.raises(ValueError, match=r"^tokens must be a whole number"):
        provider.script(tokens="3")
    with pytest.raises(ValueError, match=r"^status must be from 200 to 599"):
        Provider(status=1)
    ask(provider, "a")
    assert provider.figure("a").tokens == 2


# The figures


def test_what_became_of_a_request(live: Live, provider: Provider) -> None:
    """Its figure has what the app sent, what was made of it, and when."""
    answer = live.ask("Hello?", script={"tokens": 3, "rate": 0}, temperature=0.5)
    answer.read()
    figure = provider.wait(answer, "closed")
    assert (figure.generated, figure.delivered, figure.tokens) == (3, 3, 3)
    assert (figure.open, figure.closed_by) == (False, "finished")
    assert figure.body["messages"] == BODY["messages"]
    assert figure.body["temperature"] == 0.5
    assert figure.headers["authorization"] == "present"
    assert figure.path == "/v1/chat/completions"
    assert figure.headers_ns is not None
    assert figure.first_token_ns is not None
    assert figure.closed_ns is not None
    assert figure.started_ns <= figure.headers_ns <= figure.first_token_ns <= figure.closed_ns
    assert (figure.stop_ms, figure.tokens_after) == (None, None)
    assert [figure] == provider.requests()


def test_waiting_for_how_far_it_came(live: Live, provider: Provider) -> None:
    """Started, headers, so many tokens: each is true when the call returns."""
    silent = provider.wait(live.ask("?", wait=False, script={"headers_after": 60}))
    assert (silent.headers_ns, silent.delivered) == (None, 0)
    answer = live.ask("?", wait=False, script={"headers_after": 0.1, "rate": 100, "tokens": 3})
    assert provider.wait(answer, "headers").headers_ns is not None
    assert provider.wait(answer, "delivered", 2).delivered >= 2
    assert provider.wait(answer, "closed").closed_by == "finished"
    assert provider.wait(answer, "delivered", 3).delivered == 3


def test_a_figure_of_now(live: Live, provider: Provider) -> None:
    """`figure` waits for nothing; figures and names stand for answers."""
    answer = live.ask("?", script={"silent_after": 1})
    figure = provider.figure(answer)
    assert figure.open
    assert provider.figure(figure).id == provider.figure(figure.id).id == answer.stream_id


def test_a_wait_in_vain_shows_the_figures(live: Live, provider: Provider) -> None:
    """The assertion says what was waited for and how far the request is."""
    answer = live.ask("?", script={"silent_after": 1, "tokens": 9, "rate": 0.001})
    words = r"still open: 1 of 9 tokens generated, 1 delivered\.$"
    with pytest.raises(AssertionError, match=r"^Not '2 delivered' within 0\.05 s: .*" + words):
        provider.wait(answer, "delivered", 2, timeout=0.05)
    with pytest.raises(AssertionError, match="^Not 'closed' within 0.05 s: .*" + words):
        provider.told(answer, timeout=0.05)
    silent = live.ask("?", wait=False, script={"headers_after": 60})
    with pytest.raises(AssertionError, match=r"^Not 'headers' within 0\.05 s"):
        provider.wait(silent, "headers", timeout=0.05)
    provider.timeout = 0.04
    with pytest.raises(AssertionError, match=r"within 0\.04 s"):
        provider.wait(answer, "closed")


def test_what_ended_before_it_came_so_far(provider: Provider) -> None:
    """A wait does not sit out its time when there is nothing to come."""
    ask(provider, "a", status=500)
    with pytest.raises(AssertionError, match="closed by 'status': 0 of 0"):
        provider.wait("a", "delivered")
    ask(provider, "b", truncate_after=0)
    assert provider.wait("b", "headers").closed_by == "truncate_after"


def test_a_request_that_did_not_come(provider: Provider) -> None:
    """The assertion names those that did."""
    with pytest.raises(AssertionError, match=r"got no request 'x' within 0\.01 s; .*: none"):
        provider.wait("x", timeout=0.01)
    ask(provider, "a", status=500)
    with pytest.raises(AssertionError, match=r"got no request 'x' within 0 s; .*: 'a'"):
        provider.figure("x")


def test_an_answer_that_the_app_refused(live: Live, provider: Provider) -> None:
    """The assertion says so: it is what a forgotten login looks like."""
    with pytest.raises(AssertionError, match=r"got no request <Answer .* status 400> within"):
        provider.told(live.ask([]), timeout=0.01)


def test_an_answer_that_ended_by_itself_is_no_stop(live: Live, provider: Provider) -> None:
    """Or a test would pass though the stop came too late."""
    answer = live.ask("?", script={"tokens": 2, "rate": 0})
    answer.read()
    answer.stop()
    with pytest.raises(
        AssertionError, match=r"not told to stop: .* is closed by 'finished': 2 of 2"
    ):
        provider.told(answer)


def test_what_a_stop_cost(live: Live, provider: Provider) -> None:
    """From the test's stop to the provider's end: the time, and the tokens made in it."""
    answer = live.ask("?", script={"rate": 1000, "tokens": 10_000})
    provider.wait(answer, "delivered", 20)
    answer.stop()
    figure = provider.told(answer)
    assert answer.stopped_ns is not None
    assert figure.closed_ns is not None
    assert figure.stop_ms == (figure.closed_ns - answer.stopped_ns) / 1e6 > 0
    assert figure.tokens_after is not None
    assert abs(figure.tokens_after - figure.stop_ms) <= 1  # a token is made each millisecond
    assert 20 <= figure.generated < figure.tokens


def test_a_figure_in_words() -> None:
    """How assertions show it."""
    figure = Figure("a", "/", {}, {}, 9, 4, 3, None, 1, None, None, None)
    assert str(figure) == "request 'a' is still open: 4 of 9 tokens generated, 3 delivered"


# Apps


def test_an_app_that_is_made_by_the_test_finds_it(provider: Provider) -> None:
    """Through the environment; Flask's client is enough for whole answers."""
    provider.script(tokens=2, rate=0)
    with mounted().test_client() as client:
        assert client.post("/api/chat/stream", json=BODY).text.endswith("data: [DONE]\n\n")
    (figure,) = provider.requests()
    assert figure.headers["authorization"] == "present"


def test_an_app_that_is_there_already_is_pointed_at_it(provider: Provider) -> None:
    """Whatever its settings are; in the end it has them again."""
    app = mounted(CHATSTREAM_UPSTREAM_URL="http://192.0.2.1/", CHATSTREAM_MODEL="m")
    service = app.extensions["chatstream"]
    own = service.settings
    with Provider(tokens=2, rate=0) as another:
        another.attach(app)
        another.attach(app)
        assert "[DONE]" in app.test_client().post("/api/chat/stream", json=BODY).text
        assert [figure.body["model"] for figure in another.requests()] == ["m"]
        assert service.settings != own
    assert service.settings == own


def test_an_app_without_chatstream_is_told_so(provider: Provider) -> None:
    """Also what is no Flask app, but wraps one."""
    with pytest.raises(LookupError, match=r"No ChatStream is mounted in <Flask 'bare'>"):
        provider.attach(Flask("bare"))
    with pytest.raises(LookupError, match="Give the Flask app itself"):
        provider.attach(mounted().wsgi_app)  # type: ignore[arg-type]


def test_apps_are_at_rest_when_it_is_closed(nothing_left: None) -> None:
    """Those that found it by themselves too, whose streams nobody has walked to the end."""
    with Provider() as provider:
        app = mounted(CHATSTREAM_UPSTREAM_URL=provider.url)
        response = app.test_client().post("/api/chat/stream", json=BODY)
        assert response.status_code == 200
        (figure,) = provider.requests()
        assert figure.open
    assert app.extensions["chatstream"].registry.live() == []
    response.close()
    provider.close()


def test_no_proxy_stands_between(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's proxy has no way to this machine's ports; what went around it still does."""
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("NO_PROXY", "intranet.test")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name, value in without_proxy().items():
        monkeypatch.setenv(name, value)
    assert os.environ["no_proxy"] == "intranet.test,127.0.0.1"
    provider.script(tokens=1, rate=0)
    assert "[DONE]" in mounted().test_client().post("/api/chat/stream", json=BODY).text


def test_without_epoll_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """gevent takes epoll out of `select`: no AttributeError, no thread."""
    monkeypatch.delattr(select, "epoll")
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match=r"gevent .* python -m chatstream\.simulator"):
        Provider()
    assert threading.active_count() == threads
