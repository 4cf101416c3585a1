"""Settings: every CHATSTREAM_* key, with its unit, default and check, in one table.

A key is looked up in `app.config` first, then in the environment, once, by `Settings.load`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from itertools import combinations
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from chatstream.errors import ConfigError

PREFIX = "CHATSTREAM_"

STANDALONE = {
    "CHATSTREAM_PAGE": "/",
    "CHATSTREAM_OPENAI_PREFIX": "/v1",
    "CHATSTREAM_HEALTH": "/",
}
"""What is on in the standalone service, unless the environment says otherwise."""

_OF_THE_SERVER = {"CHATSTREAM_BIND", "CHATSTREAM_WORKER_CLASS", "CHATSTREAM_THREADS"}
"""Keys that only gunicorn.conf.py reads."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty text")
    return value.strip()


def _key(value: Any) -> str:
    """A secret that goes into a header. An empty one is none, as in `CHATSTREAM_API_KEY=`."""
    if not isinstance(value, str) or not value.isascii() or not value.strip().isprintable():
        raise ValueError("a key of printable ASCII characters")
    return value.strip()


def _prefix(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value):
        raise ValueError("a path such as /api/chat, with a leading and no trailing slash")
    return value


def _place(value: Any) -> str | None:
    """Where something optional is mounted."""
    if _off(value):
        return None
    if value == "/":
        return "/"
    try:
        return _prefix(value)
    except ValueError:
        raise ValueError("a path such as /chat, without a trailing slash, or off") from None


def _url(value: Any) -> str:
    sentence = "an http:// or https:// address such as https://api.deepseek.com/chat/completions"
    text = value.strip() if isinstance(value, str) else ""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        good = good and parts.username is None and text.isprintable() and " " not in text
    except ValueError:
        good = False
    if not good:
        raise ValueError(sentence)
    return text


def _bus(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else ""
    scheme, separator, rest = text.partition("://")
    good = text in ("local", "unix") or (scheme == "unix" and rest.startswith("/"))
    if scheme in ("redis", "rediss") and separator:
        try:
            parts = urlsplit(text)
            good = (
                bool(parts.hostname)
                and parts.port != 0
                and "," not in parts.netloc.rpartition("@")[2]
            )
            good = good and re.fullmatch(r"(/[0-9]*)?", parts.path) is not None
        except ValueError:
            good = False
    if not good or not text.isprintable():
        raise ValueError(
            "local, unix, unix:///a/directory, or redis://host:6379/0 (rediss:// for TLS) of one"
            " server, not of a Cluster or a Sentinel"
        )
    return text


def _word(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", value):
        raise ValueError("1 to 64 of A-Z a-z 0-9 . _ : -")
    return value


def _choice(*words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(" or ".join(words))
        return str(value)

    return check


def _switch(value: Any) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True}
    known |= {"0": False, "false": False, "no": False, "off": False}
    word = str(value).strip().lower()
    if word not in known:
        raise ValueError("1 or 0")
    return known[word]


def _count(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,12}", str(value).strip()):
        raise ValueError("a whole number of at least 1")
    if (number := int(value)) < 1:
        raise ValueError("a whole number of at least 1")
    return number


def _count_or_off(value: Any) -> int | None:
    return None if _off(value) else _count(value)


def _words_or_off(value: Any) -> tuple[str, ...] | None:
    """A list, or a text with commas."""
    if _off(value):
        return None
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise ValueError("names separated by commas")
    named = tuple(word.strip() for word in words)
    if not all(named):
        raise ValueError("names separated by commas")
    return named


def _off(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "off", "0")


class Token(NamedTuple):
    """A bearer token, and whose it is."""

    owner: str
    secret: str


def _tokens(value: Any) -> tuple[Token, ...]:
    """`owner:token` or a token alone, whose owner is then a name made of it.

    An empty text is none; what is only commas was meant to be some, and would leave all open.
    """
    text = value.strip() if isinstance(value, str) else ","
    tokens = [_token(word) for word in text.replace(",", " ").split()]
    owners = {token.secret: token.owner for token in tokens}
    of_two = any(owners[token.secret] != token.owner for token in tokens)
    if of_two or (text and not tokens):
        raise ValueError("tokens, each owner:token or a token alone, none of two owners")
    return tuple(tokens)


def _token(word: str) -> Token:
    owner, colon, secret = word.partition(":")
    if not colon:
        owner, secret = f"token-{sha256(word.encode()).hexdigest()[:12]}", word
    if not re.fullmatch(r"[A-Za-z0-9._@+-]{1,64}", owner) or not re.fullmatch(r"[!-9;-~]+", secret):
        raise ValueError(
            "tokens of printable ASCII without colons, separated by commas; before each may stand"
            " an owner (A-Z a-z 0-9 . _ @ + -) and a colon"
        )
    return Token(owner, secret)


def _origins_or_off(value: Any) -> tuple[str, ...] | None:
    origins = _words_or_off(value)
    form = r"\*|https?://[A-Za-z0-9.\[\]:-]+"
    if origins is not None and not all(re.fullmatch(form, origin) for origin in origins):
        raise ValueError("origins such as https://chat.example.org separated by commas, or *")
    return origins


def _most_or_off(value: Any) -> int | None:
    if _off(value):
        return None
    try:
        number = _count(value)
    except ValueError:
        number = 0
    if not 1 <= number <= 10_000:
        raise ValueError("a whole number from 1 to 10000, or off")
    return number


def _seconds(value: Any) -> float:
    number = _number(value)
    if not 0 < number <= 86_400 * 7:
        raise ValueError("a number of seconds above 0 and up to a week")
    return number


def _seconds_from_zero(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 86_400:
        raise ValueError("a number of seconds from 0 up to a day")
    return number


def _ttl(value: Any) -> float:
    if _number(value) < 3:  # a worker refreshes its entries in turns of one second
        raise ValueError("a number of seconds from 3 on")
    return _seconds(value)


def _seconds_or_off(value: Any) -> float | None:
    return None if _off(value) else _seconds(value)


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    return number


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
