"""standalone: the service's app, from the environment; what it says when it starts."""

from __future__ import annotations

import logging
import os

import flask
import pytest

from chatstream import ConfigError, Service
from chatstream.web import standalone

WARNING = "The service is open: whoever reaches it can ask"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of this machine's."""
    for name in list(os.environ):
        if name.startswith(("CHATSTREAM_", "DEEPSEEK_")):
            monkeypatch.delenv(name)


def rules(app: flask.Flask) -> set[str]:
    return {rule.rule for rule in app.url_map.iter_rules()}


def test_what_is_on() -> None:
    """The page, the chat's routes and OpenAI's, and nothing of Flask's own."""
    there = rules(standalone.create_app())
    assert {"/", "/api/chat/stream", "/v1/chat/completions", "/v1/models"} <= there


def test_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what is on by itself."""
    monkeypatch.setenv("CHATSTREAM_PAGE", "off")
    monkeypatch.setenv("CHATSTREAM_OPENAI_PREFIX", "/ai")
    monkeypatch.setenv("CHATSTREAM_URL_PREFIX", "/talk")
    there = rules(standalone.create_app())
    assert {"/talk/stream", "/ai/models"} <= there
    assert not {"/", "/v1/models", "/api/chat/stream"} & there


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSTREAM_TOKENS", "a:b:secret")
    with pytest.raises(ConfigError, match="CHATSTREAM_TOKENS") as caught:
        standalone.create_app()
    assert "secret" not in str(caught.value)


def test_a_key_with_a_typo_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A key of ours is none, nor what Kubernetes sets for a service that is called chatstream."""
    standalone.warn_of_typos(["CHATSTREAM_DRAIN", "CHATSTREAM_PORT_8000_TCP_ADDR", "DRIAN", "PATH"])
    assert caplog.messages == []
    standalone.warn_of_typos(["PATH", "CHATSTREAM_TOKNES"])
    assert caplog.messages == [
        "CHATSTREAM_TOKNES is read by nobody. Did you mean CHATSTREAM_TOKENS?"
    ]


@pytest.mark.parametrize(
    ("key", "value", "warns"),
    [
        (None, "", True),
        ("CHATSTREAM_TOKENS", "", True),
        ("CHATSTREAM_TOKENS", " ", True),
        ("CHATSTREAM_TOKENS", "ann:a-1", False),
        ("CHATSTREAM_ADMIN_TOKENS", "r-1", False),
    ],
)
def test_an_open_service_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str | None,
    value: str,
    warns: bool,
) -> None:
    """In one line with what to set; a closed one says nothing, least of all its tokens."""
    if key:
        monkeypatch.setenv(key, value)
    app = standalone.create_app()
    with caplog.at_level(logging.INFO, "chatstream"):
        standalone.warn_if_open(app)
    assert [WARNING in message for message in caplog.messages] == ([True] if warns else [])
    assert all("CHATSTREAM_TOKENS" in message for message in caplog.messages)
    service: Service = app.extensions["chatstream"]
    assert (service.identify is None) is warns
    status = app.test_client().post("/api/chat/cancel/s").status_code
    assert status == (404 if warns else 401)
