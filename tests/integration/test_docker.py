"""The Dockerfile: linted; its steps done for real; and built and run where there is an engine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually, lacking, program
from tests.integration.client import SHUT_DOWN, Client
from tests.integration.conftest import Rig, serving
from tests.integration.dockerfile import Image, instructions
from tests.integration.processes import ROOT, Provider, is_running

DOCKERFILE = ROOT / "Dockerfile"
BOUND = "0.0.0.0:8000"


def test_the_linter_has_no_complaint() -> None:
    linted = subprocess.run(
        [program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, timeout=60
    )
    assert (linted.returncode, linted.stdout) == (0, "")


def test_it_is_nobodys_user() -> None:
    """A number, so that Kubernetes' runAsNonRoot can tell; and it stays so to the end."""
    said = instructions(DOCKERFILE.read_text())
    (user,) = [rest for word, rest in said if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image, built into a folder. Its packages come from where pip has them from."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        try:
            image = Image(DOCKERFILE, Path(folder))
        except subprocess.CalledProcessError:  # pip has said why
            lacking("packages cannot be had here")
        yield image


@pytest.fixture
def container(image: Image, provider: Provider, tmp_path: Path) -> Iterator[Rig]:
    """What `CMD` starts, where and with what the Dockerfile says, but for the port."""
    assert image.environ["CHATSTREAM_BIND"] == BOUND
    command = image.command()
    script = str(image.root / "opt/chatstream/.venv/bin" / command[0])
    environ = {**image.environ, "CHATSTREAM_BIND": "0.0.0.0:0", "CHATSTREAM_DRAIN": "1.2"}
    with serving(
        tmp_path / "server.log",
        provider,
        command=[script, *command[1:]],
        app="",
        ready=r"Listening at: http://0\.0\.0\.0:(\d+)",
        python=str(Path(script).with_name("python")),
        cwd=image.root / "opt/chatstream",
        **environ,
    ) as rig:
        yield rig


def test_what_is_in_it(image: Image) -> None:
    """What the service needs, and nothing of what is beside it in the checkout."""
    folder = image.root / "opt/chatstream"
    assert {entry.name for entry in folder.iterdir()} == {"wsgi.py", "gunicorn.conf.py", ".venv"}
    code = "import chatstream.workers.gevent, chatstream.workers.gthread, redis"
    done = image.run([str(folder / ".venv/bin/python"), "-c", code])
    assert done.returncode == 0, done.stderr


def test_its_command_serves_and_stops(image: Image, container: Rig) -> None:
    """A stream, a cancel; then what `docker stop` sends: drained, told, gone within its time."""
    whole = container.client().post("whole", simulate={"tokens": 3, "rate": 100})
    whole.until(b"data: [DONE]")
    silent = _silent(container, "cancelled")
    assert container.server.cancel("cancelled")[0] == 200
    assert container.provider.request("cancelled", "closed")["closed_by"] == "client"
    silent.body()
    told = _silent(container, "told")
    processes = [container.server.pid, *container.server.workers]
    os.kill(container.server.pid, signal.Signals[image.said["STOPSIGNAL"]])
    assert told.body().endswith(SHUT_DOWN)
    assert container.provider.request("told", "closed")["closed_by"] == "client"
    eventually(lambda: not any(map(is_running, processes)), "the end", _stop_timeout())


def _silent(rig: Rig, session: str) -> Client:
    client = rig.client().post(session, simulate={"id": session, "silent_after": 2})
    client.head()
    client.until(b'"content"')
    return client


def _stop_timeout() -> float:
    """What the Dockerfile's own lines tell people to give it."""
    (seconds,) = re.findall(r"--stop-timeout (\d+)", DOCKERFILE.read_text())
    return float(seconds)


def test_its_health_check(image: Image, container: Rig) -> None:
    """Well while it serves, ill when it does not."""
    script, *options, code = image.command("HEALTHCHECK")
    python = str(image.root / "opt/chatstream/.venv/bin" / script)
    here = code.replace("127.0.0.1:8000", f"127.0.0.1:{container.server.port}")
    assert here != code
    well = image.run([python, *options, here])
    assert well.returncode == 0, well.stderr
    container.server.stop()
    assert image.run([python, *options, here]).returncode == 1


def test_in_an_engine(provider: Provider) -> None:
    """Built and run for real, where an engine runs: healthy, not root, drained by its stop."""
    if subprocess.run(["sh", "-c", "docker info"], capture_output=True).returncode != 0:
        pytest.skip("no container engine runs here")
    name = f"chatstream-test-{os.getpid()}"
    _docker("build", "--tag", name, str(ROOT), patience=300)
    port = _free_port()
    try:
        _docker(
            *("run", "--detach", "--name", name, "--network", "host", "--stop-timeout", "40"),
            *("--env", f"CHATSTREAM_UPSTREAM_URL={provider.url}", "--env", "CHATSTREAM_DRAIN=1.2"),
            *("--env", f"CHATSTREAM_BIND=127.0.0.1:{port}", "--env", "WEB_CONCURRENCY=1", name),
        )
        eventually(lambda: "Booting worker" in _docker("logs", name), "a worker")
        assert _docker("exec", name, "id", "-u").strip() == "10001"
        client = Client(port).post("told", simulate={"id": "told", "silent_after": 2})
        client.head()
        client.until(b'"content"')
        began = time.monotonic()
        _docker("stop", name, patience=60)
        assert time.monotonic() - began < 40
        assert client.body().endswith(SHUT_DOWN)
        assert provider.request("told", "closed")["closed_by"] == "client"
        client.close()
    finally:
        for what in (("rm", "--force", name), ("rmi", "--force", name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _docker(*what)


def _docker(*words: str, patience: float = 30) -> str:
    done = subprocess.run(
        ["docker", *words],
        check=True,
        timeout=patience,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
