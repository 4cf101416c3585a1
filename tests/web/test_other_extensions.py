"""Beside other extensions, which an app sets up as their docs say: CORS, limits, logins, CSRF."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flask
import pytest
import requests
import responses
from flask import Flask, request
from flask_compress import Compress
from flask_cors import CORS
from flask_limiter import Limiter, RateLimitExceeded
from flask_limiter.util import get_remote_address
from flask_login import LoginManager, UserMixin, current_user, login_user
from flask_wtf.csrf import CSRFProtect, generate_csrf
from werkzeug.test import EnvironBuilder

from chatstream import Cause, ChatStream, Kind, stream_ended
from chatstream.stream.sides import Detachable
from chatstream.testing import Answer, Browser, Live, Provider
from tests.web.chat import DONE, EVENT, Chat, MakeChat, assert_not_found

if TYPE_CHECKING:
    from tests.redis_server import RedisServer

Serve = Callable[[Flask], Live]

PAGE = "https://chat.example.org"
OTHER = "https://evil.example.net"
EVENTS = "text/event-stream"
STREAM, CANCEL = "/api/chat/stream", "/api/chat/cancel/s-1"
QUESTION = {"messages": [{"role": "user", "content": "Hello?"}]}


def make(**config: Any) -> Flask:
    """An app that knows its visitors by a header."""
    app = Flask("host")
    app.config.update(SECRET_KEY="x", **config)
    ChatStream(app, identify=lambda: request.headers.get("X-User"))
    return app


# Flask-CORS


def ours(**config: Any) -> Flask:
    return make(CHATSTREAM_CORS_ORIGINS=PAGE, **config)


def theirs(**config: Any) -> Flask:
    """As an app does whose users have cookies."""
    app = make(**config)
    CORS(
        app,
        resources={"/api/chat/*": {"origins": [PAGE]}},
        supports_credentials=True,
        expose_headers=["X-Session-Id", "X-Stream-Id", "Retry-After"],
    )
    return app


BOTH = pytest.mark.parametrize("make_app", [ours, theirs])


def preflight(browser: Browser, path: str, origin: str) -> Mapping[str, str]:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,authorization,x-csrftoken",
    }
    reply = browser.request("OPTIONS", path, headers=asked)
    assert reply.status in (200, 204)
    assert reply.text == ""
    return cors_of(reply.headers)


def cors_of(headers: Any) -> dict[str, str]:
    """The headers that a browser decides by, names in lower case."""
    start = "access-control-"
    return {
        name.lower().removeprefix(start): value
        for name, value in headers.items()
        if name.lower().startswith(start)
    }


@BOTH
@pytest.mark.parametrize("path", [STREAM, CANCEL])
def test_a_preflight(
    make_app: Callable[..., Flask], path: str, chatstream_live: Serve, chatstream_provider: Provider
) -> None:
    """Both routes may be posted to, by that page alone, with JSON and a token."""
    live = chatstream_live(make_app())
    told = preflight(live, path, PAGE)
    assert told["allow-origin"] == PAGE
    assert "POST" in told["allow-methods"]
    allowed = {name.strip().lower() for name in told["allow-headers"].split(",")}
    assert {"content-type", "authorization"} <= allowed
    assert "allow-origin" not in preflight(live, path, OTHER)
    assert chatstream_provider.requests() == []


@BOTH
def test_a_real_stream_and_every_refusal_may_be_read(
    make_app: Callable[..., Flask], chatstream_live: Serve, chatstream_provider: Provider
) -> None:
    """The page sees an answer, ours and the provider's refusals, and what a cancel came to."""
    live = chatstream_live(make_app(CHATSTREAM_MAX_STREAMS=1))
    live.headers |= {"Origin": PAGE, "X-User": "ada"}
    answer = live.ask("Hello?", session_id="s-1")
    seen: dict[str, Any] = {
        "an answer": (200, answer),
        "no slot": (503, live.ask("Hello?", session_id="s-2")),
        "a cancel": (200, live.cancel(answer)),
        "nothing to cancel": (404, live.cancel("s-3")),
        "no JSON": (415, live.post(STREAM, data={"a": "b"})),
        "no such method": (405, live.get(STREAM)),
    }
    answer.read()
    live.outcome(answer)
    seen["the provider's"] = (429, live.ask("Hello?", script={"status": 429, "retry_after": 7}))
    del live.headers["X-User"]
    seen["who?"] = (401, live.ask("Hello?"))
    for what, (status, reply) in seen.items():
        told = cors_of(reply.headers)
        assert (what, reply.status, told["allow-origin"]) == (what, status, PAGE)
        exposed = {name.strip().lower() for name in told["expose-headers"].split(",")}
        assert exposed >= {"x-session-id", "x-stream-id", "retry-after"}
        credentials = "true" if make_app is theirs else None
        assert told.get("allow-credentials") == credentials
    assert seen["the provider's"][1].headers["Retry-After"] == "7"


@BOTH
def test_another_origins_page_may_not(
    make_app: Callable[..., Flask], chatstream_live: Serve
) -> None:
    live = chatstream_live(make_app())
    live.headers |= {"Origin": OTHER, "X-User": "ada"}
    assert "allow-origin" not in cors_of(live.ask("Hello?").headers)


def test_the_module_may_be_imported(chatstream_live: Serve) -> None:
    """By a page of the other origin, which need not have a copy of its own."""
    live = chatstream_live(ours())
    told = cors_of(live.get("/api/chat/chatstream.js", headers={"Origin": PAGE}).headers)
    assert told["allow-origin"] == PAGE


def test_nothing_of_it_unless_asked_for(chatstream_live: Serve) -> None:
    live = chatstream_live(make())
    live.headers |= {"Origin": PAGE, "X-User": "ada"}
    replies = [live.ask("Hello?"), live.cancel("s-3"), live.get("/api/chat/chatstream.js")]
    assert [cors_of(reply.headers) for reply in replies] == [{}, {}, {}]
    assert preflight(live, STREAM, PAGE) == {}


@BOTH
def test_the_apps_own_routes_are_the_apps(
    make_app: Callable[..., Flask], chatstream_live: Serve
) -> None:
    app = make_app()
    app.add_url_rule("/hello", view_func=lambda: "hello")
    live = chatstream_live(app)
    assert cors_of(live.get("/hello", headers={"Origin": PAGE}).headers) == {}


# Flask-Limiter


def limited(storage: str = "memory://", **options: Any) -> Flask:
    """As docs/mount.md says: two questions a minute for each owner."""
    app = make()
    limiter = Limiter(whose, app=app, storage_uri=storage, **options)
    views = app.view_functions
    views["chatstream.stream"] = limiter.limit("2/minute", methods=["POST"])(
        views["chatstream.stream"]
    )
    limiter.exempt(views["chatstream.cancel"])

    @app.errorhandler(RateLimitExceeded)
    def too_fast(error: RateLimitExceeded) -> Any:
        if request.blueprint != "chatstream" or limiter.current_limit is None:
            return error
        seconds = max(1, math.ceil(limiter.current_limit.reset_at - time.time()))
        message = f"Too many questions. Again in {seconds} s."
        refusal = {"ok": False, "reason": "rate_limited", "message": message}
        return refusal, 429, {"Retry-After": str(seconds)}

    return app


def whose() -> str:
    return request.headers.get("X-User") or get_remote_address()


def ask_as(live: Live, user: str, **more: Any) -> Any:
    script = {"tokens": 1, "rate": 0}
    return live.ask("Hello?", headers={"X-User": user}, script=script, **more)


def assert_limited(refused: Any) -> None:
    assert (refused.status, refused.json["reason"]) == (429, "rate_limited")
    assert refused.headers.get_content_type() == "application/json"
    assert 1 <= int(refused.headers["Retry-After"]) <= 61  # the extension rounds up, and so do we
    assert refused.headers["Retry-After"] in refused.json["message"]


def test_a_limit_for_each_owner(chatstream_live: Serve, chatstream_provider: Provider) -> None:
    """The third question in a minute is refused before the provider is called; others go on."""
    live = chatstream_live(limited())
    assert [ask_as(live, "ada").status for _ in range(2)] == [200, 200]
    assert_limited(ask_as(live, "ada"))
    assert len(chatstream_provider.requests()) == 2
    assert ask_as(live, "bob").status == 200


def test_cancels_are_not_limited(chatstream_live: Serve, chatstream_provider: Provider) -> None:
    """However many, also when the questions are used up: a stop always gets in."""
    live = chatstream_live(limited())
    live.headers["X-User"] = "ada"
    answers = [live.ask("Tell me a story.") for _ in range(2)]
    assert_limited(live.ask("Another one."))
    assert [live.cancel("s-0").status for _ in range(20)] == [404] * 20
    for answer in answers:
        assert answer.cancel().status == 200
        assert chatstream_provider.told(answer)


def test_a_limit_of_the_whole_apps(chatstream_live: Serve) -> None:
    """`default_limits` would hold for cancels too, were they not exempt; files have them."""
    live = chatstream_live(limited(default_limits=["3/minute"]))
    live.headers["X-User"] = "ada"
    assert [live.cancel("s-0").status for _ in range(20)] == [404] * 20
    script = [live.get("/api/chat/chatstream.js").status for _ in range(4)]
    assert script == [200, 200, 200, 429]


def test_a_limit_of_the_blueprint_is_one_of_cancels(chatstream_live: Serve) -> None:
    """What it is not to be: every route of ours has it, each for itself."""
    app = make()
    limiter = Limiter(whose, app=app, storage_uri="memory://")
    limiter.limit("2/minute")(app.blueprints["chatstream"])
    live = chatstream_live(app)
    live.headers["X-User"] = "ada"
    assert [live.cancel("s-0").status for _ in range(3)] == [404, 404, 429]
    assert [ask_as(live, "ada").status for _ in range(3)] == [200, 200, 429]


def test_what_is_no_question_counts_for_none(chatstream_live: Serve) -> None:
    """A preflight, or what asks for the method."""
    live = chatstream_live(limited())
    live.headers["X-User"] = "ada"
    assert [live.request("OPTIONS", STREAM).status for _ in range(5)] == [204] * 5
    assert ask_as(live, "ada").status == 200


def test_the_workers_share_a_limit(
    chatstream_live: Serve,
    shared_redis: RedisServer,
    chatstream_provider: Provider,
    request: pytest.FixtureRequest,
) -> None:
    """With Redis; with `memory://` each counts for itself."""
    options = {"key_prefix": request.node.name}
    lives = [chatstream_live(limited(shared_redis.url, **options)) for _ in range(2)]
    assert [ask_as(live, "ada").status for live in lives] == [200, 200]
    for live in lives:
        assert_limited(ask_as(live, "ada"))
    assert len(chatstream_provider.requests()) == 2


def test_each_worker_for_itself(chatstream_live: Serve) -> None:
    lives = [chatstream_live(limited()) for _ in range(2)]
    assert [ask_as(live, "ada").status for live in lives * 2] == [200] * 4


# Flask-Login


def test_flask_login_names_the_owner(
    chatstream_live: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """By a plain str, in `identify` and in who listens, where there is no request any more."""
    app = Flask("host")
    app.config.update(SECRET_KEY="x")
    logins = LoginManager(app)
    seen: list[Any] = []

    class User(UserMixin):
        def __init__(self, id: str) -> None:
            self.id = id

    logins.user_loader(User)
    ChatStream(app, identify=lambda: current_user.get_id())

    @app.post("/login")
    def login() -> str:
        login_user(User(request.form["name"]))
        return "in"

    @stream_ended.connect_via(app)
    def keep(app: Flask, outcome: Any) -> None:
        seen.append((type(outcome.owner), outcome.owner))
        seen.append((flask.has_request_context(), bool(current_user)))

    live = chatstream_live(app)
    assert live.ask("Hello?").status == 401
    live.post("/login", data={"name": "7"})
    with caplog.at_level(logging.INFO, "chatstream"):
        live.outcome(live.ask("Hello?", script={"tokens": 1, "rate": 0}))
    assert seen == [(str, "7"), (False, False)]
    assert "a listener failed" not in caplog.text


# Flask-WTF


@pytest.fixture
def guarded(chat: MakeChat) -> Chat:
    """An app with Flask-WTF's CSRFProtect and a route that gives a token."""
    app = flask.Flask("host")
    app.config.update(SECRET_KEY="x", WTF_CSRF_ENABLED=True)
    app.extensions["guard"] = CSRFProtect(app)
    app.add_url_rule("/token", view_func=generate_csrf)
    return chat(app)


def test_csrf_protection_covers_the_routes(guarded: Chat, provider: responses.RequestsMock) -> None:
    """Under CSRFProtect a POST without a token is the app's 400, before anything is opened."""
    assert [response.status_code for response in (guarded.post(), guarded.cancel("/s-1"))] == [
        400,
        400,
    ]
    assert len(provider.calls) == 0


def test_csrf_token(guarded: Chat, answers: responses.RequestsMock) -> None:
    """With the token in its header both routes work."""
    headers = {"X-CSRFToken": guarded.client.get("/token").text}
    assert guarded.post(headers=headers).data == EVENT + DONE
    assert_not_found(guarded.cancel("/s-1", headers=headers))


def test_csrf_exemption(guarded: Chat, answers: responses.RequestsMock) -> None:
    """The blueprint can be exempted as docs/mount.md says."""
    guarded.app.extensions["guard"].exempt(guarded.app.blueprints["chatstream"])
    assert guarded.post().data == EVENT + DONE
    assert_not_found(guarded.cancel("/s-1"))


# What an app puts in our body's place: Flask-Compress, a filter of its own


def compressed(**config: Any) -> Flask:
    app = make(CHATSTREAM_OPENAI_PREFIX="/v1", COMPRESS_MIN_SIZE=0, **config)
    Compress(app)
    return app


def whole_answer(live: Live, **script: Any) -> requests.Response:
    """As OpenAI's clients ask for an answer in one piece. Says that it takes deflate."""
    question = {**QUESTION, "simulate": script}
    headers = {"X-User": "ada", "Accept-Encoding": "deflate"}
    return requests.post(f"{live.url}/v1/chat/completions", json=question, headers=headers)


def test_flask_compress_with_its_defaults(chatstream_live: Serve) -> None:
    """An answer in one piece says that it is compressed, and is."""
    live = chatstream_live(compressed())
    reply = whole_answer(live, tokens=3, rate=0)
    assert reply.headers["Content-Encoding"] == "deflate"
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


def test_flask_compress_of_a_refusal(chatstream_live: Serve) -> None:
    """Nothing was compressed, and nothing says so: the provider's status, and a body to be read."""
    live = chatstream_live(compressed())
    reply = whole_answer(live, status=429, retry_after=7)
    assert reply.status_code == 429
    assert reply.headers["Retry-After"] == "7"
    assert "Content-Encoding" not in reply.headers
    assert reply.json()["error"]["code"] == "upstream_rate_limited"


def test_flask_compress_of_events(chatstream_live: Serve) -> None:
    """Told to take event streams, it is given them piece by piece."""
    live = chatstream_live(compressed(COMPRESS_MIMETYPES=[EVENTS]))
    question = {**QUESTION, "simulate": {"text": "Once upon a time.", "tokens": 4, "rate": 0}}
    headers = {"X-User": "ada", "Accept-Encoding": "deflate"}
    reply = requests.post(f"{live.url}{STREAM}", json=question, headers=headers)
    assert reply.headers["Content-Encoding"] == "deflate"
    assert reply.text.endswith("data: [DONE]\n\n")


def masking(word: bytes) -> Flask:
    """An app that lets a word out to nobody."""
    app = make()

    @app.after_request
    def mask(response: flask.Response) -> flask.Response:
        pieces = response.response
        if response.mimetype == EVENTS:
            response.response = (piece.replace(word, b"****") for piece in pieces)
            response.call_on_close(pieces.close)
        return response

    return app


def test_a_filter_of_the_apps_own(chatstream_live: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """It sees all that goes out, while it goes out; the operator is told what that costs."""
    live = chatstream_live(masking(b"secret"))
    live.headers["X-User"] = "ada"
    script = {"text": "It is secret.", "tokens": 3, "rate": 0}
    answer = live.ask("Hello?", script={**script, "silent_after": 3})
    answer.wait(events=2)
    assert answer.cancel().status == 200
    assert "secret" not in answer.read()
    assert "****" in answer.read()
    assert live.outcome(answer).kind is Kind.ABORTED


def test_a_stop_where_the_app_has_put_a_filter(
    chatstream_live: Serve, chatstream_provider: Provider
) -> None:
    """By a cancel and by a close, before a word and after: the provider is told as ever."""
    live = chatstream_live(masking(b"secret"))
    live.headers["X-User"] = "ada"
    for script, events in (({"headers_after": 60}, 0), ({"silent_after": 2}, 2)):
        for stop in (Answer.cancel, Answer.close):
            answer = live.ask("Hello?", script=script, wait=bool(events))
            if events:
                answer.wait(events)
            chatstream_provider.wait(answer)
            stop(answer)
            assert chatstream_provider.told(answer).tokens_after == 0
            assert live.outcome(answer).cause in (Cause.CLIENT, Cause.CANCEL)


def test_another_body_in_the_place_of_ours(chatstream_live: Serve) -> None:
    """The provider is never asked for what nobody is sent."""
    app = make()

    @app.after_request
    def replace(response: flask.Response) -> flask.Response:
        response.set_data("Closed for today.")
        return response

    live = chatstream_live(app)
    live.headers["X-User"] = "ada"
    assert live.post(STREAM, json=QUESTION).text == "Closed for today."


@pytest.mark.parametrize("replaced", [False, True])
def test_only_our_own_body_is_left_to_the_loop(replaced: bool) -> None:
    """Our workers detach what says that it can be: the loop would send ours, and not the app's."""
    app = masking(b"secret") if replaced else make()
    asked = EnvironBuilder(method="POST", path=STREAM, json=QUESTION, headers={"X-User": "ada"})
    body: Any = app.wsgi_app(asked.get_environ(), lambda status, headers, error=None: print)
    body.close()
    app.extensions["chatstream"].stop()
    assert isinstance(body, Detachable) is not replaced
