"""What doctor says of the provider and the way to it: name, connection, TLS, a GET with the key.

Nothing of it costs tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import ssl
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, urlsplit

from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, select_proxy

from chatstream.cli.doctor.check import Check, State
from chatstream.dialects.openai_chat import sibling
from chatstream.errors import StreamError
from chatstream.settings.table import Settings
from chatstream.upstream.fetch import Fetched, fetch

LOOKUP = 5.0
"""Seconds that a name's addresses are waited for."""

ANSWER = 10.0
"""Seconds that an answer of the provider's is waited for."""


def check_provider(settings: Settings) -> Iterator[Check]:
    """One step after the other; the first that fails is the last but for the answer."""
    url = settings.upstream_url
    proxy = select_proxy(url, get_environ_proxies(url))
    target = urlsplit(url)
    if proxy is not None:
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        yield (check := _check_proxy(target))
        if check.state is State.FAIL:
            return
    for check in _check_way(target, settings.upstream_connect_timeout, tls=proxy is None):
        yield check
        if check.state is State.FAIL:
            return
    yield _check_models(settings)


def _check_proxy(proxy: SplitResult) -> Check:
    where = f"{proxy.hostname}:{proxy.port}" if proxy.port else f"{proxy.hostname}"
    if proxy.scheme.startswith("socks"):
        return Check(
            "proxy",
            State.FAIL,
            f"The environment names a SOCKS proxy ({where}): a stop could not reach its"
            " connections. Use an HTTP proxy, or put the provider into NO_PROXY.",
        )
    return Check("proxy", State.NOTE, f"The environment has the provider called through {where}.")


def _check_way(target: SplitResult, timeout: float, *, tls: bool) -> Iterator[Check]:
    """The name, the connection and TLS of where the service connects to."""
    host = target.hostname or ""
    secure = target.scheme == "https"
    port = target.port or (443 if secure else 80)
    begun = monotonic()
    try:
        addresses = lookup(host, port)
    except OSError as error:
        yield Check("name", State.FAIL, f"{host} has no address: {_said(error)}. Is DNS there?")
        return
    yield Check("name", State.OK, f"{host} is {', '.join(addresses)} ({_ms(begun)}).")
    begun = monotonic()
    try:
        sock = _connect(addresses, port, timeout)
    except OSError as error:
        yield Check(
            "connection",
            State.FAIL,
            f"{host}:{port} cannot be reached: {_said(error)}. Is the address right"
            " (CHATSTREAM_UPSTREAM_URL), and may this machine connect to it?",
        )
        return
    with sock:
        yield Check("connection", State.OK, f"{host}:{port} is there ({_ms(begun)}).")
        if secure and tls:
            yield _check_tls(sock, host)


def lookup(host: str, port: int) -> list[str]:
    """The addresses of a name; in a thread of its own, since a name server can hang.

    Raises:
        OSError: There are none, or nobody says so in time.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=look, daemon=True).start()
    try:
        found = answers.get(timeout=LOOKUP)
    except queue.Empty:
        raise TimeoutError(f"no answer in {LOOKUP:.0f} s") from None
    if isinstance(found, Exception):
        raise OSError(str(found)) from found
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def _connect(addresses: list[str], port: int, timeout: float) -> socket.socket:
    """A connection to the first of these that takes one. Raises the last one's OSError."""
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout)
    return socket.create_connection((addresses[-1], port), timeout)


def _check_tls(sock: socket.socket, host: str) -> Check:
    begun = monotonic()
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    bundle = bundle or DEFAULT_CA_BUNDLE_PATH
    try:
        folder = os.path.isdir(bundle)
        context = ssl.create_default_context(
            cafile=None if folder else bundle, capath=bundle if folder else None
        )
        with context.wrap_socket(sock, server_hostname=host) as wrapped:
            return Check("TLS", State.OK, f"{wrapped.version()}, certificate good ({_ms(begun)}).")
    except (OSError, ValueError) as error:
        reason = getattr(error, "verify_message", "") or _said(error)
        return Check(
            "TLS",
            State.FAIL,
            f"No TLS with {host}: {reason}. Certificates are looked for in {bundle}"
            " (REQUESTS_CA_BUNDLE).",
        )


def _check_models(settings: Settings) -> Check:
    """The one request: the list of models, with the key."""
    url = sibling(settings.upstream_url, "/models")
    if url is None:
        return Check(
            "answer",
            State.NOTE,
            "The provider's address does not end with /chat/completions, so where its list of"
            " models is cannot be known: it was not asked.",
        )
    begun = monotonic()
    try:
        fetched = fetch(
            url,
            key=settings.api_key,
            connect=settings.upstream_connect_timeout,
            timeout=ANSWER,
        )
    except StreamError as error:
        return Check("answer", State.FAIL, f"GET {url}: {error.message}")
    return _judged(fetched, url, settings, _ms(begun))


def _judged(fetched: Fetched, url: str, settings: Settings, took: str) -> Check:
    status = fetched.status
    if status in (401, 403):
        said = "The provider refused the key" if settings.api_key else "The provider wants a key"
        return Check("answer", State.FAIL, f"{said} ({status}): set CHATSTREAM_API_KEY anew.")
    if status == 200:
        return _models(fetched, settings, took)
    if status in (404, 405):
        return Check("answer", State.OK, f"The provider answers; it lists no models ({took}).")
    if status == 407:
        return Check("answer", State.FAIL, "The proxy wants a password: put it into its address.")
    if 300 <= status < 400:
        return Check(
            "answer",
            State.FAIL,
            f"GET {url} is redirected ({status}), which is not followed with a key. Set"
            " CHATSTREAM_UPSTREAM_URL to where it leads.",
        )
    return Check("answer", State.WARN, f"GET {url} is answered with {status} ({took}).")


def _models(fetched: Fetched, settings: Settings, took: str) -> Check:
    try:
        names = {str(model["id"]) for model in json.loads(fetched.body)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return Check("answer", State.OK, f"The provider answers ({took}).")
    good = "The key is good" if settings.api_key else "No key is wanted"
    if settings.model in names:
        return Check("answer", State.OK, f"{good}, and {settings.model} is there ({took}).")
    some = ", ".join(sorted(names)[:5]) or "none"
    return Check(
        "answer",
        State.WARN,
        f"{good}; {settings.model!r} (CHATSTREAM_MODEL) is not among the provider's"
        f" {len(names)} models: {some}{', …' if len(names) > 5 else ''}.",
    )


def _said(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", "") or str(error) or type(error).__name__


def _ms(begun: float) -> str:
    return f"{(monotonic() - begun) * 1000:.0f} ms"
