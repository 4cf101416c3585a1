"""deploy/chatstream.service: what systemd would do with it is done here, with live streams."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually, require
from tests.integration.client import SHUT_DOWN, Client
from tests.integration.conftest import Rig, serving
from tests.integration.processes import ROOT, Provider, is_running

UNIT = ROOT / "deploy" / "chatstream.service"
SETTINGS = ROOT / "deploy" / "chatstream.env"

EXPOSED = 2.0
"""What `systemd-analyze security` may say at most; without any hardening it says 9.6."""


class Unit:
    """The unit's `[Service]`, with this machine's paths in the place of /opt/chatstream."""

    def __init__(self, text: str) -> None:
        self.text = text.replace(
            "/opt/chatstream/.venv/bin/", f"{Path(sys.executable).parent}/"
        ).replace("/opt/chatstream", str(ROOT))
        service = self.text.partition("[Service]")[2].partition("[Install]")[0]
        self._pairs = re.findall(r"^(\w+)=(.*)$", service, re.MULTILINE)

    def __getitem__(self, key: str) -> str:
        (value,) = self.all(key)
        return value

    def all(self, key: str) -> list[str]:
        return [value for name, value in self._pairs if name == key]

    @property
    def environ(self) -> dict[str, str]:
        """`Environment=`, then what is in the shipped `EnvironmentFile=`."""
        assert self["EnvironmentFile"] == "/etc/chatstream.env"
        return dict(_assignments([*self.all("Environment"), *SETTINGS.read_text().splitlines()]))


def _assignments(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            yield key, value


@pytest.fixture
def unit() -> Unit:
    return Unit(UNIT.read_text())


class Service:
    """What systemd has of a running service: its main process, and what that tells."""

    def __init__(self, rig: Rig, unit: Unit, notifications: socket.socket) -> None:
        self.rig = rig
        self.main = rig.server.pid
        self.told = notifications
        self._unit = unit

    def stop(self) -> None:
        """As systemd.kill(5) has `KillMode=mixed`: the signal, to the main process only."""
        assert self._unit["KillMode"] == "mixed"
        assert self._unit.all("KillSignal") == []  # so it is SIGTERM
        os.kill(self.main, signal.SIGTERM)

    def reload(self) -> None:
        command = self._unit["ExecReload"].replace("$MAINPID", str(self.main))
        subprocess.run(shlex.split(command), check=True, timeout=10)

    def begin(self, session: str, **simulate: object) -> Client:
        client = self.rig.client().post(session, simulate={"id": session, **simulate})
        client.head()
        client.until(b'"content"')
        return client


@contextlib.contextmanager
def running(
    unit: Unit, folder: Path, base: Path, provider: Provider, **environ: str
) -> Iterator[Service]:
    """The unit's command, where and as it says, with a `NOTIFY_SOCKET`."""
    own = {**unit.environ, "CHATSTREAM_BIND": "127.0.0.1:0", "CHATSTREAM_BUS": f"unix://{base}"}
    assert unit.environ["CHATSTREAM_BUS"] == f"unix:///run/{unit['RuntimeDirectory']}"
    assert unit["WorkingDirectory"] == str(ROOT)  # where a Server is run
    command = shlex.split(unit["ExecStart"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(base / "notify"))
        notifications.settimeout(10)
        more: dict[str, Any] = {**own, "NOTIFY_SOCKET": str(base / "notify"), **environ}
        log = folder / "server.log"
        with serving(log, provider, command=command, app="", **more) as rig:
            yield Service(rig, unit, notifications)


@pytest.fixture
def service(unit: Unit, tmp_path: Path, short_base: Path, provider: Provider) -> Iterator[Service]:
    with running(unit, tmp_path, short_base, provider, CHATSTREAM_DRAIN="1.2") as service:
        yield service


def test_it_tells_systemd_that_it_is_ready(service: Service, unit: Unit) -> None:
    """`Type=notify`: systemd's units that come after it find it listening."""
    assert unit["Type"] == "notify"
    message, sender = service.told.recvfrom(4096)
    assert b"READY=1" in message.splitlines()
    assert sender is None  # the main process: systemd takes it from nobody else (NotifyAccess=main)


def test_a_stop_drains_and_tells(service: Service, unit: Unit) -> None:
    """What can finish does, the rest is told, and all is gone long before systemd would kill."""
    short = service.begin("short", rate=20, tokens=12)
    silent = service.begin("silent", silent_after=1)
    processes = [service.main, *service.rig.server.workers]
    began = time.monotonic()
    service.stop()
    assert short.body().endswith(b"data: [DONE]\n\n")
    assert silent.body().endswith(SHUT_DOWN)
    assert service.rig.provider.request("silent", "closed")["closed_by"] == "client"
    assert " completed " in service.rig.server.ending_of("short")
    assert " aborted by shutdown cause=shutdown " in service.rig.server.ending_of("silent")
    patience = float(unit["TimeoutStopSec"])
    eventually(lambda: not any(map(is_running, processes)), "the end", patience)
    print(f"\nstopped within {time.monotonic() - began:.2f} s, 1.2 of them for streams")
    assert "SIGKILL" not in service.rig.server.log()


def test_systemd_waits_longer_than_gunicorn(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would kill the workers in the middle of what gunicorn waits for."""
    monkeypatch.setenv("CHATSTREAM_MAX_STREAMS", "10")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        config = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)  # which that file raises
    assert float(unit["TimeoutStopSec"]) >= config["graceful_timeout"] + 5


def test_a_reload_keeps_a_stream(
    unit: Unit, tmp_path: Path, short_base: Path, provider: Provider
) -> None:
    """`systemctl reload`: new workers answer, and what the old ones stream comes to its end."""
    with running(unit, tmp_path, short_base, provider) as service:
        old = service.rig.server.workers
        client = service.begin("old", rate=20, tokens=40)
        service.reload()
        eventually(lambda: set(service.rig.server.workers) - set(old), "a new worker")
        new = service.begin("new", silent_after=1)
        status, _, _ = service.rig.client().ask("POST", "/api/chat/cancel/new")
        assert status == 200
        new.body()
        assert client.body().endswith(b"data: [DONE]\n\n")
        assert " completed " in service.rig.server.ending_of("old")
        assert is_running(service.main)


def test_a_wrong_setting_is_not_tried_again(unit: Unit, tmp_path: Path, short_base: Path) -> None:
    """gunicorn's status for it is one that `Restart=` leaves alone."""
    environ = {"PATH": os.environ["PATH"], "CHATSTREAM_PING_INTERVAL": "soon"}
    environ |= {"CHATSTREAM_BIND": "127.0.0.1:0", "CHATSTREAM_BUS": f"unix://{short_base}"}
    done = subprocess.run(
        shlex.split(unit["ExecStart"]), cwd=ROOT, env=environ, timeout=30, capture_output=True
    )
    assert b"CHATSTREAM_PING_INTERVAL must be a number" in done.stderr
    assert str(done.returncode) in unit["RestartPreventExitStatus"].split()


def test_systemd_understands_it(unit: Unit, tmp_path: Path) -> None:
    """Without a word of complaint."""
    require("systemd-analyze")
    done = _analyze(unit, tmp_path, "verify")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_little_is_exposed(unit: Unit, tmp_path: Path) -> None:
    """As systemd reckons it."""
    require("systemd-analyze")
    threshold = f"--threshold={int(EXPOSED * 10)}"
    done = _analyze(unit, tmp_path, "security", "--offline=yes", threshold)
    assert done.returncode == 0, done.stdout


def _analyze(unit: Unit, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = folder / UNIT.name
    path.write_text(unit.text)
    command = ["systemd-analyze", *words, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)
