"""deploy/ has configurations of proxies: as they are shipped, with TLS, HTTP/2, and all in them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Certificate, Rig
from tests.integration.http2 import Browser
from tests.integration.processes import tcp
from tests.integration.proxies import SHIPPED, shipped
from tests.integration.scenes import MOMENTS, SCENES

AT_ONCE = 1.0
"""Seconds; a ping or a timeout of anybody's would take longer."""


@dataclass
class Site:
    """A server, and a proxy before it."""

    rig: Rig
    plain: int
    tls: int
    authority: str

    def client(self, **options: int) -> Client:
        """A client over HTTP/1.1 and TLS."""
        trust = ssl.create_default_context(cafile=self.authority)
        client = Client(self.tls, tls=trust, **options)
        self.rig.clients.append(client)
        return client

    def browser(self) -> Browser:
        return Browser(self.tls, self.authority)

    def assert_stopped(self, session: str, cause: str, since: int) -> None:
        """The provider's socket was closed at once, and the log's line says why."""
        figure = self.rig.provider.request(session, "closed")
        assert figure["closed_by"] == "client"
        took = (figure["closed_ns"] - since) / 1e9
        print(f"\n{session}: {took * 1000:.2f} ms")
        assert took < AT_ONCE
        assert f" aborted by client/cancel cause={cause} " in self.rig.server.ending_of(session)

    def begin(self, client: Client, session: str, scene: str) -> None:
        client.post(session, simulate={"id": session, **SCENES[scene]})
        self.is_in(session, scene)

    def is_in(self, session: str, scene: str) -> None:
        """The stream is in the middle of its scene."""
        self.rig.provider.request(session)
        if scene != "headers":
            self.rig.provider.request(session, "delivered", count=2)


@pytest.fixture(scope="module")
def sites(
    tmp_path_factory: pytest.TempPathFactory, rigs: Callable[..., Rig], certificate: Certificate
) -> Iterator[Callable[[str, str], Site]]:
    """`sites(proxy, worker_class)`: that proxy as it is shipped, before our worker of a class."""
    made: dict[tuple[str, str], Site] = {}
    with contextlib.ExitStack() as stack:

        def site(proxy: str, worker_class: str) -> Site:
            key = (proxy, worker_class)
            if key not in made:
                rig = rigs("plain", worker_class)
                folder = tmp_path_factory.mktemp(proxy)
                ports = shipped(proxy, folder, certificate, rig.server.port)
                made[key] = Site(rig, *stack.enter_context(ports), certificate.authority)
            return made[key]

        yield site
    for left in made.values():  # the proxy and the connections that it keeps to us are gone
        left.rig.check_leaks()


@pytest.fixture(
    params=[(proxy, "gthread") for proxy in SHIPPED] + [("nginx", "gevent")], ids="-".join
)
def site(sites: Callable[[str, str], Site], request: pytest.FixtureRequest) -> Iterator[Site]:
    site = sites(*request.param)
    yield site
    site.rig.close_clients()


@pytest.fixture
def session(request: pytest.FixtureRequest) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", request.node.name).strip("-")


@pytest.mark.parametrize("scene", MOMENTS)
@pytest.mark.parametrize("way", ["close", "reset", "cancel"])
def test_stops_over_http_1(site: Site, session: str, scene: str, way: str) -> None:
    """Each reaches the provider at once, through TLS and nginx."""
    client, other = site.client(), site.client()
    site.begin(client, session, scene)
    since = time.monotonic_ns()
    if way == "cancel":
        status, _, answer = other.ask("POST", f"/api/chat/cancel/{session}")
        assert (status, json.loads(answer)) == (200, {"ok": True, "cancelled": True})
    else:
        getattr(client, way)()
    site.assert_stopped(session, "cancel" if way == "cancel" else "client", since)


@pytest.mark.parametrize("scene", MOMENTS)
@pytest.mark.parametrize("way", ["close", "reset", "cancel"])
def test_stops_over_http_2(site: Site, session: str, scene: str, way: str) -> None:
    """An aborted fetch is a reset stream on a connection that lives on; a cancel shares it."""
    with contextlib.closing(site.browser()) as browser:
        stream = browser.chat(session, SCENES[scene])
        site.is_in(session, scene)
        since = time.monotonic_ns()
        if way == "cancel":
            cancel = browser.ask("POST", f"/api/chat/cancel/{session}")
            assert json.loads(browser.body(cancel)) == {"ok": True, "cancelled": True}
            assert b"[DONE]" not in browser.body(stream)
        elif way == "reset":
            browser.reset(stream)
        else:
            browser.close()
        site.assert_stopped(session, "cancel" if way == "cancel" else "client", since)
        if way == "reset":
            page = browser.ask("GET", "/api/chat/openapi.json")
            assert browser.head(page)[":status"] == "200"


def test_a_client_that_does_not_read(site: Site, session: str) -> None:
    """Its close reaches the provider, though nginx and we are full of what it did not take."""
    client = site.client(receive_buffer=4096)
    flood = {"id": session, "rate": 500, "tokens": 100_000, "pad": 16384}
    client.post(session, simulate=flood)

    def delivered() -> int:
        return int(site.rig.provider.request(session)["delivered"])

    def full() -> bool:
        """Nothing moves any more, in the time that so many questions take."""
        before = delivered()
        return before > 0 and all(delivered() == before for _ in range(20))

    eventually(full, "a full path")
    since = time.monotonic_ns()
    client.close()
    site.assert_stopped(session, "client", since)


def test_events_come_one_by_one(site: Site, session: str) -> None:
    """Nothing collects them, and the end is the end."""
    with contextlib.closing(site.browser()) as browser:
        silent = browser.chat(session, {"rate": 50, "silent_after": 3})
        whole = browser.chat(f"{session}-whole", {"rate": 200, "tokens": 20})
        browser.until(silent, b'"content"')
        body = browser.body(whole)
        assert body.count(b'"content"') == 20
        assert body.endswith(b"data: [DONE]\n\n")
        assert browser.head(whole)["content-type"] == "text/event-stream"


def test_more_streams_than_a_browser_has_connections(site: Site, session: str) -> None:
    """Over HTTP/1.1 six of them would leave none for the cancel."""
    with contextlib.closing(site.browser()) as browser:
        for number in range(8):
            browser.chat(f"{session}-{number}", SCENES["silent"])
            site.is_in(f"{session}-{number}", "silent")
        cancel = browser.ask("POST", f"/api/chat/cancel/{session}-7")
        assert json.loads(browser.body(cancel)) == {"ok": True, "cancelled": True}


def test_connections_to_us_are_kept(site: Site) -> None:
    """A question, when it is answered, leaves a connection that the next one uses."""
    with contextlib.closing(site.browser()) as browser:
        browser.body(browser.ask("GET", "/api/chat/openapi.json"))
        before = set(tcp("ESTABLISHED", remote=site.rig.server.port))
        for _ in range(5):
            browser.body(browser.ask("GET", "/api/chat/openapi.json"))
        after = set(tcp("ESTABLISHED", remote=site.rig.server.port))
        assert before
        assert after <= before


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
def test_what_is_not_for_the_world(site: Site, path: str) -> None:
    """It is asked by the machine itself; an address that is not listed gets 403 from the proxy."""
    assert _get(site, path, "127.0.0.1") != 403
    assert _get(site, path, "127.0.0.2") == 403


def _get(site: Site, path: str, address: str) -> int:
    context = ssl.create_default_context(cafile=site.authority)
    plain = socket.create_connection(
        ("127.0.0.1", site.tls), timeout=20, source_address=(address, 0)
    )
    with context.wrap_socket(plain, server_hostname="localhost") as sock:
        sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        return int(sock.recv(64).split()[1])


def test_http_is_sent_on_to_https(site: Site) -> None:
    client = Client(site.plain)
    status, headers, _ = client.ask("GET", "/api/chat/openapi.json")
    client.close()
    assert (status, headers["location"]) == (308, "https://localhost/api/chat/openapi.json")
