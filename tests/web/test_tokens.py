"""tokens: who may, by the header of a request; and that how long it takes says nothing."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import flask
import pytest
import responses

from chatstream import ChatStream
from chatstream.errors import ConfigError
from chatstream.settings.table import Settings
from chatstream.web import tokens
from chatstream.web.tokens import CHALLENGE, Tokens

URL = "https://provider.test/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SETTINGS = {
    "CHATSTREAM_TOKENS": "ann:a-1,ann:a-2,bob:b-1,bare",
    "CHATSTREAM_ADMIN_TOKENS": "root:r-1,ann:a-3",
}
BARE = Settings.load(SETTINGS, {}).tokens[-1].owner

Who = tuple[str | None, bool]


def who(header: str | None, settings: dict[str, str] | None = None) -> Who:
    """The owner and whether an admin, of a request with this Authorization."""
    known = Tokens(Settings.load(SETTINGS if settings is None else settings, {}))
    headers = {} if header is None else {"Authorization": header}
    with flask.Flask("host").test_request_context(headers=headers):
        return known.identify(), known.is_admin()


NOBODY: Who = (None, False)


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        ("a-1", ("ann", False)),
        ("a-2", ("ann", False)),
        ("b-1", ("bob", False)),
        ("bare", (BARE, False)),
        ("r-1", ("root", True)),
        ("a-3", ("ann", True)),
    ],
)
def test_each_token_has_its_owner(secret: str, expected: Who) -> None:
    """Several may be one's; of which some may be an admin's."""
    assert who(f"Bearer {secret}") == expected


def test_a_bare_tokens_owner_is_a_name_that_is_not_the_token() -> None:
    """The same in every process, and nothing of the token is in it."""
    assert Settings.load(SETTINGS, {}).tokens[-1].owner == BARE
    assert "bare" not in BARE


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("gap", [" ", "  ", " \t"])
def test_the_schemes_case_says_nothing(scheme: str, gap: str) -> None:
    """RFC 9110, section 11.1; nor does the space behind it."""
    assert who(f"{scheme}{gap}a-1 ") == ("ann", False)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        " ",
        "a-1",
        "Bearer",
        "Bearer ",
        "Bearera-1",
        "Basic a-1",
        "Basic YW5uOmEtMQ==",
        "Token a-1",
        "a-1 Bearer",
        "Bearer ann:a-1",
        "Bearer ann",
        "Bearer a-",
        "Bearer a-11",
        "Bearer A-1",
        "Bearer a-1 x",
        "Bearer a-1,b-1",
        'Bearer "a-1"',
        "Bearer Bearer a-1",
        "Bearer \xe9\xff",
        "Bearer " + "x" * 100_000,
    ],
    ids=lambda header: repr(header)[:24],
)
def test_other_headers_are_nobodys(header: str | None) -> None:
    """Whatever is in them: it is no error, and nobody."""
    assert who(header) == NOBODY


def test_without_a_token_nobody_has_one() -> None:
    """An empty secret matches none."""
    assert who("Bearer ", {}) == who("", {}) == who(None, {}) == NOBODY


@pytest.mark.parametrize("secret", ["a-1", "b-1", "a-3", "wrong", ""])
@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_each_request_is_compared_with_all(
    monkeypatch: pytest.MonkeyPatch, scheme: str, secret: str
) -> None:
    """By `hmac.compare_digest`, digests of one length, whichever matches, or none."""
    compared: list[tuple[bytes, bytes]] = []

    class Counting:
        @staticmethod
        def compare_digest(known: bytes, given: bytes) -> bool:
            compared.append((known, given))
            return hmac.compare_digest(known, given)

    monkeypatch.setattr(tokens, "hmac", Counting)
    known = Tokens(Settings.load(SETTINGS, {}))
    headers = {"Authorization": f"{scheme} {secret}"}
    with flask.Flask("host").test_request_context(headers=headers):
        known.identify()
    assert len({known for known, _ in compared}) == len(compared) == 6
    assert {len(digest) for pair in compared for digest in pair} == {32}


# In an app


def app(identify: Callable[[], Any] | None = None, **more: Any) -> flask.Flask:
    host = flask.Flask("host")
    host.config.update(SETTINGS, CHATSTREAM_UPSTREAM_URL=URL, CHATSTREAM_OPENAI_PREFIX="/v1")
    ChatStream(host, identify=identify, **more)
    return host


ROUTES = [
    ("POST", "/api/chat/stream"),
    ("POST", "/api/chat/cancel/s-1"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic a-1"])
def test_who_has_none_is_told_how(method: str, path: str, header: str | None) -> None:
    """401 with a challenge (RFC 9110, section 15.5.2), whatever else is wrong with the request."""
    headers = {} if header is None else {"Authorization": header}
    response = app().test_client().open(path, method=method, headers=headers, data=b"{")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == CHALLENGE == 'Bearer realm="chatstream"'
    assert b"unauthenticated" in response.data
    assert b"Send a token: Authorization: Bearer" in response.data


@pytest.mark.parametrize("more", [{"identify": lambda: "x"}, {"admin": lambda: True}])
@pytest.mark.parametrize("key", SETTINGS)
def test_an_app_that_knows_who_asks_has_no_tokens(more: dict[str, Any], key: str) -> None:
    """Which of the two holds would be a guess: start-up ends, and nothing of a token is said."""
    host = flask.Flask("host")
    host.config[key] = SETTINGS[key]
    with pytest.raises(ConfigError, match="Remove the one or the other") as caught:
        ChatStream(host, **more)
    assert "a-1" not in str(caught.value)


def test_an_apps_own_401_has_no_challenge() -> None:
    """Its login is its own."""
    host = flask.Flask("host")
    ChatStream(host, identify=lambda: None)
    response = host.test_client().post("/api/chat/stream", json=CHAT)
    assert response.status_code == 401
    assert "WWW-Authenticate" not in response.headers


@responses.activate
def test_a_token_is_not_the_providers_and_names_the_streams_owner() -> None:
    """It goes no further; another's cancel finds nothing, one's other token finds it."""
    responses.post(URL, body=b"data: [DONE]\n\n", content_type="text/event-stream")
    host = app()
    client, service = host.test_client(), host.extensions["chatstream"]
    ann = {"Authorization": "Bearer a-1"}
    assert client.post("/api/chat/stream", json=CHAT, headers=ann, buffered=True).status_code == 200
    sent = responses.calls[0].request
    assert "a-1" not in repr(sent.headers) + repr(sent.body)
    held = service.open(b"", session_id="s-1", owner="ann")
    try:
        for secret, status in (("b-1", 404), ("a-2", 200)):
            headers = {"Authorization": f"Bearer {secret}"}
            response = client.post("/api/chat/cancel/s-1", headers=headers)
            assert response.status_code == status
    finally:
        held.close()
        service.stop()
