"""config: every key's default, where it is read, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from chatstream.errors import ConfigError
from chatstream.settings.checks import Token
from chatstream.settings.table import Settings

DEFAULTS = {
    "url_prefix": "/api/chat",
    "page": None,
    "openai_prefix": None,
    "log_format": "text",
    "metrics": None,
    "meter": False,
    "upstream_url": "https://api.deepseek.com/chat/completions",
    "api_key": "",
    "model": "deepseek-chat",
    "include_usage": False,
    "on_conflict": "supersede",
    "health": None,
    "on_disconnect": "abort",
    "allowed_models": None,
    "max_tokens": None,
    "max_tokens_field": "max_tokens",
    "tokens": (),
    "admin_tokens": (),
    "cors_origins": None,
    "detach": True,
    "max_body": 1024 * 1024,
    "max_streams": None,
    "max_streams_per_owner": None,
    "bus": None,
    "bus_prefix": "chatstream",
    "bus_ttl": 45.0,
    "ping_interval": 15.0,
    "upstream_connect_timeout": 5.0,
    "upstream_headers_timeout": 600.0,
    "upstream_idle_timeout": 120.0,
    "stream_deadline": None,
    "send_timeout": 30.0,
    "drain": 25.0,
    "request_timeout": 10.0,
    "headers_timeout": 12.0,
    "keepalive_timeout": 5.0,
}


def test_defaults() -> None:
    """Without a setting, each key has the default that is documented; no key is left out."""
    assert dataclasses.asdict(Settings.load({}, {})) == DEFAULTS


GOOD = [
    ("URL_PREFIX", "/v1/talk", "/v1/talk"),
    ("PAGE", "/", "/"),
    ("PAGE", "/chat", "/chat"),
    ("PAGE", "off", None),
    ("PAGE", "", None),
    ("OPENAI_PREFIX", "/v1", "/v1"),
    ("OPENAI_PREFIX", "0", None),
    ("HEALTH", "/", "/"),
    ("HEALTH", "off", None),
    ("LOG_FORMAT", "json", "json"),
    ("METRICS", "/metrics", "/metrics"),
    ("METRICS", "off", None),
    ("METER", "1", True),
    ("UPSTREAM_URL", " http://127.0.0.1:9000/v1/chat?x=1 ", "http://127.0.0.1:9000/v1/chat?x=1"),
    ("UPSTREAM_URL", "https://[::1]:8443/", "https://[::1]:8443/"),
    ("API_KEY", " sk-abc\n", "sk-abc"),
    ("MODEL", "gpt-x", "gpt-x"),
    ("INCLUDE_USAGE", "1", True),
    ("INCLUDE_USAGE", "Off", False),
    ("ON_CONFLICT", "reject", "reject"),
    ("ON_DISCONNECT", "finish", "finish"),
    ("ALLOWED_MODELS", " deepseek-chat , gpt/x:1 ", ("deepseek-chat", "gpt/x:1")),
    ("ALLOWED_MODELS", "off", None),
    ("ALLOWED_MODELS", "", None),
    ("MAX_TOKENS", "4096", 4096),
    ("MAX_TOKENS", "off", None),
    ("MAX_TOKENS_FIELD", "max_completion_tokens", "max_completion_tokens"),
    ("TOKENS", "ann:a-1, bob@x.org:b/+~=2\n", (Token("ann", "a-1"), Token("bob@x.org", "b/+~=2"))),
    ("TOKENS", "ann:one,ann:two", (Token("ann", "one"), Token("ann", "two"))),
    ("TOKENS", "bare", (Token("token-9b828d53402d", "bare"),)),
    ("TOKENS", "", ()),
    ("ADMIN_TOKENS", "root:r-1", (Token("root", "r-1"),)),
    (
        "CORS_ORIGINS",
        "https://a.example, http://[::1]:8080",
        ("https://a.example", "http://[::1]:8080"),
    ),
    ("CORS_ORIGINS", "*", ("*",)),
    ("CORS_ORIGINS", "off", None),
    ("DETACH", "0", False),
    ("MAX_BODY", "2048", 2048),
    ("MAX_STREAMS", "1", 1),
    ("MAX_STREAMS_PER_OWNER", " 10000 ", 10_000),
    ("MAX_STREAMS_PER_OWNER", "off", None),
    ("MAX_STREAMS_PER_OWNER", "0", None),
    ("MAX_STREAMS_PER_OWNER", "", None),
    ("BUS", "local", "local"),
    ("BUS", " unix\n", "unix"),
    ("BUS", "unix:///run/chat stream", "unix:///run/chat stream"),
    ("BUS", "redis://host:6379/0", "redis://host:6379/0"),
    ("BUS", "redis://host", "redis://host"),
    ("BUS", "redis://host/", "redis://host/"),
    ("BUS", "rediss://host/15", "rediss://host/15"),
    ("BUS", "redis://[::1]:6379/1?socket_timeout=1", "redis://[::1]:6379/1?socket_timeout=1"),
    ("BUS", "rediss://user:p%40ss@host:6380/0", "rediss://user:p%40ss@host:6380/0"),
    ("BUS_PREFIX", "chat-1:prod", "chat-1:prod"),
    ("BUS_TTL", "20", 20.0),
    ("BUS_TTL", "3", 3.0),
    ("PING_INTERVAL", "0.5", 0.5),
    ("UPSTREAM_CONNECT_TIMEOUT", "2", 2.0),
    ("UPSTREAM_HEADERS_TIMEOUT", "604800", 604800.0),
    ("UPSTREAM_IDLE_TIMEOUT", "1e1", 10.0),
    ("STREAM_DEADLINE", "60", 60.0),
    ("STREAM_DEADLINE", "off", None),
    ("STREAM_DEADLINE", "0", None),
    ("STREAM_DEADLINE", "", None),
    ("SEND_TIMEOUT", "60", 60.0),
    ("DRAIN", "0", 0.0),
    ("DRAIN", "12.5", 12.5),
    ("REQUEST_TIMEOUT", "20", 20.0),
    ("HEADERS_TIMEOUT", "24", 24.0),
    ("KEEPALIVE_TIMEOUT", "2", 2.0),
]


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_the_environment_sets_a_key(key: str, text: str, value: Any) -> None:
    """A key in the environment is read, trimmed and made what it is."""
    settings = Settings.load({}, {f"CHATSTREAM_{key}": text})
    assert value == getattr(settings, key.lower())


def test_every_key_is_tried_above() -> None:
    """The table of good values leaves no key out."""
    assert {name.upper() for name in DEFAULTS} == {key for key, _, _ in GOOD}


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("MAX_BODY", 10, 10),
        ("PING_INTERVAL", 3, 3.0),
        ("INCLUDE_USAGE", True, True),
        ("STREAM_DEADLINE", None, None),
        ("STREAM_DEADLINE", 0, None),
        ("STREAM_DEADLINE", 1.5, 1.5),
        ("ALLOWED_MODELS", ["deepseek-chat", " b "], ("deepseek-chat", "b")),
        ("ALLOWED_MODELS", ("deepseek-chat",), ("deepseek-chat",)),
        ("MAX_TOKENS", 0, None),
        ("CORS_ORIGINS", ["https://a.example"], ("https://a.example",)),
    ],
)
def test_the_apps_config_may_hold_python_values(key: str, given: Any, value: Any) -> None:
    """What an app sets in Python need not be text."""
    settings = Settings.load({f"CHATSTREAM_{key}": given}, {})
    assert value == getattr(settings, key.lower())


def test_the_apps_config_wins() -> None:
    """A key in app.config is taken before the same key in the environment."""
    settings = Settings.load({"CHATSTREAM_MODEL": "app"}, {"CHATSTREAM_MODEL": "environ"})
    assert settings.model == "app"


@pytest.mark.parametrize(
    ("config", "environ", "key"),
    [
        ({}, {"DEEPSEEK_API_KEY": "deep"}, "deep"),
        ({"DEEPSEEK_API_KEY": "deep"}, {}, "deep"),
        ({}, {"CHATSTREAM_API_KEY": "own", "DEEPSEEK_API_KEY": "deep"}, "own"),
        ({}, {"CHATSTREAM_API_KEY": "", "DEEPSEEK_API_KEY": "deep"}, "deep"),
        ({"CHATSTREAM_API_KEY": "own"}, {"DEEPSEEK_API_KEY": "deep"}, "own"),
        ({}, {"CHATSTREAM_API_KEY": "", "DEEPSEEK_API_KEY": ""}, ""),
    ],
)
def test_the_key_falls_back_to_deepseeks(
    config: dict[str, str], environ: dict[str, str], key: str
) -> None:
    """CHATSTREAM_API_KEY, where it is not empty, else DEEPSEEK_API_KEY, else none."""
    assert key == Settings.load(config, environ).api_key


BAD = {
    "URL_PREFIX": ["", "/", "api", "/api/", "//api", "/a b", "/<id>", 7],
    "PAGE": ["chat", "/chat/", "//", "1", 7],
    "OPENAI_PREFIX": ["v1", "/v1/", "/v 1", True],
    "HEALTH": ["health", "/health/", 7],
    "METER": ["", "2", 7],
    "UPSTREAM_URL": [
        "",
        "api.deepseek.com",
        "ftp://host/",
        "http://",
        "http:///path",
        "http://host:99999/",
        "http://host:0/",
        "http://host:x/",
        "http://[::1/",
        "http://host/a b",
        "http://host/\x00",
        7,
    ],
    "MODEL": ["", "  ", 7],
    "INCLUDE_USAGE": ["", "2", "maybe", 7],
    "ON_CONFLICT": ["", "Reject", "drop", 7],
    "ON_DISCONNECT": ["", "Abort", "detach", 7],
    "ALLOWED_MODELS": ["a,,b", ",", "a,", 7, ["a", ""], ["a", 7], {"a"}],
    "MAX_TOKENS": ["-1", "1.5", "many", True, 1.5],
    "MAX_TOKENS_FIELD": ["", "max_new_tokens", 7],
    "CORS_ORIGINS": [
        "a.example",
        "https://a.example/",
        "https://a b",
        "null",
        "https://*.x.org",
        7,
    ],
    "DETACH": ["", "2", "maybe", 7],
    "MAX_BODY": ["", "0", "-1", "1.5", "1e3", "1_000", "x", "٣", True, 0, 1.5, "1" * 13],
    "MAX_STREAMS": ["", "0", "-1", "x", False],
    "MAX_STREAMS_PER_OWNER": ["-1", "x", "1.5", "10001", True],
    "BUS_PREFIX": ["", " ", "a b", "a/b", "a*", "{x}", "žluť", "x" * 65, "x\n", 7],
    "BUS_TTL": ["", "0", "-1", "off", "nan", "inf", "2.9", 2, "604801", True],
    "PING_INTERVAL": ["", "0", "-1", "nan", "inf", "x", "604801", True, [], 10**400],
    "UPSTREAM_CONNECT_TIMEOUT": ["", "0", "off", "nan"],
    "UPSTREAM_HEADERS_TIMEOUT": ["", "0", "off", "nan"],
    "UPSTREAM_IDLE_TIMEOUT": ["", "0", "off", "nan"],
    "STREAM_DEADLINE": ["-1", "never", "nan", "inf", True],
    "SEND_TIMEOUT": ["", "0", "off", "nan"],
    "DRAIN": ["", "-1", "off", "nan", "inf", "86401"],
    "REQUEST_TIMEOUT": ["", "0", "off", "nan"],
    "HEADERS_TIMEOUT": ["", "0", "off", "nan"],
    "KEEPALIVE_TIMEOUT": ["", "0", "off", "nan"],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key}-{value!r:.20}")
        for key, values in BAD.items()
        for value in values
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any) -> None:
    """A wrong value raises ConfigError with a sentence: the key, what it takes, what it got."""
    with pytest.raises(ConfigError) as caught:
        Settings.load({f"CHATSTREAM_{key}": value}, {})
    message = str(caught.value)
    assert message.startswith(f"CHATSTREAM_{key} must be ")
    assert message.endswith(f", not {value!r}.")


@pytest.mark.parametrize("url", ["api.deepseek.com", "http://[::1/", "http://host:x/"])
def test_a_wrong_address_is_told_what_an_address_is(url: str) -> None:
    """Whatever is wrong with the address, the sentence says what a good one looks like."""
    with pytest.raises(ConfigError, match="must be an http:// or https:// address such as"):
        Settings.load({"CHATSTREAM_UPSTREAM_URL": url}, {})


@pytest.mark.parametrize("key", ["CHATSTREAM_API_KEY", "DEEPSEEK_API_KEY"])
@pytest.mark.parametrize("value", ["sk-šecret", "sk-\x00ecret", "sk-sec\r\nret: x", 12345])
def test_a_wrong_key_is_named_and_not_shown(key: str, value: Any) -> None:
    """A key that cannot go into a header is refused by name; nothing of it is shown."""
    with pytest.raises(ConfigError, match=f"^{key} must be a key of printable ASCII") as caught:
        Settings.load({key: value}, {})
    assert "ecret" not in str(caught.value)
    assert "sec" not in str(caught.value)
    assert "12345" not in str(caught.value)


BAD_TOKENS = [
    ",",
    " , ,",
    "žluť-secret",
    "a:b:secret",
    ":secret",
    "a b:",
    "a/b:secret",
    "x" * 65 + ":secret",
]


@pytest.mark.parametrize("key", ["TOKENS", "ADMIN_TOKENS"])
@pytest.mark.parametrize(
    "value", [*BAD_TOKENS, "a:secret,b:secret", "secret,a:secret", 7, ["secret"]]
)
def test_wrong_tokens_are_named_and_not_shown(key: str, value: Any) -> None:
    """What no header can carry, what is no owner, and a token of two owners."""
    with pytest.raises(ConfigError, match=rf"^CHATSTREAM_{key} must be tokens") as caught:
        Settings.load({f"CHATSTREAM_{key}": value}, {})
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(caught.value.__cause__)


def test_repr_hides_the_tokens() -> None:
    """As it does the key."""
    settings = Settings.load({}, {"CHATSTREAM_TOKENS": "ann:sec", "CHATSTREAM_ADMIN_TOKENS": "ret"})
    assert settings.tokens[0].secret + settings.admin_tokens[0].secret == "secret"
    assert not re.search("'sec'|'ret'|ann", f"{settings!r}{settings}")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"MODEL": "a", "ALLOWED_MODELS": "b,c"}, "CHATSTREAM_MODEL must be one of"),
        ({"ALLOWED_MODELS": []}, "CHATSTREAM_MODEL must be one of"),
        ({"TOKENS": "a:x", "ADMIN_TOKENS": "b:x"}, "must not be both in CHATSTREAM_TOKENS"),
        ({"TOKENS": "x", "ADMIN_TOKENS": "x"}, "must not be both in CHATSTREAM_TOKENS"),
        (
            {"PAGE": "/", "METRICS": "/"},
            "CHATSTREAM_METRICS are both at /:",
        ),
        (
            {"HEALTH": "/", "METRICS": "/readyz"},
            "CHATSTREAM_HEALTH are both at /readyz",
        ),
        (
            {"HEALTH": "/a", "PAGE": "/a/healthz"},
            "are both at /a/healthz",
        ),
    ],
)
def test_settings_that_contradict_each_other(config: dict[str, Any], words: str) -> None:
    """Each good, but not together: a fault as any, also where all are looked for."""
    named = {f"CHATSTREAM_{key}": value for key, value in config.items()}
    with pytest.raises(ConfigError, match=words):
        Settings.load(named, {})
    assert [words in fault for fault in Settings.survey(named, {})[1]] == [True]


def test_paths_that_do_not_meet() -> None:
    """The page beside what health has below it; what is off is nowhere."""
    Settings.load({"CHATSTREAM_PAGE": "/", "CHATSTREAM_HEALTH": "/"}, {})
    Settings.load({"CHATSTREAM_PAGE": "/readyz", "CHATSTREAM_METRICS": "/m"}, {})


def test_an_owner_may_have_tokens_of_both_kinds() -> None:
    """A plain one for every day, and another as an admin."""
    Settings.load({"CHATSTREAM_TOKENS": "ann:x", "CHATSTREAM_ADMIN_TOKENS": "ann:y"}, {})


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    """An address with a login is refused (it would travel beside the key), without repeating it."""
    with pytest.raises(ConfigError, match=r"^CHATSTREAM_UPSTREAM_URL must be ") as caught:
        Settings.load({"CHATSTREAM_UPSTREAM_URL": "https://user:hunter2@host/v1"}, {})
    assert "hunter2" not in str(caught.value)


BAD_BUSES = [
    "",
    "Local",
    "tcp",
    "local://",
    "unix:",
    "unix:/run",
    "unix://",
    "unix://run/chatstream",
    "/run/chatstream",
    "unix:///run/\x00",
    "redis",
    "redis:",
    "redis://",
    "redis:///0",
    "redis://:6379/0",
    "redis://host:0/0",
    "redis://host:99999/0",
    "redis://host:port/0",
    "redis://[::1/0",
    "redis://host/word",
    "redis://host/0/1",
    "redis://host/-1",
    "redis://host/٣",
    "redis://host/0\nx",
    "http://host:6379/0",
    "unix+redis:///run/redis.sock",
    "valkey://host:6379/0",
    7,
    True,
]


@pytest.mark.parametrize("value", BAD_BUSES, ids=repr)
def test_a_wrong_bus_is_told_what_there_is(value: Any) -> None:
    """Whatever is wrong with it, the sentence names the key and all that it takes."""
    with pytest.raises(ConfigError) as caught:
        Settings.load({"CHATSTREAM_BUS": value}, {})
    message = str(caught.value)
    assert message.startswith(
        "CHATSTREAM_BUS must be local, unix, unix:///a/directory, or redis://"
    )
    assert message.endswith(", not of a Cluster or a Sentinel.")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a:26379/mymaster/0",
        "redis-sentinel://a:26379/mymaster",
        "sentinel://a:26379/mymaster",
        "redis+cluster://a:7000",
        "rediss+cluster://a:7000",
        "redis-cluster://a:7000",
        "redis://a:1,b:2/0",
        "redis://a,b/0",
        "rediss://a,b",
        "redis://a:7000,b:7000,c:7000",
    ],
)
def test_several_servers_are_not_one(url: str) -> None:
    """The addresses that others have for a Cluster or a Sentinel are refused, in these words."""
    with pytest.raises(ConfigError, match=r"of one server, not of a Cluster or a Sentinel\.$"):
        Settings.load({"CHATSTREAM_BUS": url}, {})


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:hunter2@host:port/0",
        "redis://:hunter2@a:1,b:2/0",
        "redis+sentinel://:hunter2@a:26379/mymaster",
        "redis://host:x/0?password=hunter2",
        "redis:/user:hunter2",
    ],
)
@pytest.mark.parametrize("where", ["config", "environ"])
def test_a_password_of_a_bus_is_not_shown(url: str, where: str) -> None:
    """A wrong address is not repeated: it may hold a password in any of its places."""
    config = {"CHATSTREAM_BUS": url} if where == "config" else {}
    environ = {"CHATSTREAM_BUS": url} if where == "environ" else {}
    with pytest.raises(ConfigError, match=r"^CHATSTREAM_BUS must be ") as caught:
        Settings.load(config, environ)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_repr_hides_the_bus() -> None:
    """Settings can be printed and logged: the server's password is not in them."""
    url = "redis://user:hunter2@host:6379/0?password=hunter2"
    settings = Settings.load({"CHATSTREAM_BUS": url}, {})
    assert settings.bus == url
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


def test_repr_hides_the_key() -> None:
    """Settings can be printed and logged: the key is not in them."""
    settings = Settings.load({"CHATSTREAM_API_KEY": "sk-secret"}, {})
    assert settings.api_key == "sk-secret"
    assert "sk-secret" not in repr(settings)
    assert "sk-secret" not in str(settings)


def test_settings_cannot_be_changed() -> None:
    """Settings are read once; a later write would be a silent no-op, so it raises."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.load({}, {}).model = "x"  # type: ignore[misc]


def test_a_survey_has_a_sentence_for_each_fault() -> None:
    """And the settings as if these were not there; what `load` raises is the first."""
    config = {"CHATSTREAM_PING_INTERVAL": "7"}
    environ = {"CHATSTREAM_DRAIN": "x", "CHATSTREAM_PAGE": "no path", "CHATSTREAM_MAX_BODY": "9"}
    settings, faults = Settings.survey(config, environ)
    assert (settings.ping_interval, settings.max_body, settings.drain) == (7.0, 9, 25.0)
    assert [fault.split()[0] for fault in faults] == ["CHATSTREAM_PAGE", "CHATSTREAM_DRAIN"]
    with pytest.raises(ConfigError) as caught:
        Settings.load(config, environ)
    assert str(caught.value) == faults[0]


def test_a_survey_without_a_fault_is_what_is_loaded() -> None:
    environ = {"DEEPSEEK_API_KEY": "sk-1", "CHATSTREAM_MODEL": "m"}
    assert Settings.survey({}, environ) == (Settings.load({}, environ), [])
