"""A real nginx in front: what its client does reaches the provider, and each event its client."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import require
from tests.integration.client import Client
from tests.integration.conftest import Rig
from tests.integration.nginx import configured, nginx
from tests.integration.scenes import MOMENTS, SCENES

SITE = """
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{behind};
            {settings}
        }}
    }}
"""

SETTINGS = {
    "default": "",  # HTTP/1.0 to us, and answers are buffered
    "recommended": 'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;',
}

SITES = [("gthread", "default"), ("gthread", "recommended"), ("gevent", "default")]

WHOLE = 5000
"""Tokens of an answer that is stopped; they would take a minute."""


@pytest.fixture(scope="module")
def ports(
    tmp_path_factory: pytest.TempPathFactory, rigs: Callable[..., Rig]
) -> Iterator[dict[tuple[str, str], int]]:
    """Where one nginx listens for each of `SITES`."""
    require("nginx")
    folder = tmp_path_factory.mktemp("nginx")
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in SITES]
        ports = [listener.getsockname()[1] for listener in listeners]
        sites = "".join(
            SITE.format(port=port, behind=rigs("plain", kind).server.port, settings=SETTINGS[how])
            for port, (kind, how) in zip(ports, SITES, strict=True)
        )
        stack.enter_context(nginx(folder, configured(folder, sites), *listeners))
        yield dict(zip(SITES, ports, strict=True))


class Site:
    """A server, and nginx before it."""

    def __init__(self, rig: Rig, port: int) -> None:
        self.rig = rig
        self._port = port

    def client(self) -> Client:
        """A client of nginx's."""
        client = Client(self._port)
        self.rig.clients.append(client)
        return client

    def assert_stopped(self, session: str, cause: str) -> None:
        """The provider saw it, long before its answer was whole; and the log says why."""
        figure = self.rig.provider.request(session, "closed")
        assert figure["closed_by"] == "client"
        assert figure["generated"] < WHOLE / 10
        assert f" aborted by client/cancel cause={cause} " in self.rig.server.ending_of(session)


@pytest.fixture(params=SITES, ids="-".join)
def site(
    request: pytest.FixtureRequest, ports: dict[tuple[str, str], int], rigs: Callable[..., Rig]
) -> Iterator[Site]:
    """Each of `SITES`, left at rest."""
    rig = rigs("plain", request.param[0])
    yield Site(rig, ports[request.param])
    rig.check_leaks()


@pytest.fixture
def session(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").rstrip("]")


def begun(site: Site, session: str, scene: str) -> Client:
    """A client whose stream is in the middle of that."""
    client = site.client().post(session, simulate={"id": session, **SCENES[scene]})
    if scene == "headers":
        site.rig.provider.request(session)
    else:
        client.until(b'"content"')
    return client


@pytest.mark.parametrize("scene", MOMENTS)
def test_a_close_stops(site: Site, session: str, scene: str) -> None:
    """nginx closes its connection to us when its client has; at once, whatever it waits for."""
    client = begun(site, session, scene)
    before = time.monotonic_ns()
    client.close()
    site.assert_stopped(session, "client")
    closed = site.rig.provider.request(session, "closed")["closed_ns"]
    assert (closed - before) / 1e9 < 2


@pytest.mark.parametrize("scene", MOMENTS)
def test_a_cancel_stops(site: Site, session: str, scene: str) -> None:
    """Through the same nginx, past the stream; whose client gets a regular end."""
    client = begun(site, session, scene)
    status, _, answer = site.client().ask("POST", f"/api/chat/cancel/{session}")
    assert (status, json.loads(answer)) == (200, {"ok": True, "cancelled": True})
    site.assert_stopped(session, "cancel")
    assert client.head()[0] == 200
    assert b"[DONE]" not in client.body()


def test_events_come_one_by_one(site: Site, session: str) -> None:
    """Our header is enough, where nginx would keep them until 4 KB are there."""
    client = site.client().post(session, simulate={"rate": 50, "silent_after": 3})
    status, headers = client.head()
    assert (status, headers["server"].partition("/")[0]) == (200, "nginx")
    seen = b""
    while seen.count(b'"content"') < 3:
        seen += client.exactly(1)
    client.close()


def test_a_whole_answer(site: Site, session: str) -> None:
    """All of it comes, with its end, though nginx speaks HTTP/1.0 to us unless it is told."""
    client = site.client().post(session, simulate={"rate": 200, "tokens": 20})
    assert client.head()[0] == 200
    body = client.body()
    assert body.count(b'"content"') == 20
    assert body.endswith(b"data: [DONE]\n\n")
    assert " completed " in site.rig.server.ending_of(session)
