"""Real gunicorn with a provider of its own, and what the kernel says of both."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from chatstream.simulator import Simulator
from tests.conftest import eventually

ROOT = Path(__file__).resolve().parents[2]
TERMINAL = ("completed", "aborted by", "failed:")

OURS = ["gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--config", "gunicorn.conf.py"]
"""What `Server` runs, unless it is told something else."""


FOREIGN = ["gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--config", "/dev/null"]
"""gunicorn with a configuration that knows nothing of chatstream."""


class Provider:
    """A simulator, asked over HTTP as anybody could."""

    def __init__(self, **options: Any) -> None:
        self.simulator = Simulator(**options).start()
        self.port = self.simulator.port
        self.scheme = "https" if options.get("certfile") else "http"
        self._context = None
        if self.scheme == "https":
            self._context = ssl._create_unverified_context()

    @property
    def url(self) -> str:
        return self.simulator.url.replace("127.0.0.1", "localhost")

    def get(self, path: str) -> Any:
        url = f"{self.scheme}://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, context=self._context, timeout=20) as response:
            return json.load(response)

    def request(self, name: str, wait: str = "started", **more: object) -> dict[str, Any]:
        """The figures of one request, once it is as far as `wait` says."""
        query = "&".join(f"{key}={value}" for key, value in {"timeout": 10, **more}.items())
        figure: dict[str, Any] = self.get(f"/requests/{name}?wait={wait}&{query}")
        return figure

    def names(self) -> set[str]:
        return {figure["id"] for figure in self.get("/requests")}

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.get("/stats")
        return stats

    def close(self) -> None:
        self.simulator.close()


class Server:
    """gunicorn in a process of its own, with one worker unless `options` say otherwise."""

    def __init__(
        self,
        log: Path,
        *options: str,
        app: str = "tests.integration.app:app",
        command: list[str] | None = None,
        ready: str = r"Listening at: https?://127\.0\.0\.1:(\d+)",
        tls: ssl.SSLContext | None = None,
        python: str = sys.executable,
        cwd: Path = ROOT,
        asks: bool = True,
        **environ: str | None,
    ) -> None:
        """
        Args:
            log: What it prints goes there.
            options: More of its command line.
            app: Where the app is.
            command: A module, or the path of a script, and its arguments.
            ready: What it prints when it listens; the group is the port.
            tls: How to ask it.
            python: Whose packages it has.
            cwd: Where it runs.
            asks: Whether it is asked something, until it answers; else its workers are awaited.
            environ: Its environment; None for what shall not be there.
        """
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CHATSTREAM_", "DEEPSEEK_")) and "proxy" not in key.lower()
        }
        inherited |= {"WEB_CONCURRENCY": "1", "CHATSTREAM_API_KEY": "sk-secret-of-the-tests"}
        command = command or OURS
        module = [] if "/" in command[0] else ["-m"]
        whole = {**inherited, **environ}
        self._log = log
        self._tls = tls
        self._terminated = False
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [python, *module, *command, *options, *([app] if app else [])],
                cwd=cwd,
                env={key: value for key, value in whole.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self.port = int(eventually(lambda: self._listens_at(ready), "the server"))
            eventually(self._answers if asks else lambda: self.workers, "an answer, or workers")
        except BaseException:
            self.stop()
            raise

    def _listens_at(self, ready: str) -> str | None:
        self._gone()
        match = re.search(ready, self.log())
        return match and match[1]

    def _gone(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.log()}")

    def _answers(self) -> bool:
        self._gone()
        with contextlib.suppress(OSError):
            return self.get("/debug")[0] in (200, 404)
        return False

    def get(self, path: str) -> tuple[int, bytes]:
        return self.ask("GET", path)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """One request over a connection of its own."""
        connection: http.client.HTTPConnection
        if self._tls is not None:
            connection = http.client.HTTPSConnection("localhost", self.port, context=self._tls)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(
                method, path, body, {k.replace("_", "-"): v for k, v in headers.items()}
            )
            response = connection.getresponse()
            return response.status, response.read()

    def cancel(self, session: str, stream: str | None = None) -> tuple[int, Any]:
        query = f"?streamId={stream}" if stream else ""
        status, body = self.ask("POST", f"/api/chat/cancel/{session}{query}")
        return status, json.loads(body)

    def debug(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.get("/debug")[1])
        return facts

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def errors(self) -> list[str]:
        """What gunicorn, an app or the interpreter says when something went wrong."""
        bad = re.compile(r"Traceback|(\[|^)(ERROR|CRITICAL)\b|Exception ignored")
        return [line for line in self.log().splitlines() if bad.search(line)]

    def lines_of(self, session: str) -> list[str]:
        return [line for line in self.log().splitlines() if f"[SSE] {session} " in line]

    def ending_of(self, session: str, stream: str = "") -> str:
        """The one terminal line of a session with one stream, or of that stream."""
        named = f" stream={stream} " if stream else ""

        def endings() -> list[str]:
            return [line for line in self.lines_of(session) if ends(line) and named in line]

        lines = eventually(endings, "an ending")
        assert len(lines) == 1, lines
        return lines[0]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def worker(self) -> int:
        """The worker's pid."""
        return int(self.debug()["pid"])

    @property
    def workers(self) -> list[int]:
        """The pids of all workers, the newest last."""
        return [pid for pid in children(self.pid) if is_running(pid)]

    @property
    def listener(self) -> int:
        """The inode of the socket it listens on."""
        (inode,) = [number for number, ports in tcp_sockets(listening=True) if self.port in ports]
        return inode

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.worker}/fd"))

    def terminate(self) -> None:
        """Asks the server to end. Idempotent: gunicorn ends at the first SIGTERM."""
        if not self._terminated:
            self._terminated = True
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            for worker in children(self._process.pid):
                os.kill(worker, signal.SIGKILL)
            self._process.kill()
            self._process.wait(10)
            raise


def fails_to_start(log: Path, **more: Any) -> str:
    try:
        server = Server(log, **{"app": "wsgi:app", **more})
    except RuntimeError:
        return log.read_text()
    server.stop()
    raise AssertionError("it started")


def ends(line: str) -> bool:
    """Whether a log line is a terminal one."""
    return any(word in line for word in TERMINAL)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether any thread of a process goes on; one that only waits to be collected does not."""
    return any(
        state(f"{pid}/task/{entry.name}") != "Z" for entry in _entries(Path(f"/proc/{pid}/task"))
    )


def state(process: int | str) -> str:
    """What a process does, as proc_pid_stat(5) has it: T for stopped. Z when there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def awaits_events(pid: int) -> bool:
    """Whether a process's main thread is in epoll_wait (proc_pid_wchan(5)), if the kernel tells."""
    where = Path(f"/proc/{pid}/wchan").read_text()
    return where in ("", "0") or "epoll" in where or "ep_poll" in where


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return list(folder.iterdir())
    return []


def descriptors(pids: list[int], *, but: Container[int] = ()) -> dict[int, int]:
    """Processes' open descriptors, less those of TCP connections from or to the ports `but`."""
    left_out = {
        f"socket:[{inode}]" for inode, ports in tcp_sockets() if any(port in but for port in ports)
    }
    return {pid: len([name for name in _opened(pid) if name not in left_out]) for pid in pids}


def _opened(pid: int) -> Iterator[str]:
    for entry in _entries(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(entry)


def tcp_sockets(*, listening: bool = False) -> Iterator[tuple[int, list[int]]]:
    """Inode and ports of this machine's TCP sockets: connections, or listeners (proc_net_tcp)."""
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, here, there, now, rest = line.split(maxsplit=4)
            if now != "06" and (now == "0A") is listening:  # 06: TIME_WAIT, which is nobody's
                ports = [int(end.rpartition(":")[2], 16) for end in (here, there)]
                yield int(rest.split()[5]), ports


def tcp(state: str, *, local: int | None = None, remote: int | None = None) -> Iterator[int]:
    """The local ports of this machine's TCP sockets in `state` (proc_net_tcp)."""
    number = {"ESTABLISHED": "01", "SYN_SENT": "02", "CLOSE_WAIT": "08"}[state]
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, here, there, now, _ = line.split(maxsplit=4)
            if now != number:
                continue
            ports = [int(end.rpartition(":")[2], 16) for end in (here, there)]
            if local in (None, ports[0]) and remote in (None, ports[1]):
                yield ports[0]
