"""A second process, for what the kernel keeps for each: its locks, and a life of its own."""

from __future__ import annotations

import ast
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import PATIENCE, eventually

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, types
for package in ("chatstream", "chatstream.bus"):  # not what they import: a peer has to start soon
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [package.replace(".", "/")]
names = {}
for line in sys.stdin:
    try:
        answer = eval(line, names)
    except SyntaxError:
        answer = exec(line, names)
    print(repr(answer), flush=True)
"""


class Peer:
    """A process that does what it is told, one line of Python at a time.

    What it answers has to be a literal.
    """

    def __init__(self, *lines: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        try:
            for line in lines:
                self.do(line)
        except BaseException:
            self.kill()
            raise

    def do(self, line: str) -> Any:
        """Has it done; returns the value."""
        self.begin(line)
        return self.result()

    def begin(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """The value of what was begun."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        assert ready, "no answer from the other process"
        return ast.literal_eval(self._process.stdout.readline().decode())

    def stop(self) -> None:
        """SIGSTOP: it keeps what it has, and does nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: self._state() == "T", "a stopped process")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: it gets to do nothing more. Idempotent."""
        self._process.kill()
        self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]


def listening(path: Path) -> Peer:
    """A process that has entered a service's directory and listens, which is all it does."""
    return Peer(
        "import os, socket",
        "from pathlib import Path",
        "from chatstream.bus.unix.directory import Directory",
        f"one = Directory(Path({str(path)!r}))",
        "(one.path / 'early').mkdir()",
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
        "sock.bind(one.socket_of(os.getpid()))",
        "sock.listen(0)",
    )
