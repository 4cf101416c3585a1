"""Who reads a page from its top to its end, and does what it says."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask

from chatstream.testing import Live, Provider
from tests.conftest import NODE_MODULES, eventually
from tests.docs.blocks import ROOT
from tests.docs.shell import Process, Shell, shows

ADDRESS = re.compile(r"\b(?:localhost|127\.0\.0\.1):8000\b")
"""Where pages have their service. The tests have theirs on free ports."""

QUICK = {"tokens": 20, "rate": 400}
"""How the provider answers, where a page does not say otherwise."""


class Reader:
    """The reader of one page, with an empty folder, a shell and a provider.

    Attributes:
        page: The page's file.
        folder: Where files are written and programs run.
        provider: The built-in one; Python has it as `provider`.
        names: What Python blocks have defined so far.
        done: How many of the page's parts have been run.
        lacks: What was not on this machine for one of them.
    """

    def __init__(self, page: Path, folder: Path) -> None:
        """
        Args:
            page: The page's file.
            folder: An empty folder.
        """
        self.page = page
        self.folder = folder
        self.done = 0
        self.lacks = ""
        self._stack = contextlib.ExitStack()
        self.provider = self._stack.enter_context(Provider(**QUICK))
        self._service = ""  # host:port of what the page's addresses mean
        self._processes: list[Process] = []
        environ = self._environment()
        here = {"CI": os.environ.get("CI", "")}  # where what lacks is a failure
        self._stack.enter_context(_replaced(os.environ, environ | here))
        self._stack.enter_context(_chdir(folder))
        self.shell = self._stack.enter_context(Shell(folder, environ))
        self.names: dict[str, Any] = {
            "__name__": page.stem,
            "provider": self.provider,
            "reader": self,
        }
        sys.path.insert(0, str(folder))
        self._stack.callback(sys.path.remove, str(folder))
        (folder / "node_modules").symlink_to(NODE_MODULES)

    def _environment(self) -> dict[str, str]:
        """A user's: without settings that are about, with those that a page takes for granted."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CHATSTREAM_", "DEEPSEEK_", "GUNICORN_", "FLASK_", "PYTEST_"))
            and "proxy" not in key.lower()
            and key not in ("CI", "COLUMNS", "FORCE_COLOR", "MAKEFLAGS")
        }
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "CHECKOUT": str(ROOT),
            "TERM": "dumb",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "WEB_CONCURRENCY": "1",
            "CHATSTREAM_UPSTREAM_URL": self.provider.url,
            "CHATSTREAM_API_KEY": self.provider.key,
        }

    @property
    def service(self) -> str:
        """`host:port` of the service that the page speaks of now."""
        if not self._service:
            self.begin('cd "$CHECKOUT" && exec gunicorn wsgi:app', "Listening at: .*8000")
        return self._service

    @property
    def url(self) -> str:
        """The same as an address."""
        return f"http://{self.service}"

    def here(self, text: str) -> str:
        """What a page says, with this service's address in it."""
        return ADDRESS.sub(lambda _: self.service, text) if ADDRESS.search(text) else text

    def serve(self, app: Flask) -> Live:
        """Serves an app in this process; the page's addresses are its from now on."""
        live = self._stack.enter_context(Live(app))
        self._service = live.url.partition("://")[2]
        return live

    def begin(self, command: str, until: str, *, aside: bool = False) -> Process:
        """Runs something that goes on, until the page has been read.

        If it says that it has the port it is given, the page's addresses are its from now on.

        Args:
            command: For the shell.
            until: What it prints once it runs, as a pattern; 8000 in it is the port it has.
            aside: The page's addresses stay whose they are.
        """
        port = _free_port()
        process = self.shell.begin(
            self.here(command) if self._service else command,
            GUNICORN_CMD_ARGS=f"--bind 127.0.0.1:{port} --no-control-socket",
            CHATSTREAM_BIND=f"127.0.0.1:{port}",
            FLASK_RUN_PORT=str(port),
        )
        self._stack.callback(process.end)
        self._processes.append(process)
        process.until(until.replace("8000", str(port)))
        process.address = f"127.0.0.1:{port}"
        if not aside and re.search(rf":{port}\b", process.output):
            self._service = process.address
        return process

    def log(self) -> str:
        """What all that goes on has printed so far."""
        for process in self._processes:
            process.read()
        return "\n".join(process.output for process in self._processes)

    def logged(self, line: str) -> bool:
        """Whether a line as this, less what stands before its [SSE], has been printed."""
        lines = re.sub(r"^.*?(?=\[(?:SSE|bus)\])", "", self.log(), flags=re.MULTILINE).splitlines()
        return any(shows([line], said) for said in lines)

    def until_logged(self, words: str) -> str:
        """Waits until a line of what goes on has `words`; returns it."""

        def lines() -> list[str]:
            return [line for line in self.log().splitlines() if words in line]

        return eventually(lines, words)[0]

    def finally_(self, end: Callable[[], object]) -> None:
        """Has `end` called when the page has been read."""
        self._stack.callback(end)

    def close(self) -> None:
        """Ends what the page has begun, the latest first."""
        for value in list(self.names.values()):
            if isinstance(value, Flask) and "chatstream" in value.extensions:
                value.extensions["chatstream"].stop()
        for path in self.folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
        self._stack.close()
        self.names.clear()
        gc.collect()  # what was left open is this page's, and no later test's


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 has not."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _replaced(environ: Any, values: dict[str, str]) -> Iterator[None]:
    before = dict(environ)
    environ.clear()
    environ.update(values)
    try:
        yield
    finally:
        environ.clear()
        environ.update(before)
