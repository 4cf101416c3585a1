"""What the tests of the call share: a provider, and who calls it."""

from __future__ import annotations

import gc
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop
from chatstream.stream.forms import EventStream
from chatstream.stream.stream import Stream
from chatstream.upstream.provider import Upstream
from tests.upstream.peer import (
    KEY,
    BlackHole,
    MakeProvider,
    Peer,
    Provider,
    ReachedBy,
    Script,
)


@pytest.fixture(autouse=True)
def nothing_left(nothing_left: None) -> Iterator[None]:
    """And nothing unclosed: what was only dropped warns now, and a warning is an error."""
    yield
    gc.collect(0)


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own proxies and certificates stay out of the tests."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def provider(nothing_left: None) -> Iterator[Callable[[Script], Provider]]:
    providers: list[Provider] = []

    def make(script: Script) -> Provider:
        providers.append(Provider(script))
        return providers[-1]

    yield make
    for one in providers:
        one.stop()


@pytest.fixture
def black_hole(nothing_left: None) -> Iterator[BlackHole]:
    hole = BlackHole()
    yield hole
    hole.close()


@pytest.fixture
def upstream(provider: Any) -> Iterator[Callable[..., Upstream]]:
    """Makes an Upstream for an address; closed before the provider stops."""
    loop, made = Loop(), []

    def make(url: str, **settings: Any) -> Upstream:
        settings = {"api_key": KEY, "upstream_url": url, **settings}
        made.append(Upstream(Settings(**settings), 4, loop.call_later))
        return made[-1]

    yield make
    for one in made:
        one.close()
    loop.stop()


@pytest.fixture
def stream() -> Stream:
    return EventStream("s", "t")


@pytest.fixture
def tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Script], Script]:
    """Makes a script speak TLS, with a certificate that our side trusts."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "provider.test").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))

    def wrapped(script: Script) -> Script:
        def tls_script(peer: Peer) -> None:
            peer.sock = context.wrap_socket(peer.sock, server_side=True)
            try:
                script(peer)
            finally:
                peer.sock.close()

        return tls_script

    return wrapped


@pytest.fixture
def reached(
    provider: MakeProvider, tls: Callable[[Script], Script], monkeypatch: pytest.MonkeyPatch
) -> ReachedBy:
    """Makes a provider that is reached in one of `WAYS`, and says at which address."""

    def make(way: str, script: Script) -> tuple[Provider, str]:
        def tunnel(peer: Peer) -> None:
            peer.request()
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            tls(script)(peer)

        there = provider({"tls": tls(script), "tunnel": tunnel}.get(way, script))
        scheme = "https" if way in ("tls", "tunnel") else "http"
        if way in ("proxy", "tunnel"):
            monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{there.address[1]}")
            return there, f"{scheme}://provider.test/v1/chat"
        return there, there.url.replace("http:", f"{scheme}:")

    return make
