"""extension: what `ChatStream` mounts in an app, and from which settings."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import flask
import pytest
import responses

from chatstream import ChatStream, ConfigError, Service
from chatstream.errors import Busy
from tests.web.chat import DONE, EVENT, URL
from tests.web.desk import PAYLOAD

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_an_app_gets_the_routes(answers: responses.RequestsMock) -> None:
    """`ChatStream(app)` mounts the blueprint, with the settings of app.config."""
    app = flask.Flask("host")
    app.config.update(CHATSTREAM_UPSTREAM_URL=URL, CHATSTREAM_URL_PREFIX="/v1/talk")
    ChatStream(app)
    client = app.test_client()
    response = client.post("/v1/talk/stream", json={"messages": [{"role": "user"}]}, buffered=True)
    assert response.data == EVENT + DONE
    assert client.post("/v1/talk/cancel/x").json == {"ok": False, "reason": "not_found"}
    assert client.post("/api/chat/cancel/x").json is None
    assert "chatstream" in app.blueprints
    app.extensions["chatstream"].stop()


def test_two_apps_are_independent() -> None:
    """One ChatStream in two apps: two services, settings and registries; no app is kept."""
    chat = ChatStream(identify=lambda: "me")
    services: list[Service] = []
    for prefix in ("/one", "/two"):
        app = flask.Flask(prefix[1:])
        app.config.update(CHATSTREAM_URL_PREFIX=prefix, CHATSTREAM_UPSTREAM_URL=URL)
        chat.init_app(app)
        services.append(app.extensions["chatstream"])
        assert app.test_client().post(f"{prefix}/cancel/x").json is not None
    one, two = services
    assert [one.settings.url_prefix, two.settings.url_prefix] == ["/one", "/two"]
    iterable = one.open(PAYLOAD, session_id="s-1", owner="me")
    assert two.abort("s-1", owner="me") is False
    assert one.abort("s-1", owner="me") is True
    iterable.close()
    assert not [value for value in vars(chat).values() if isinstance(value, flask.Flask)]
    for service in services:
        service.stop()


def test_a_process_joins_with_its_first_request(short_base: Path) -> None:
    """Whichever it is, an app's own too: no cancel has to wait for that then."""
    app = flask.Flask("host")
    app.config["CHATSTREAM_BUS"] = f"unix://{short_base}"
    app.add_url_rule("/hello", view_func=lambda: "hello")
    ChatStream(app)
    assert not [*short_base.iterdir()]
    assert app.test_client().get("/hello").text == "hello"
    assert [*short_base.iterdir()]
    app.extensions["chatstream"].stop()


def test_who_cannot_join_yet_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bus without room is a matter of streams; and it is tried again."""
    tries: list[object] = []

    def crowded(*arguments: object) -> NoReturn:
        tries.append(arguments)
        raise Busy("no room")

    monkeypatch.setattr("chatstream.bus.create", crowded)
    app = flask.Flask("host")
    app.add_url_rule("/hello", view_func=lambda: "hello")
    ChatStream(app)
    assert [app.test_client().get("/hello").text for _ in range(2)] == ["hello"] * 2
    assert len(tries) == 2


def test_a_wrong_setting_stops_the_start() -> None:
    """ConfigError at init_app, and nothing is mounted."""
    app = flask.Flask("host")
    app.config["CHATSTREAM_PING_INTERVAL"] = "often"
    with pytest.raises(ConfigError, match="CHATSTREAM_PING_INTERVAL must be a number"):
        ChatStream(app)
    assert "chatstream" not in app.blueprints
    assert "chatstream" not in app.extensions


def test_the_environment_is_read_once_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment sets what app.config does not; a later change has no effect."""
    monkeypatch.setenv("CHATSTREAM_MODEL", "from-environ")
    app = flask.Flask("host")
    ChatStream(app)
    monkeypatch.setenv("CHATSTREAM_MODEL", "later")
    assert app.extensions["chatstream"].settings.model == "from-environ"


@pytest.mark.parametrize("hooks", [("identify",), ("admin",), ("identify", "admin")])
@pytest.mark.parametrize("key", ["CHATSTREAM_TOKENS", "CHATSTREAM_ADMIN_TOKENS"])
def test_one_says_who_may(hooks: tuple[str, ...], key: str) -> None:
    """Tokens and an app's own hooks: a ConfigError says to choose, before anything is mounted."""
    app = flask.Flask("both")
    app.config[key] = "7:secret"
    with pytest.raises(ConfigError, match="Remove the one or the other"):
        ChatStream(app, **dict.fromkeys(hooks, lambda: True))
    assert not [rule for rule in app.url_map.iter_rules() if "/api/chat" in rule.rule]
