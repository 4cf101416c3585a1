"""Servers that wait for nobody at SIGTERM, and do where the app says `drain_at_sigterm()`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import SHUT_DOWN, Client
from tests.integration.conftest import Rig
from tests.integration.processes import Provider, children, is_running
from tests.integration.servers import SERVERS, Kind, run

DRAIN = 1.2
"""Seconds."""


def draining(name: str) -> Kind:
    return replace(SERVERS[name], app="tests.integration.draining:app")


def begin(rig: Rig, session: str, **simulate: object) -> Client:
    client = rig.client().post(session, simulate={"id": session, **simulate})
    client.head()
    client.until(b'"content"')
    return client


def until(client: Client, words: bytes) -> None:
    """Waits for the last of these bytes, in whatever framing; then the client goes."""
    client.until(words.splitlines()[-2] if words is SHUT_DOWN else words)
    client.close()


def _kinds() -> dict[str, Kind]:
    uwsgi = draining("uwsgi")
    alone = tuple(word for word in uwsgi.command if word != "--master")
    lazy = (uwsgi.command[0], "--lazy-apps", *uwsgi.command[1:])
    two = (uwsgi.command[0], "--processes=2", *uwsgi.command[1:])
    return {
        "waitress": draining("waitress"),
        "uwsgi": uwsgi,
        "uwsgi-lazy-apps": replace(uwsgi, command=lazy),
        "uwsgi-without-master": replace(uwsgi, command=alone),
        "uwsgi-two-processes": replace(uwsgi, command=two),
    }


KINDS = _kinds()


@pytest.mark.parametrize("name", KINDS)
def test_sigterm_drains(name: str, tmp_path: Path, provider: Provider) -> None:
    """Who can finish does, the rest is told when the time is over, and then all is gone."""
    with run(KINDS[name], tmp_path / "log", provider, CHATSTREAM_DRAIN=str(DRAIN)) as rig:
        short = begin(rig, "short", rate=20, tokens=12)
        silent = begin(rig, "silent", silent_after=1)
        processes = [rig.server.pid, *children(rig.server.pid)]
        began = time.monotonic()
        rig.server.terminate()
        until(short, b"data: [DONE]")
        until(silent, SHUT_DOWN)
        assert time.monotonic() - began >= DRAIN
        assert provider.request("silent", "closed")["closed_by"] == "client"
        assert " completed " in rig.server.ending_of("short")
        assert " aborted by shutdown cause=shutdown " in rig.server.ending_of("silent")
        eventually(lambda: not any(map(is_running, processes)), "the end of all processes")
        print(f"\n{name}: gone after {time.monotonic() - began:.2f} s")
        assert rig.server.errors() == []


@pytest.mark.parametrize("name", ["waitress", "uwsgi"])
def test_sigterm_without_streams(name: str, tmp_path: Path, provider: Provider) -> None:
    """Nothing is waited for."""
    with run(KINDS[name], tmp_path / "log", provider, CHATSTREAM_DRAIN="60") as rig:
        assert rig.server.get("/useful")[1] == b"True"
        processes = [rig.server.pid, *children(rig.server.pid)]
        began = time.monotonic()
        rig.server.terminate()
        eventually(lambda: not any(map(is_running, processes)), "the end of all processes")
        assert time.monotonic() - began < 5  # uWSGI's master looks once a second


def test_a_second_sigterm(tmp_path: Path, provider: Provider) -> None:
    """Ends what drains at once, and it is told all the same."""
    with run(KINDS["waitress"], tmp_path / "log", provider, CHATSTREAM_DRAIN="60") as rig:
        silent = begin(rig, "silent", silent_after=1)
        rig.server.terminate()
        rig.server.get("/hello")  # it serves on; by now the handler has run
        os.kill(rig.server.pid, signal.SIGTERM)
        until(silent, SHUT_DOWN)
        assert " aborted by shutdown " in rig.server.ending_of("silent")
        eventually(lambda: not is_running(rig.server.pid), "its end")


@pytest.mark.parametrize("name", ["ours-gthread", "gunicorn-gevent"])
def test_gunicorn_needs_it_not(name: str, tmp_path: Path, provider: Provider) -> None:
    """Its handlers are left alone; a SIGTERM drains as ever."""
    with run(draining(name), tmp_path / "log", provider, CHATSTREAM_DRAIN=str(DRAIN)) as rig:
        assert rig.server.get("/useful")[1] == b"False"
        silent = begin(rig, "silent", silent_after=1)
        rig.server.terminate()
        until(silent, SHUT_DOWN)
        assert " aborted by shutdown " in rig.server.ending_of("silent")


def test_a_stream_that_takes_its_time_is_not_waited_for(tmp_path: Path, provider: Provider) -> None:
    """A client that reads nothing holds the end up no longer than any other."""
    with run(KINDS["waitress"], tmp_path / "log", provider, CHATSTREAM_DRAIN="0.5") as rig:
        client = rig.client(receive_buffer=4096)
        flood = {"id": "stuck", "rate": 0, "pad": 16384, "tokens": 100_000}
        client.post("stuck", simulate=flood)
        provider.request("stuck", "delivered", count=8)
        rig.server.terminate()
        assert provider.request("stuck", "closed")["closed_by"] in ("client", "reset")
        eventually(lambda: not is_running(rig.server.pid), "its end", 12)
