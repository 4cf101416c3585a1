"""cors: which other origins' pages may use the routes, and what of them such a page may see."""

from __future__ import annotations

import builtins
from typing import Any

import flask
import pytest
from flask.testing import FlaskClient

from chatstream import ChatStream
from chatstream.errors import ConfigError

PAGE = "https://chat.example"
ROUTES = ["/api/chat/stream", "/api/chat/cancel/s-1", "/v1/chat/completions", "/v1/models"]


def client(origins: Any = PAGE, **settings: str) -> FlaskClient:
    host = flask.Flask("host")
    host.config.update({"CHATSTREAM_OPENAI_PREFIX": "/v1", "CHATSTREAM_TOKENS": "ann:a-1"})
    host.config.update({f"CHATSTREAM_{key}": value for key, value in settings.items()})
    if origins is not None:
        host.config["CHATSTREAM_CORS_ORIGINS"] = origins
    host.add_url_rule("/mine", view_func=lambda: "mine")
    ChatStream(host)
    return host.test_client()


def preflight(browser: FlaskClient, path: str, origin: str = PAGE) -> dict[str, str]:
    """What a browser is told before a POST with a token and JSON."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization, content-type"
    response = browser.options(path, headers=headers)
    return {name: text for name, text in response.headers if name.startswith("Access-Control-")}


@pytest.mark.parametrize("path", ROUTES)
def test_a_page_of_a_named_origin_may(path: str) -> None:
    """With a token in a header, never with cookies; and it sees the headers that it needs."""
    browser = client()
    allowed = preflight(browser, path)
    assert allowed["Access-Control-Allow-Origin"] == PAGE
    assert "authorization" in allowed["Access-Control-Allow-Headers"].lower()
    assert "content-type" in allowed["Access-Control-Allow-Headers"].lower()
    assert "POST" in allowed["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in allowed
    refused = browser.post(path, headers={"Origin": PAGE})
    assert refused.headers["Access-Control-Allow-Origin"] == PAGE
    seen = refused.headers["Access-Control-Expose-Headers"]
    assert {*seen.split(", ")} == {
        "X-Session-Id", "X-Stream-Id", "Retry-After", "WWW-Authenticate"
    }  # fmt: skip


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://chat.example", f"{PAGE}:444", f"{PAGE}.evil.example", "null"],
)
def test_another_origin_may_not(origin: str) -> None:
    """By its whole name."""
    browser = client()
    assert "Access-Control-Allow-Origin" not in preflight(browser, ROUTES[0], origin)
    response = browser.post(ROUTES[0], headers={"Origin": origin})
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("origins", [None, "off", ""])
def test_off_unless_configured(origins: str | None) -> None:
    """No header of it anywhere."""
    browser = client(origins)
    for path in ROUTES:
        assert preflight(browser, path) == {}
        assert not [n for n, _ in browser.post(path, headers={"Origin": PAGE}).headers if "Ac" in n]


def test_several_origins_and_any() -> None:
    """A list in the app's config, too."""
    browser = client([PAGE, "http://localhost:5173"])
    for origin in (PAGE, "http://localhost:5173"):
        assert preflight(browser, ROUTES[0], origin)["Access-Control-Allow-Origin"] == origin
    anyone = preflight(client("*"), ROUTES[0], "https://whoever.example")
    assert anyone["Access-Control-Allow-Origin"] in ("*", "https://whoever.example")
    assert "Access-Control-Allow-Credentials" not in anyone


def test_the_apps_other_routes_are_its_own() -> None:
    """Also those that begin alike."""
    browser = client()
    for path in ("/mine", "/v1x/models", "/xapi/chat/stream"):
        response = browser.get(path, headers={"Origin": PAGE})
        assert "Access-Control-Allow-Origin" not in response.headers


def test_openais_routes_at_the_root() -> None:
    """Where they are beside all others, those stay the app's own."""
    browser = client(OPENAI_PREFIX="/")
    for path in ("/chat/completions", "/models"):
        assert preflight(browser, path)["Access-Control-Allow-Origin"] == PAGE
    for path in ("/mine", "/models/mine", "/static/x.js", "/"):
        response = browser.get(path, headers={"Origin": PAGE})
        assert "Access-Control-Allow-Origin" not in response.headers


def test_wherever_the_routes_are() -> None:
    """A prefix is no pattern."""
    browser = client(URL_PREFIX="/a.b", OPENAI_PREFIX="off")
    assert preflight(browser, "/a.b/stream")["Access-Control-Allow-Origin"] == PAGE
    assert preflight(browser, "/axb/stream") == {}
    assert preflight(browser, "/v1/models") == {}


def test_without_flask_cors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence says what to install; without the setting nobody asks for it."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "flask_cors":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'chatstream\[cors\]'"):
        client()
    client(None)
