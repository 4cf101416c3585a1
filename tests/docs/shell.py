"""A reader's shell: one bash that types what a page says, and what goes on in its background."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import PATIENCE

FUNCTIONS = Path(__file__).with_name("functions.sh")

LONGEST = 3 * PATIENCE
"""Seconds that a command may take."""


class Process:
    """A process, with those it starts, whose output is read as it comes.

    Attributes:
        output: What it has printed, as far as that was read.
        address: `host:port` that it was given to listen at.
    """

    def __init__(self, command: list[str], folder: Path, environ: dict[str, str]) -> None:
        self.output = ""
        self.address = ""
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._descriptor = self._process.stdout.fileno()
        os.set_blocking(self._descriptor, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._descriptor, selectors.EVENT_READ)
        self._bytes = b""

    def write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def until(self, pattern: str, since: int = 0, patience: float = LONGEST) -> re.Match[str]:
        """Reads until the output from `since` on has it. Fails when it ends, or takes too long."""
        deadline = time.monotonic() + patience
        goes_on = True
        while not (match := re.compile(pattern, re.MULTILINE).search(self.output, since)):
            if not goes_on:
                raise AssertionError(f"it ended without {pattern!r}:\n{self.output[since:]}")
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"no {pattern!r} in {patience} s:\n{self.output[since:]}")
            goes_on = self.read()
        return match

    def read(self) -> bool:
        """Takes what is there. Whether more may come."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._descriptor, 65536):
                self._bytes += piece
                self.output = self._bytes.decode(errors="replace")
            return False
        return True

    def signal(self, name: str) -> None:
        self._process.send_signal(signal.Signals[name])

    def end(self) -> None:
        """Has it end, and all that it has started, as a terminal that is closed would."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=PATIENCE)
                return


class Shell:
    """One bash, which keeps its variables and its folder from block to block."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._folder = folder
        self._environ = environ
        self._process: Process | None = None
        self._script = folder / ".typed"

    def type(self, command: str) -> tuple[int, str]:
        """Runs a command. Returns its exit code, and all that it says."""
        if self._process is None:
            bash = ["bash", "--noprofile", "--norc"]
            self._process = Process(bash, self._folder, self._environ)
            self._process.write(f". '{FUNCTIONS}'\n")
        self._script.write_text(f"{command}\n")
        since = len(self._process.output)
        self._process.write(f". '{self._script}' </dev/null; printf '\\n\\001%d\\001\\n' $?\n")
        try:
            match = self._process.until(r"\n\x01(\d+)\x01\n", since)
        except AssertionError:
            self._process.end()
            self._process = None  # what comes next has another
            raise
        return int(match[1]), self._process.output[since : match.start()]

    def begin(self, command: str, **environ: str) -> Process:
        """Runs a command in the background, with the environment as it was in the beginning."""
        bash = ["bash", "--noprofile", "--norc", "-c", f". '{FUNCTIONS}'; {command}\n"]
        return Process(bash, self._folder, {**self._environ, **environ})

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.end()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """What a console block types, and what it shows after each.

    Raises:
        ValueError: It shows something before the first command.
    """
    found: list[tuple[str, list[str]]] = []
    goes_on = False
    for line in text.splitlines():
        if goes_on:
            found[-1] = (f"{found[-1][0]}\n{line}", [])
        elif line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
        else:
            raise ValueError(f"no command stands before {line!r}")
        goes_on = not found[-1][1] and (line.endswith("\\") or _is_open(found[-1][0]))
    if not found:
        raise ValueError("no command: a line that begins with $ and a blank")
    return found


def _is_open(command: str) -> bool:
    """Whether a quotation or a here-document goes on."""
    if here := re.search(r"<<'?(\w+)'?", command):
        return not re.search(rf"^{here[1]}$", command, re.MULTILINE)
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return False


def shows(shown: list[str], said: str) -> bool:
    """Whether what a page shows is what was said. A `…` is anything in a line; alone, any lines."""
    pattern = ""
    for line in "\n".join(shown).strip("\n").split("\n"):
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            words = (re.escape(word) for word in line.rstrip().split("…"))
            pattern += r"[^\n]*?".join(words) + r"[ \t]*\n"
    return re.fullmatch(rf"\s*{pattern}\s*", said.replace("\r\n", "\n").rstrip() + "\n") is not None
