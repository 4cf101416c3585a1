"""What each kind of setting takes. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import urlsplit


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
