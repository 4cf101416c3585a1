"""The processes of the benchmark: simulator, gunicorn, Redis, and the load of streams.

Each has a free port and is ended by its pid. Also what /proc tells of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import Address, Connection, request

_TICK = os.sysconf("SC_CLK_TCK")
_GRACE = 20.0  # seconds to end in


@dataclass(frozen=True)
class Stand:
    """What is measured: one simulator and the gunicorn that relays it.

    `worker_pid` is its worker's, or of several the first one's.
    """

    simulator: Address
    relay: Address
    simulator_pid: int
    worker_pid: int


@contextlib.contextmanager
def stand(
    worker_class: str, threads: int, *, own_worker: str | None = None, **settings: str
) -> Iterator[Stand]:
    """Runs a simulator and gunicorn as the repository configures it, with `settings` set.

    With gunicorn's own worker of that name, if one is given.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile("w+", prefix="chatstream-bench-"))
        command = ["chatstream.simulator", "--port", "0", "--quiet"]
        simulator = stack.enter_context(_python(command, stdout=subprocess.PIPE, stderr=log))
        line = simulator.stdout.readline()  # ... listening on http://127.0.0.1:PORT/v1/...
        port = int(line.split("://")[1].split(":")[1].split("/")[0])
        settings = {"WEB_CONCURRENCY": "1"} | settings
        settings |= {
            "CHATSTREAM_UPSTREAM_URL": f"http://127.0.0.1:{port}/v1/chat/completions",
            "CHATSTREAM_WORKER_CLASS": worker_class,
            "CHATSTREAM_THREADS": str(threads),
        }
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        address, fd = listener.getsockname(), listener.fileno()
        settings["CHATSTREAM_BIND"] = f"fd://{fd}"
        options = ["--worker-class", own_worker] if own_worker else []
        master = stack.enter_context(
            _python(
                ["gunicorn", *options, "wsgi:app"], settings, stdout=log, stderr=log, pass_fds=[fd]
            )
        )
        listener.close()
        try:  # the request waits in the listener's queue until the worker is there
            Connection(address).ask(request("POST", "/api/chat/cancel/nobody"))
        except (OSError, EOFError, ValueError):
            print(Path(log.name).read_text()[-3000:], file=sys.stderr)
            raise
        yield Stand(("127.0.0.1", port), address, simulator.pid, _children(master.pid)[0])


@contextlib.contextmanager
def redis_server() -> Iterator[str | None]:
    """Runs a redis-server; yields its address, or None where there is none to run."""
    if shutil.which("redis-server") is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with _ended(subprocess.Popen(command, stdout=subprocess.DEVNULL)):
        for _ in range(500):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def joined(bus: str, workers: int) -> Iterator[None]:
    """Has `workers` processes join a bus, each with some streams."""
    if not workers:
        yield
        return
    command = ["bench.joined", bus, str(workers)]
    with _python(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if not process.stdout.readline():
            raise RuntimeError("the other workers did not join")
        yield


@contextlib.contextmanager
def load(
    relay: Address, streams: int, simulate: dict[str, object]
) -> Iterator[tuple[int, Callable[[], int]]]:
    """Holds `streams` streams open; begins when each has its first event.

    Yields:
        The process' pid, and what tells the number of events so far: see `bench.load`.
    """
    order = json.dumps({"address": relay, "streams": streams, "simulate": simulate})
    with _python(["bench.load", order], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def answer() -> int:
            figures = json.loads(process.stdout.readline() or "null")
            if figures is None or figures["ended"]:
                raise RuntimeError(f"streams of the load ended: {figures}")
            return int(figures["events"])

        def events() -> int:
            process.stdin.write("\n")
            process.stdin.flush()
            return answer()

        answer()
        yield process.pid, events


@contextlib.contextmanager
def _python(
    module: list[str], settings: dict[str, str] | None = None, **popen: Any
) -> Iterator[Any]:
    """A Popen of a module, in the repository's root, without what could change how it behaves."""
    unwanted = ("CHATSTREAM_", "GUNICORN_", "DEEPSEEK_", "WEB_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environ = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=Path(__file__).resolve().parent.parent,
        env=environ | (settings or {}),
        text=True,
        **popen,
    )
    with _ended(process):
        yield process


@contextlib.contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Ends the process, and its children where it does not do that itself."""
    try:
        yield process
    finally:
        children = _children(process.pid) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()


def _children(pid: int) -> list[int]:
    return [int(child) for child in _proc(f"{pid}/task/{pid}/children").split()]


def _proc(path: str) -> str:
    return Path("/proc", path).read_text()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads."""
    fields = _proc(f"{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def machine_seconds() -> float:
    """Time that all cores were busy, whoever it was for."""
    user, nice, system, _idle, _iowait, *rest = map(int, _proc("stat").split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / _TICK


def memory_kb(pid: int) -> int:
    """Proportional set size: what the process costs the machine."""
    return int(_proc(f"{pid}/smaps_rollup").partition("\nPss:")[2].split()[0])


def context_switches(pid: int) -> dict[str, int]:
    """Times that each thread of the process went to sleep."""
    counts = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends meanwhile
            text = (task / "status").read_text()
            counts[task.name] = int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return counts
