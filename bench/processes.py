"""The processes of the benchmark, each ended by its pid; and what /proc tells of them."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_TICK = os.sysconf("SC_CLK_TCK")
_GRACE = 20.0  # seconds to end in
_DESCRIPTORS = 65_536  # what 5,000 streams may take in one process, and more


@contextlib.contextmanager
def process(
    command: list[str], settings: dict[str, str] | None = None, **popen: Any
) -> Iterator[Any]:
    """A Popen in the repository's root, without what could change how the command behaves."""
    unwanted = ("CHATSTREAM_", "GUNICORN_", "DEEPSEEK_", "WEB_", "NODE_", "OPENAI_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environ = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    started = subprocess.Popen(
        command, **{"cwd": ROOT, "env": environ | (settings or {}), "text": True, **popen}
    )
    with _ended(started):
        yield started


def python(module: list[str], settings: dict[str, str] | None = None, **popen: Any) -> Any:
    """`process` of a Python module."""
    return process([sys.executable, "-m", *module], settings, **popen)


@contextlib.contextmanager
def _ended(started: subprocess.Popen[Any]) -> Iterator[None]:
    """Ends the process, and its children where it does not do that itself."""
    try:
        yield
    finally:
        children = tree(started.pid)[1:] if started.poll() is None else []
        started.terminate()
        try:
            started.wait(_GRACE)
        except subprocess.TimeoutExpired:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            started.kill()
            started.wait()
        for pipe in filter(None, (started.stdin, started.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def redis_server() -> Iterator[str | None]:
    """Runs a redis-server; yields its address, or None where there is none to run."""
    if shutil.which("redis-server") is None:
        yield None
        return
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with process(command, stdout=subprocess.DEVNULL):
        for _ in range(500):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}/0"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def raise_file_limit() -> int:
    """Allows this process and its children as many descriptors as it may; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, _DESCRIPTORS)
    with contextlib.suppress(ValueError, OSError):  # beyond the hard limit only root may go
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = [int(child) for child in _proc(f"{pid}/task/{pid}/children").split()]
    return [pid, *(below for child in children for below in tree(child))]


def _proc(path: str) -> str:
    return Path("/proc", path).read_text()


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes, all their threads."""
    ticks = 0
    for pid in pids:
        fields = _proc(f"{pid}/stat").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK


def machine_seconds() -> float:
    """Time that all cores were busy, whoever it was for."""
    user, nice, system, _idle, _iowait, *rest = map(int, _proc("stat").split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / _TICK


def memory_kb(pids: Iterable[int]) -> int:
    """Proportional set size: what the processes cost the machine."""
    return sum(int(_proc(f"{pid}/smaps_rollup").partition("\nPss:")[2].split()[0]) for pid in pids)


def context_switches(pid: int) -> dict[str, int]:
    """Times that each thread of the process went to sleep."""
    counts = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends meanwhile
            text = (task / "status").read_text()
            counts[task.name] = int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return counts
