"""testing.browser: a visitor, real sockets, and what it sees of an answer."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import flask
import pytest
from flask import Flask
from werkzeug.wrappers import Response

from chatstream import Cause, ChatStream
from chatstream.testing import Browser, Event, Live, Provider

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def asked() -> list[str]:
    """The paths that the app was asked for, in order."""
    return []


@pytest.fixture
def live(
    nothing_left: None,
    asked: list[str],
    chatstream_provider: Provider,
    chatstream_live: Callable[[Flask], Live],
) -> Live:
    app = host()
    app.before_request(lambda: asked.append(flask.request.path))
    return chatstream_live(app)


def host() -> Flask:
    """An app with a login whose cookie is for https only, and with routes that tell what came."""
    app = Flask("host")
    app.config.update(SECRET_KEY="x", SESSION_COOKIE_SECURE=True, CHATSTREAM_URL_PREFIX="/talk")
    ChatStream(app, identify=lambda: flask.session.get("user", "anybody"))

    @app.post("/login")
    def login() -> Response:
        flask.session["user"] = flask.request.form["name"]
        return flask.redirect("/me")

    @app.route("/me", methods=["GET", "PUT"])
    def me() -> str:
        return flask.session.get("user", "nobody")

    @app.post("/echo")
    def echo() -> dict[str, object]:
        request = flask.request
        return {"json": request.get_json(silent=True), "headers": dict(request.headers)}

    @app.post("/own")
    def own() -> object:
        """A route of the app's before chatstream's, as OpenAI's would be."""
        return app.view_functions["chatstream.stream"]()

    return app


# Requests


def test_a_visitor_keeps_its_cookies(live: Live) -> None:
    """Also those for https only; another visitor has others. Redirects are the test's to follow."""
    reply = live.post("/login", data={"name": "ada"})
    assert (reply.status, reply.headers["location"]) == (302, "/me")
    assert live.get("/me").text == live.request("PUT", "/me").text == "ada"
    assert live.browser().get("/me").text == "nobody"


def test_a_cookie_from_elsewhere(live: Live) -> None:
    """Such as one that Flask's client was given: in `headers` it takes the jar's place."""
    app = host()
    client = app.test_client()
    client.post("/login", data={"name": "bob"}, base_url="https://localhost")
    cookie = client.get_cookie("session")
    assert cookie is not None
    live.post("/login", data={"name": "ada"})
    live.headers["Cookie"] = f"session={cookie.value}"
    assert live.get("/me").text == "bob"


def test_headers_and_json(live: Live) -> None:
    """Those of the visitor go with every request; one request's own win."""
    live.headers.update(Authorization="Bearer ada", Accept="text/plain")
    got = live.post("/echo", json={"a": 1}, headers={"Accept": "*/*"}).json
    assert got["json"] == {"a": 1}
    assert got["headers"]["Authorization"] == "Bearer ada"
    assert got["headers"]["Accept"] == "*/*"
    typed = live.post("/echo", json={}, headers={"content-type": "text/x"}).json
    assert typed["headers"]["Content-Type"] == "text/x"
    live.headers["Host"] = "chat.test"  # as an app with a SERVER_NAME wants it
    assert live.post("/echo").json["headers"]["Host"] == "chat.test"
    assert live.get("/nowhere").status == 404


# Asking


def test_asking_names_the_answer(live: Live, chatstream_provider: Provider) -> None:
    """With names of the test's, or made up; further fields go along."""
    named = live.ask("Hello?", session_id="s-1", stream_id="t-1", model="m")
    made_up = live.ask("Hello?", headers={"X-Test": "1"})
    assert (named.session_id, named.stream_id) == ("s-1", "t-1")
    assert named.headers["X-Stream-Id"] == "t-1"
    assert len({made_up.session_id, made_up.stream_id, "s-1", "t-1"}) == 4
    assert made_up.headers["x-session-id"] == made_up.session_id
    body = chatstream_provider.figure(named).body
    assert body["messages"] == [{"role": "user", "content": "Hello?"}]
    assert body["model"] == "m"


def test_asking_with_a_whole_conversation(live: Live, chatstream_provider: Provider) -> None:
    """A list is the messages as they are."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    assert chatstream_provider.figure(live.ask(messages)).body["messages"] == messages


def test_asking_elsewhere(live: Live, chatstream_provider: Provider) -> None:
    """On another route the names are headers, and its answer's headers say what they became."""
    told = live.ask("Hello?", path="/echo", session_id="s-1", stream_id="t-1").json
    assert (told["headers"]["X-Session-Id"], told["headers"]["X-Stream-Id"]) == ("s-1", "t-1")
    assert not {"sessionId", "streamId"} & set(told["json"])
    answer = live.ask("Hello?", path="/own", session_id="s-1")
    assert answer.session_id == answer.headers["X-Session-Id"] != "s-1"
    assert answer.stream_id == answer.headers["X-Stream-Id"]
    assert answer.cancel().status == 200
    (figure,) = chatstream_provider.requests()
    assert chatstream_provider.told(figure).body["messages"][0]["content"] == "Hello?"


def test_a_wrong_script_is_not_sent(live: Live, chatstream_provider: Provider) -> None:
    """It says what is wrong, and the app hears nothing of it."""
    with pytest.raises(ValueError, match=r"^tokns is not known"):
        live.ask("Hello?", script={"tokns": 3})
    assert chatstream_provider.requests() == []


def test_a_refusal_is_an_answer_too(live: Live) -> None:
    """Its status, headers and JSON; no events, and it has ended."""
    answer = live.ask([])
    assert answer.status == 400
    assert answer.json["reason"] == "bad_messages"
    assert answer.headers.get_content_type() == "application/json"
    assert (answer.events, answer.text, answer.error, answer.ended) == ([], "", None, True)


# Reading


def test_reading_what_comes(live: Live) -> None:
    """`ask` waits for the first event, `wait` for so many, `read` for the end; none is lost."""
    answer = live.ask("?", script={"tokens": 4, "rate": 20, "text": "one two three four "})
    assert answer.text.startswith("one ")
    assert not answer.ended
    assert answer.wait(2) is answer
    assert answer.text.startswith("one two ")
    assert answer.read() == answer.text == "one two three four "
    assert (answer.ended, answer.broken, answer.events[-1]) == (True, False, Event("[DONE]"))
    assert answer.wait(99).read() == answer.text


def test_walking_through_the_events(live: Live) -> None:
    """From the first one on, however many were read before; twice, if one likes."""
    answer = live.ask("?", script={"tokens": 3, "rate": 0, "text": "a ", "reasoning": 1})
    texts = [event.text for event in answer]
    assert texts == ["", "a ", "a ", "", ""]
    assert [event.text for event in answer] == texts
    assert answer.events[0].json["choices"][0]["delta"]["reasoning_content"] == "a "
    assert answer.events[-1].json is None


def test_a_fault_in_the_middle(live: Live) -> None:
    """chatstream's event and the provider's own both are the answer's `error`."""
    cut = live.ask("?", script={"truncate_after": 2, "rate": 0})
    cut.read()
    assert cut.events[-1].type == "error"
    assert cut.error["code"] == "upstream_truncated"
    failed = live.ask("?", script={"error_after": 2, "rate": 0})
    failed.read()
    assert failed.events[-1].type == "message"
    assert failed.error["code"] == "overloaded"


def test_silence_fails_the_test(live: Live) -> None:
    """In bounded time, with what had come."""
    live.timeout = 0.1
    with pytest.raises(AssertionError, match=r"silent for 0\.1 s, after 1 events: 'A '"):
        live.ask("?", script={"silent_after": 1}).wait(2)
    late = live.ask("?", wait=False, script={"headers_after": 60})
    with pytest.raises(AssertionError, match=r"silent for 0\.1 s, after not even a status: ''"):
        _ = late.status


def test_a_body_that_breaks_off(live: Live) -> None:
    """Where the server goes away, the answer has ended, and says how."""
    answer = live.ask("?", script={"silent_after": 1})
    answer._connection.sock.shutdown(socket.SHUT_RD)
    assert answer.read() == "A "
    assert answer.broken


# Stopping


def test_stop_leaves_and_cancels(
    live: Live, asked: list[str], chatstream_provider: Provider
) -> None:
    """As the Stop button: the provider is told; the reply is the cancel's."""
    answer = live.ask("?")
    reply = answer.stop()
    assert reply.json in ({"ok": True, "cancelled": True}, {"ok": False, "reason": "not_found"})
    assert asked == ["/talk/stream", f"/talk/cancel/{answer.session_id}"]
    assert chatstream_provider.told(answer).closed_by == "client"
    assert answer.ended
    assert answer.wait(2).text == "A "  # what was read stays, and nothing follows


def test_cancel_stays_to_the_end(live: Live, chatstream_provider: Provider) -> None:
    """200, and an answer that ends properly, with neither an error nor `[DONE]`."""
    answer = live.ask("?", script={"silent_after": 1})
    assert answer.cancel().json == {"ok": True, "cancelled": True}
    assert answer.read() == "A "
    assert (answer.broken, answer.error) == (False, None)
    assert answer.cancel().status == 404
    assert chatstream_provider.told(answer).stop_ms is not None
    assert live.outcome(answer).cause is not None


def test_close_posts_nothing(live: Live, asked: list[str], chatstream_provider: Provider) -> None:
    """A tab that is closed; the loop notices, though the provider is silent."""
    answer = live.ask("?", wait=False, script={"headers_after": 60})
    chatstream_provider.wait(answer)
    answer.close()
    answer.close()
    assert chatstream_provider.told(answer).delivered == 0
    assert live.outcome(answer).cause is Cause.CLIENT
    assert asked == ["/talk/stream"]


def test_the_first_stop_is_the_one_that_counts(live: Live) -> None:
    """A second one does not move the instant from which it is measured."""
    answer = live.ask("?")
    assert answer.stopped_ns is None
    answer.cancel()
    first = answer.stopped_ns
    answer.stop()
    assert answer.stopped_ns == first is not None


def test_others_cancel_by_name(live: Live, chatstream_provider: Provider) -> None:
    """A cancel of an answer, or of a session with and without a stream id, is the visitor's own."""
    live.post("/login", data={"name": "ada"})
    answer = live.ask("?")
    stranger = live.browser()
    assert stranger.cancel(answer).status == 404
    assert stranger.cancel(answer.session_id).status == 404
    assert live.cancel(answer.session_id, "another").status == 404
    assert chatstream_provider.figure(answer).open
    assert live.cancel(answer.session_id).status == 200
    chatstream_provider.told(answer)


def test_what_an_answer_looks_like(live: Live) -> None:
    """Where a test fails, its names and state are shown."""
    answer = live.ask("?", session_id="s", stream_id="t", script={"silent_after": 1})
    assert repr(answer) == "<Answer s/t open, 1 events>"
    answer.cancel()
    assert repr(answer) == "<Answer s/t stopped, 1 events>"
    answer.read()
    assert repr(answer) == "<Answer s/t ended, 1 events>"
    refused = live.ask([], session_id="s", stream_id="t")
    assert repr(refused) == "<Answer s/t ended, status 400>"


def test_all_tabs_are_closed_at_once(live: Live, chatstream_provider: Provider) -> None:
    """A browser that is closed leaves no answer open."""
    browser = live.browser()
    answers = [browser.ask("?", script={"silent_after": 1}) for _ in range(3)]
    browser.close()
    assert {chatstream_provider.told(answer).closed_by for answer in answers} == {"client"}


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_server_that_is_no_server(server: socket.socket) -> None:
    """What goes wrong leaves no socket open, and no warning of one."""
    browser = Browser(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout=0.05)
    assert browser.url.endswith(str(server.getsockname()[1]))
    with pytest.raises(TimeoutError):
        browser.get("/")
    with pytest.raises(AssertionError, match="not even a status"):
        browser.ask("?")
    with pytest.raises(TimeoutError):
        browser.post("/", data={"more": "x" * 20_000_000})  # than the kernel takes
    browser.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        browser.ask("?")
