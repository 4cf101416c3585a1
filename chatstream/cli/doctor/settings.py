"""What doctor says of the settings and of the app. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from chatstream.cli.doctor.check import Check, State
from chatstream.settings.table import PREFIX, Settings, known_keys, unread

LOOPBACK = ("localhost", "127.0.0.1", "::1")

SHORT = 16
"""Characters of a token below which somebody may guess it."""


def check_keys(faults: list[str], given: set[str]) -> Iterator[Check]:
    """Wrong values, and keys that nobody reads.

    Args:
        faults: What is wrong with the values.
        given: All CHATSTREAM_ keys there are.
    """
    known = known_keys()
    for fault in faults:
        yield Check("settings", State.FAIL, fault)
    if not faults:
        count = len(given & known)
        yield Check(
            "settings", State.OK, f"{count} of {len(known)} are set; the rest have defaults."
        )
    for key, near in unread(given):
        hint = f" Did you mean {near}?" if near else ""
        yield Check("settings", State.WARN, f"{key} is read by nobody.{hint}")


def given_keys(config: Mapping[str, object], environ: Mapping[str, str]) -> set[str]:
    """The keys that an app's config and the environment have."""
    return {key for key in (*config, *environ) if key.startswith(PREFIX)}


def check_key(settings: Settings, environ: Mapping[str, str]) -> Check:
    """Whether there is a key for the provider. It is not shown."""
    key, host = settings.api_key, urlsplit(settings.upstream_url).hostname or ""
    if not key:
        if host in LOOPBACK:
            return Check("key", State.OK, "None is set, and the provider is on this machine.")
        state = State.FAIL if host.endswith("deepseek.com") else State.WARN
        return Check("key", state, "None is set: CHATSTREAM_API_KEY, or DEEPSEEK_API_KEY.")
    if key[0] in "\"'" or " " in key:
        return Check(
            "key", State.WARN, "It has quotes or a space in it. Set the bare key, without Bearer."
        )
    source = "" if environ.get("CHATSTREAM_API_KEY") else " (DEEPSEEK_API_KEY, or the app's config)"
    return Check("key", State.OK, f"One of {len(key)} characters is set{source}.")


def check_app(settings: Settings, *, identifies: bool, listened: bool = True) -> Iterator[Check]:
    """Who may ask, what of the app everybody can see, and whether its answers are for somebody.

    Args:
        settings: The app's.
        identifies: Whether it asks who calls.
        listened: Whether somebody listens to `stream_ended` for an answer's text.
    """
    yield from _check_callers(settings, identifies=identifies)
    places = [f"chat {settings.url_prefix}"]
    places += [f"page {settings.page}"] if settings.page else []
    places += [f"OpenAI's {settings.openai_prefix}"] if settings.openai_prefix else []
    yield Check("routes", State.OK, f"{', '.join(places)}.")
    host = urlsplit(settings.upstream_url).hostname or ""
    if settings.meter and host not in LOOPBACK:
        yield Check(
            "meter",
            State.WARN,
            "CHATSTREAM_METER=1 says that the provider is the built-in one, and its address is"
            " another machine's. Leave it out.",
        )
    if settings.on_disconnect == "finish" and not listened:
        yield Check(
            "disconnect",
            State.WARN,
            "CHATSTREAM_ON_DISCONNECT=finish reads answers to their end for who listens to"
            " stream_ended, and nobody does: they are paid for, and thrown away. Leave it out.",
        )


def _check_callers(settings: Settings, *, identifies: bool) -> Iterator[Check]:
    """Whether it is asked who calls. No token is shown."""
    if not identifies:
        yield Check(
            "identify",
            State.NOTE,
            "Open: all callers are one owner, and can stop each other's streams. Set"
            " CHATSTREAM_TOKENS, or pass identify= to ChatStream, or mount the routes behind a"
            " login.",
        )
        if settings.cors_origins == ("*",):
            yield Check(
                "cors",
                State.WARN,
                "The pages of all sites may use it (CHATSTREAM_CORS_ORIGINS=*), and it asks nobody"
                " who they are. Name the origins, or set CHATSTREAM_TOKENS.",
            )
    tokens = (*settings.tokens, *settings.admin_tokens)
    if not tokens:
        return
    owners, admins = len({token.owner for token in tokens}), len(settings.admin_tokens)
    yield Check(
        "tokens",
        State.OK,
        f"Closed: tokens {len(tokens)}, of owners {owners}, for admins {admins}.",
    )
    if short := sum(len(token.secret) < SHORT for token in tokens):
        yield Check(
            "tokens",
            State.WARN,
            f"Shorter than {SHORT} characters, so that they can be guessed: {short}. A good one:"
            " python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
