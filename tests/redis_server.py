"""A real redis-server, on a free port, for as long as a test wants it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from pathlib import Path

import redis

from tests.conftest import eventually


class RedisServer:
    """One server and its process. Keeps its port when it is started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.process: subprocess.Popen[bytes]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **options: object) -> redis.Redis:
        return redis.Redis(port=self.port, **options)  # type: ignore[arg-type]

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self._folder), *self._options]
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        eventually(self._answers, "redis-server")

    def _answers(self) -> bool:
        with contextlib.closing(self.client()) as client, contextlib.suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def command(self, *words: object) -> object:
        """What the server says to one command."""
        with contextlib.closing(self.client()) as client:
            answer: object = client.execute_command(*words)
            return answer

    def stop(self) -> None:
        """Ends the server, and with it all it knows. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
