"""uWSGI's own ways: its router, nginx's uwsgi_pass, processes, reloads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import eventually, require
from tests.integration.client import Client
from tests.integration.conftest import Rig
from tests.integration.nginx import configured, nginx
from tests.integration.processes import Provider, children
from tests.integration.scenes import MOMENTS, SCENES
from tests.integration.servers import SERVERS, Kind, run

PLAIN = SERVERS["uwsgi"]
AT_ONCE = 1.0
"""Seconds."""


SITE = """
    server {{
        listen 127.0.0.1:{port};
        location / {{
            include /etc/nginx/uwsgi_params;
            uwsgi_pass 127.0.0.1:{behind};
            uwsgi_buffering off;
        }}
    }}
"""


def changed(*options: str, without: tuple[str, ...] = (), ready: str = PLAIN.ready) -> Kind:
    """uWSGI with other options."""
    program, *words = PLAIN.command
    left = [word for word in words if not (without and word.startswith(without))]
    return replace(PLAIN, command=(program, *options, *left), ready=ready)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Rig, int]]]:
    """`ways(name)`: uWSGI behind that, and the port in front."""
    made: dict[str, tuple[Rig, int]] = {}
    with contextlib.ExitStack() as stack:

        def way(name: str) -> tuple[Rig, int]:
            if name not in made:
                folder = tmp_path_factory.mktemp(name)
                provider = stack.enter_context(contextlib.closing(Provider()))
                if name == "http router":
                    port = free_port()
                    kind = changed(
                        f"--http=127.0.0.1:{port}",
                        without=("--http-socket",),
                        ready=rf"uWSGI http bound on 127\.0\.0\.1:({port})",
                    )
                    rig = stack.enter_context(run(kind, folder / "log", provider))
                else:
                    require("nginx")
                    behind = free_port()
                    kind = changed(  # it has its own socket, too, to be asked at
                        f"--socket=127.0.0.1:{behind}",
                        ready=rf"bound to TCP address 127\.0\.0\.1:(?!{behind} )(\d+)",
                    )
                    rig = stack.enter_context(run(kind, folder / "log", provider))
                    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                    port = listener.getsockname()[1]
                    config = configured(folder, SITE.format(port=port, behind=behind))
                    stack.enter_context(nginx(folder, config, listener))
                made[name] = rig, port
            return made[name]

        yield way


@pytest.mark.parametrize("scene", MOMENTS)
@pytest.mark.parametrize("stop", ["close", "reset", "cancel"])
@pytest.mark.parametrize("name", ["http router", "uwsgi_pass"])
def test_who_is_in_front_passes_it_on(
    ways: Callable[[str], tuple[Rig, int]], name: str, stop: str, scene: str
) -> None:
    """The peer is the router, or nginx; both close their connection when the client has."""
    rig, port = ways(name)
    session = f"{name.replace(' ', '-')}-{stop}-{scene}"
    client = Client(port)
    rig.clients.append(client)
    client.post(session, simulate={"id": session, **SCENES[scene]})
    rig.provider.request(session)
    if scene != "headers":
        client.until(b'"content"')
    since = time.monotonic_ns()
    if stop == "cancel":
        other = Client(port)
        rig.clients.append(other)
        other.post(path=f"/api/chat/cancel/{session}")
        assert other.head()[0] == 200
    else:
        getattr(client, stop)()
    figure = rig.provider.request(session, "closed")
    assert figure["closed_by"] == "client"
    took = (figure["closed_ns"] - since) / 1e9
    print(f"\n{session}: {took * 1000:.2f} ms")
    assert took < AT_ONCE
    cause = "cancel" if stop == "cancel" else "client"
    assert f" aborted by client/cancel cause={cause} " in rig.server.ending_of(session)
    rig.close_clients()
    assert rig.server.errors() == []


def test_one_thread_is_warned_of(tmp_path: Path, provider: Provider) -> None:
    """A close stops there, too; a cancel waits in the queue, and the log says so."""
    kind = changed(without=("--threads",))
    with run(kind, tmp_path / "log", provider) as rig:
        client = rig.client().post("one", simulate={"id": "one", "silent_after": 1})
        client.until(b'"content"')
        assert "one thread serves one stream at a time" in rig.server.log()
        client.close()
        assert provider.request("one", "closed")["closed_by"] == "client"


def silent(rig: Rig, session: str) -> Client:
    client = rig.client().post(session, simulate={"id": session, "silent_after": 1})
    client.until(b'"content"')
    return client


def test_two_processes_without_a_bus_are_warned_of(tmp_path: Path, provider: Provider) -> None:
    """With what to set."""
    with run(changed("--processes=2"), tmp_path / "log", provider) as rig:
        silent(rig, "warned")
        assert "the bus is local" in rig.server.log()
        assert "CHATSTREAM_BUS=unix:///a/directory" in rig.server.log()


def test_processes_find_each_others_streams(
    tmp_path: Path, short_base: Path, provider: Provider
) -> None:
    """CHATSTREAM_BUS=unix:///a/directory: a cancel stops, whichever process it reaches."""
    bus = {"CHATSTREAM_BUS": f"unix://{short_base}"}
    with run(changed("--processes=3"), tmp_path / "log", provider, **bus) as rig:
        answered = set()

        def crossed() -> bool:
            session = f"crossing-{len(answered)}"
            client = silent(rig, session)
            owner = client.head()[1]["x-worker"]
            status, headers, body = rig.client().ask("POST", f"/api/chat/cancel/{session}")
            assert (status, json.loads(body)) == (200, {"ok": True, "cancelled": True})
            assert provider.request(session, "closed")["closed_by"] == "client"
            answered.add((session, owner == headers["x-worker"]))
            rig.close_clients()
            return not all(same for _, same in answered)

        eventually(crossed, "a cancel that another process took")
        assert "the bus is local" not in rig.server.log()


def test_a_reload_waits_for_streams(tmp_path: Path, provider: Provider) -> None:
    """SIGHUP is uWSGI's own: streams end by themselves, or are cut after worker-reload-mercy."""
    kind = changed(
        "--worker-reload-mercy=2",
        f"--http-socket=127.0.0.1:{free_port()}",  # another one would be its next generation's
        # pyuwsgi would begin anew with the interpreter that our environment was made of.
        f"--binary-path={sys.executable}",
        without=("--http-socket",),
    )
    with run(kind, tmp_path / "log", provider) as rig:
        old = rig.server.worker
        short = rig.client().post("short", simulate={"id": "short", "rate": 20, "tokens": 15})
        short.until(b'"content"')
        left = silent(rig, "left")
        os.kill(rig.server.pid, signal.SIGHUP)
        short.until(b"data: [DONE]")
        assert " completed " in rig.server.ending_of("short")
        assert b"error" not in left.to_the_end()
        assert provider.request("left", "closed")["closed_by"] == "client"
        eventually(lambda: old not in children(rig.server.pid), "the old worker's end")
        eventually(lambda: rig.server._answers(), "a new worker")
        assert rig.server.worker != old
