"""The table of systems: how each is started in front of a provider, and what it can do."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.client import Address, Connection, chat, request
from bench.processes import ROOT, free_port, process, python, raise_file_limit, tree

PEERS = ROOT / "bench" / "peers"
LITELLM = ROOT / ".venv-litellm" / "bin" / "litellm"
VERCEL = PEERS / "vercel" / "node_modules" / "ai"
STREAM = "/api/chat/stream"
PROVIDER = "/v1/chat/completions"
DIRECT, NGINX, NODE = "direct", "nginx", "node"
DETACHED, ITERABLE, GEVENT = "detached", "gthread iterable", "gevent"
OURS = (DETACHED, ITERABLE, GEVENT)
_START = 120.0  # seconds to the first answer

THREADS = 16
"""Of the worker whose streams hold none."""

DESCRIPTORS = 5
"""Of a stream of ours, while its provider is being called."""


class Refused(RuntimeError):
    """A system did not start, or did not hold what it was given."""


@dataclass(frozen=True)
class Place:
    """What is measured: one simulator, and the system that relays it, as started."""

    simulator: Address
    relay: Address
    path: str
    simulator_pid: int
    pid: int

    @property
    def pids(self) -> list[int]:
        """All processes of the system; of `direct` none."""
        return tree(self.pid) if self.pid else []

    @property
    def worker_pid(self) -> int:
        """The first worker of a gunicorn."""
        return tree(self.pid)[1]


@dataclass(frozen=True)
class Launch:
    """How a system is run: its command, what it reads from the environment."""

    command: list[str]
    settings: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT


@dataclass(frozen=True)
class System:
    """One that is compared.

    Attributes:
        launch: From the provider's URL, a port, the streams to hold, the workers and a folder.
        lacks: What it needs and is not here; empty if it can be run.
        path: Where a chat is asked for.
        ways: How a stream of it can be stopped.
    """

    name: str
    launch: Callable[[str, int, int, int, Path], Launch]
    lacks: Callable[[], str]
    path: str = STREAM
    ways: tuple[str, ...] = ("close", "cancel")


def _ours(worker: str, detach: bool, url: str, port: int, streams: int, workers: int) -> Launch:
    settings = {
        "CHATSTREAM_BIND": f"127.0.0.1:{port}",
        "CHATSTREAM_UPSTREAM_URL": url,
        "CHATSTREAM_WORKER_CLASS": worker,
        "WEB_CONCURRENCY": str(workers),
    }
    command = [sys.executable, "-m", "gunicorn", "wsgi:app"]
    if detach:
        return Launch(command, settings | {"CHATSTREAM_THREADS": str(THREADS)})
    if worker == "gthread":
        settings["CHATSTREAM_DETACH"] = "0"
    slots = min(streams + 32, raise_file_limit() // DESCRIPTORS - 60)
    settings["CHATSTREAM_MAX_STREAMS"] = str(slots)
    settings["CHATSTREAM_THREADS"] = str(slots + max(32, slots // 8))
    command[3:3] = ["--worker-connections", str(2 * slots + 1000)]
    return Launch(command, settings)


def _detached(*given: Any, app: str = "wsgi:app", folder: Path = ROOT, **more: str) -> Launch:
    """Ours as it is run, of another app, in another checkout, or with more settings."""
    launch = _ours("gthread", True, *given[:4])
    return replace(
        launch,
        command=[*launch.command[:-1], app],
        settings=launch.settings | more,
        folder=folder,
    )


def _node(folder: str, url: str, port: int, *_: object) -> Launch:
    settings = {"UPSTREAM_URL": url, "PORT": str(port)}
    return Launch(["node", "relay.mjs"], settings, PEERS / folder)


def _nginx(url: str, port: int, streams: int, workers: int, folder: Path) -> Launch:
    values = {
        "WORKERS": workers,
        "DESCRIPTORS": raise_file_limit(),
        "CONNECTIONS": 2 * streams + 1000,
        "PROVIDER": url.split("/")[2],
        "PORT": port,
    }
    text = (PEERS / "nginx.conf").read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    if os.geteuid() == 0:  # else its workers could not use the folder
        text = f"user root;\n{text}"
    (folder / "nginx.conf").write_text(text)
    return Launch(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"])


def _fastapi(url: str, port: int, streams: int, workers: int, _: Path) -> Launch:
    options = ["--port", str(port), "--workers", str(workers), "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", *options, "bench.peers.fastapi_relay:app"]
    return Launch(command, {"UPSTREAM_URL": url})


def _flask(url: str, port: int, streams: int, workers: int, folder: Path) -> Launch:
    # Elsewhere, since gunicorn would read our gunicorn.conf.py.
    options = ["--worker-class", "gthread", "--threads", str(streams + 64)]
    options += ["--worker-connections", str(2 * streams + 1000), "--workers", str(workers)]
    options += ["--bind", f"127.0.0.1:{port}", "bench.peers.flask_relay:app"]
    environ = {"UPSTREAM_URL": url, "PYTHONPATH": str(ROOT)}
    return Launch([sys.executable, "-m", "gunicorn", *options], environ, folder)


def _litellm(url: str, port: int, streams: int, workers: int, _: Path) -> Launch:
    options = ["--config", str(PEERS / "litellm.yaml"), "--host", "127.0.0.1"]
    options += ["--port", str(port), "--num_workers", str(workers)]
    base = url.removesuffix("/chat/completions")
    settings = {"UPSTREAM_BASE": base, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "1"}
    return Launch([str(LITELLM), *options], settings)


def _needs(*, program: str = "", modules: str = "", file: Path | None = None) -> Callable[[], str]:
    """What `lacks` is where these are needed."""

    def lacks() -> str:
        if program and not shutil.which(program):
            return f"no {program} here"
        missing = [name for name in modules.split() if not importlib.util.find_spec(name)]
        if missing:
            return f"no {missing[0]} here: pip install '.[bench]'"
        if file is not None and not file.exists():
            return f"no {file.relative_to(ROOT)} here: make bench sets it up"
        return ""

    return lacks


def _none(*_: object) -> Launch:
    return Launch([])


_CLOSE = ("close",)
SYSTEMS = {
    system.name: system
    for system in (
        System(DIRECT, _none, _needs(), PROVIDER, _CLOSE),
        System(NGINX, _nginx, _needs(program="nginx"), PROVIDER, _CLOSE),
        System(
            DETACHED,
            lambda *given: _ours("gthread", True, *given[:4]),
            _needs(modules="gunicorn"),
        ),
        System(
            ITERABLE,
            lambda *given: _ours("gthread", False, *given[:4]),
            _needs(modules="gunicorn"),
        ),
        System(
            GEVENT,
            lambda *given: _ours("gevent", False, *given[:4]),
            _needs(modules="gunicorn gevent"),
        ),
        System(NODE, lambda *given: _node("node", *given), _needs(program="node")),
        System("fastapi", _fastapi, _needs(modules="fastapi httpx uvicorn")),
        System("naive flask", _flask, _needs(modules="gunicorn")),
        System(
            "vercel ai",
            lambda *given: _node("vercel", *given),
            _needs(program="node", file=VERCEL),
            ways=_CLOSE,
        ),
        System("litellm", _litellm, _needs(file=LITELLM), PROVIDER, _CLOSE),
    )
}


BEFORE = os.environ.get("BENCH_BEFORE", "")
"""Another checkout of chatstream, to compare this one with in one run."""

HOOKS = {
    system.name: system
    for system in (
        System(
            "before",
            partial(_detached, folder=Path(BEFORE)),
            lambda: "" if BEFORE else "BENCH_BEFORE names no other checkout",
        ),
        System("with a listener", partial(_detached, app="bench.listening:app"), _needs()),
        System(
            "with figures",
            partial(_detached, CHATSTREAM_METRICS="/metrics"),
            _needs(modules="prometheus_client"),
        ),
        System(
            "with a limit",
            partial(_detached, CHATSTREAM_MAX_STREAMS_PER_OWNER="10000"),
            _needs(),
        ),
    )
}
"""Ours with what an app can have of it, and as it was before. Where they are named."""


@contextlib.contextmanager
def up(
    system: System, streams: int, workers: int = 1, settings: dict[str, str] | None = None
) -> Iterator[Place]:
    """Starts a simulator and the system in front of it; begins when a chat was answered.

    Args:
        system: Which.
        streams: How many it is to hold.
        workers: Its processes that serve.
        settings: Added to its environment.

    Raises:
        Refused: It did not answer; what it said went to stderr.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatstream-bench-")))
        folder.chmod(0o755)
        log = stack.enter_context((folder / "log").open("w+"))
        simulator = ["chatstream.simulator", "--port", "0", "--quiet"]
        provider = stack.enter_context(python(simulator, stdout=subprocess.PIPE, stderr=log))
        url = provider.stdout.readline().split()[-1]
        address = ("127.0.0.1", int(url.split("/")[2].split(":")[1]))
        if system.name == DIRECT:
            yield Place(address, address, system.path, provider.pid, 0)
            return
        port = free_port()
        launch = system.launch(url, port, streams, workers, folder)
        started = stack.enter_context(
            process(
                launch.command,
                launch.settings | (settings or {}),
                cwd=launch.folder,
                stdout=log,
                stderr=log,
            )
        )
        place = Place(address, ("127.0.0.1", port), system.path, provider.pid, started.pid)
        try:
            _until_answered(place, started)
        except Refused:
            print((folder / "log").read_text()[-3000:], file=sys.stderr)
            raise
        yield place


def _until_answered(place: Place, started: subprocess.Popen[str]) -> None:
    """Has a short chat answered, which also is what a system does at its first request."""
    deadline, last = time.monotonic() + _START, "nothing"
    while started.poll() is None and time.monotonic() < deadline:
        try:
            with contextlib.closing(Connection(place.relay)) as connection:
                connection.send(chat(place.path, {"tokens": 3, "rate": 0}))
                connection.read_until(b"data: ", 3)
                return
        except (OSError, EOFError) as error:
            last = str(error)
            time.sleep(0.1)
    raise Refused(f"it did not start: {last}")


def cancel(session: str) -> bytes:
    """The request that stops a session's stream."""
    return request("POST", f"/api/chat/cancel/{session}")
