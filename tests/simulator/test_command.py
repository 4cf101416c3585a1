"""command: `python -m chatstream.simulator`."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chatstream.simulator import Simulator
from tests.conftest import PATIENCE
from tests.simulator.client import CHAT, Client, Tls

ROOT = Path(__file__).resolve().parents[2]


class Command:
    """`python -m chatstream.simulator`, listening."""

    def __init__(self, *options: str, **more: Any) -> None:
        self.process = run("--port", "0", *options, **more)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode()
        self.port = int(self.line.rpartition(":")[2].split("/")[0])

    def end(self, number: int) -> tuple[int, str, str]:
        """Exit code and what was written meanwhile."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out.decode(), err.decode()


def run(*options: str, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chatstream.simulator", *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )


@contextmanager
def command(*options: str, **more: Any) -> Iterator[tuple[Command, Client]]:
    running = Command(*options, **more)
    client = Client(running)  # type: ignore[arg-type]  # it only asks for the port
    try:
        with running.process, closing(client):
            yield running, client
            running.process.kill()
    finally:
        running.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command(number: int) -> None:
    """One line when it listens, one per request; ends in peace, also in mid-stream."""
    with command("--rate", "0", "--tokens", "3", "--set", "pad=5") as (running, client):
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        assert running.line == f"chatstream simulator: listening on {url}\n"
        assert client.chat(id="a").text().count("xxxxx") == 3
        client.begin(silent_after=0)
        client.getresponse()
        code, out, err = running.end(number)
    assert (code, err) == (0, "")
    assert out.startswith("chatstream simulator: a: finished after 0.")
    assert out.endswith(" s, 3 of 3 tokens generated\n")


def test_command_quiet(tls: Tls) -> None:
    """Says nothing of requests. TLS works from here, too."""
    with command("--quiet", "--certfile", tls.certfile) as (running, _):
        with closing(Client(running, tls.context)) as client:  # type: ignore[arg-type]
            assert client.chat(tokens=1, rate=0).status == 200
        assert "listening on https://127.0.0.1:" in running.line
        assert running.end(signal.SIGTERM) == (0, "", "")


def test_command_that_nobody_listens_to() -> None:
    """A full pipe does not stop it."""
    name = "x" * 1000
    with command("--tokens", "0") as (running, client):
        for _ in range(100):
            assert client.chat(id=name).status == 200
        code, out, _ = running.end(signal.SIGTERM)
    assert code == 0
    assert 0 < out.count("\n") < 100


def test_command_out_of_descriptors() -> None:
    """Those that it has are served, the others when there is room again."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))

    with command("--quiet", preexec_fn=limit) as (running, first):
        assert first.stats()["requests"] == 0
        waiting = [
            socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)
            for _ in range(40)
        ]
        assert first.stats()["connections_open"] < 30
        for sock in waiting:
            sock.close()
        with closing(Client(running)) as later:  # type: ignore[arg-type]
            assert later.stats()["connections_total"] == 40
        assert first.stats()["internal_errors"] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--set", "tokens"], "KEY=JSON"),
        (["--set", "nonsense=1"], "simulate.nonsense"),
        (["--rate", "-1"], "simulate.rate"),
        (["--certfile", "/nowhere.pem"], "certfile"),
        (["--port", "99999"], "port"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
    ],
)
def test_command_with_bad_options(options: list[str], expected: str) -> None:
    """A sentence and exit code 2."""
    _, err = (process := run("--port", "0", *options)).communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert expected in err.decode()
    assert "Traceback" not in err.decode()


def test_command_with_a_port_in_use(provider: Simulator) -> None:
    """One clear sentence and exit code 2."""
    out, err = (process := run("--port", str(provider.port))).communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, b"")
    assert err.decode().count("\n") == 1
    assert f"127.0.0.1:{provider.port} is in use" in err.decode()
