"""Settings: every CHATSTREAM_* key, with its unit, default and check, in one table.

A key is looked up in `app.config` first, then in the environment, once, by `Settings.load`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Any

from chatstream.errors import ConfigError
from chatstream.settings.checks import (
    Token,
    _bus,
    _choice,
    _count,
    _count_or_off,
    _key,
    _most_or_off,
    _origins_or_off,
    _place,
    _prefix,
    _seconds,
    _seconds_from_zero,
    _seconds_or_off,
    _switch,
    _text,
    _tokens,
    _ttl,
    _url,
    _word,
    _words_or_off,
)

PREFIX = "CHATSTREAM_"

STANDALONE = {
    "CHATSTREAM_PAGE": "/",
    "CHATSTREAM_OPENAI_PREFIX": "/v1",
    "CHATSTREAM_HEALTH": "/",
}
"""What is on in the standalone service, unless the environment says otherwise."""

_OF_THE_SERVER = {
    "CHATSTREAM_BIND",
    "CHATSTREAM_CONTROL_SOCKET",
    "CHATSTREAM_THREADS",
    "CHATSTREAM_WORKER_CLASS",
}
"""Keys that only gunicorn.conf.py reads."""


def _setting(default: Any, check: Callable[[Any], Any], help: str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"check": check, "help": help})


@dataclass(frozen=True)
class Settings:
    """The settings of one app. Frozen: read once, safe from any thread."""

    url_prefix: str = _setting("/api/chat", _prefix, "where the routes are mounted")
    page: str | None = _setting(
        None, _place, "where the page with the chat is; off for none (standalone: /)"
    )
    openai_prefix: str | None = _setting(
        None,
        _place,
        "where OpenAI's routes chat/completions and models are; off for none (standalone: /v1)",
    )
    health: str | None = _setting(
        None, _place, "where healthz and readyz are; off for none (standalone: /)"
    )
    log_format: str = _setting(
        "text",
        _choice("text", "json"),
        "lines of the standalone service's log, and of gunicorn's: text, or json, an object a line",
    )
    metrics: str | None = _setting(
        None,
        _place,
        "where the figures for Prometheus are, such as /metrics; off for none",
    )
    meter: bool = _setting(
        False, _switch, "1 says that the provider is the built-in one: the page shows its figures"
    )
    upstream_url: str = _setting(
        "https://api.deepseek.com/chat/completions",
        _url,
        "the provider's chat completions address; any OpenAI-compatible one",
    )
    api_key: str = _setting(
        "", _key, "the provider's key; else DEEPSEEK_API_KEY, else none is sent", secret=True
    )
    model: str = _setting("deepseek-chat", _text, "the model where a request names none")
    include_usage: bool = _setting(
        False, _switch, "1 asks the provider for a usage event (stream_options)"
    )
    on_conflict: str = _setting(
        "supersede",
        _choice("supersede", "reject"),
        "what a second stream of a live session does: supersede aborts the first, reject is a 409",
    )
    on_disconnect: str = _setting(
        "abort",
        _choice("abort", "finish"),
        "what a client that leaves does: abort ends the stream; finish has the answer read to its"
        " end, for who listens (`stream_ended`)",
    )
    allowed_models: tuple[str, ...] | None = _setting(
        None,
        _words_or_off,
        "the models that may be asked, separated by commas; another is a 400; off for any",
    )
    max_tokens: int | None = _setting(
        None,
        _count_or_off,
        "most tokens that an answer is asked for: what names more, or nothing, gets this; off for"
        " no bound",
    )
    max_tokens_field: str = _setting(
        "max_tokens",
        _choice("max_tokens", "max_completion_tokens"),
        "what the provider calls that; it gets this one of the two",
    )
    tokens: tuple[Token, ...] = _setting(
        (),
        _tokens,
        "bearer tokens that may use the service, separated by commas, each alone or as owner:token;"
        " for a service without `identify`",
        secret=True,
    )
    admin_tokens: tuple[Token, ...] = _setting(
        (), _tokens, "the same for admins, who may list and stop everybody's streams", secret=True
    )
    cors_origins: tuple[str, ...] | None = _setting(
        None,
        _origins_or_off,
        "origins of other pages that may use the routes, separated by commas; off for none",
    )
    max_body: int = _setting(1024 * 1024, _count, "longest request body, bytes")
    max_streams: int | None = _setting(
        None, _count, "stream slots of a worker; under gunicorn worked out, else 3"
    )
    max_streams_per_owner: int | None = _setting(
        None,
        _most_or_off,
        "live streams that one owner may have, in all workers together; off or 0 for no bound",
    )
    bus: str | None = _setting(
        None,
        _bus,
        "how workers find each other's streams: local (one process), unix (one host; the default"
        " under gunicorn), unix:///a/directory, redis://host:6379/0",
        secret=True,
    )
    bus_prefix: str = _setting(
        "chatstream", _word, "what the keys in Redis begin with; one for each service"
    )
    bus_ttl: float = _setting(
        45.0, _ttl, "how long Redis keeps what a host that died has left, seconds"
    )
    detach: bool = _setting(
        True, _switch, "0 has each stream keep its thread on our gthread worker, too"
    )
    ping_interval: float = _setting(
        15.0, _seconds, "silence towards the client after which a ping goes out, seconds"
    )
    upstream_connect_timeout: float = _setting(
        5.0, _seconds, "connecting to one address of the provider, TLS step by step, seconds"
    )
    upstream_headers_timeout: float = _setting(
        600.0, _seconds, "from the request to the provider's headers, seconds"
    )
    upstream_idle_timeout: float = _setting(
        120.0, _seconds, "silence of the provider inside an answer, seconds"
    )
    stream_deadline: float | None = _setting(
        None, _seconds_or_off, "longest a stream may last, seconds; off or 0 for no bound"
    )
    send_timeout: float = _setting(
        30.0, _seconds, "how long a client may take none of the bytes it is sent, seconds"
    )
    drain: float = _setting(
        25.0, _seconds_from_zero, "how long streams may go on in a worker that ends, seconds"
    )
    request_timeout: float = _setting(
        10.0,
        _seconds,
        "from a request's first byte to its last, seconds; other routes: of silence in a body"
        " (our workers)",
    )
    headers_timeout: float = _setting(
        12.0, _seconds, "from a connection to its first request's headers, seconds (our workers)"
    )
    keepalive_timeout: float = _setting(
        5.0, _seconds, "how long a connection waits for its next request, seconds (our workers)"
    )

    @classmethod
    def load(cls, config: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
        """Reads and checks every key.

        Args:
            config: The app's config; wins over the environment.
            environ: The process's environment.

        Raises:
            ConfigError: A value is wrong; the message says which key and what it takes.
        """
        settings, faults = cls.survey(config, environ)
        if faults:
            raise ConfigError(faults[0]) from None
        return settings

    def _contradictions(self) -> Iterator[str]:
        """Settings that are good, but not together."""
        if self.allowed_models is not None and self.model not in self.allowed_models:
            yield "CHATSTREAM_MODEL must be one of CHATSTREAM_ALLOWED_MODELS."
        admins = {token.secret for token in self.admin_tokens}
        if admins & {token.secret for token in self.tokens}:
            yield "A token must not be both in CHATSTREAM_TOKENS and in CHATSTREAM_ADMIN_TOKENS."
        at = (self.health or "").rstrip("/")
        health = (f"{at}/healthz", f"{at}/readyz") if self.health is not None else ()
        places = {"PAGE": (self.page,), "METRICS": (self.metrics,), "HEALTH": health}
        for one, other in combinations(places, 2):
            for path in set(filter(None, places[one])).intersection(places[other]):
                yield f"{PREFIX}{one} and {PREFIX}{other} are both at {path}: one would hide."

    @classmethod
    def survey(
        cls, config: Mapping[str, Any], environ: Mapping[str, str]
    ) -> tuple[Settings, list[str]]:
        """As `load`, but a wrong value counts as none, and every one has its sentence."""
        values, faults = {}, []
        for setting in fields(cls):
            key = PREFIX + setting.name.upper()
            value = config.get(key, environ.get(key))
            if key == "CHATSTREAM_API_KEY" and not value:
                key = "DEEPSEEK_API_KEY"
                value = config.get(key, environ.get(key))
            try:
                if value is not None:
                    check = setting.metadata["check"]
                    values[setting.name] = _checked(key, value, check, setting.repr)
            except ConfigError as error:
                faults.append(str(error))
        settings = cls(**values)
        return settings, [*faults, *settings._contradictions()]


def unread(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Those of the keys that nobody reads, each with the one that may have been meant, or ''."""
    known = known_keys()
    names = [key.removeprefix(PREFIX) for key in known]
    for key in sorted(set(keys) - known):
        near = difflib.get_close_matches(key.removeprefix(PREFIX), names, 1)
        yield key, PREFIX + near[0] if near else ""


def known_keys() -> set[str]:
    """Every key that means something, those of gunicorn.conf.py among them."""
    return {PREFIX + setting.name.upper() for setting in fields(Settings)} | _OF_THE_SERVER


def _checked(key: str, value: Any, check: Callable[[Any], Any], showable: bool) -> Any:
    try:
        return check(value)
    except ValueError as error:
        showable = showable and not {"@", "?"} & set(str(value))  # a password, a key
        shown = f", not {value!r}" if showable else ""
        raise ConfigError(f"{key} must be {error}{shown}.") from None
