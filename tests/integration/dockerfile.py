"""A Dockerfile's steps, done in a folder: what an engine would do with this one, but for the walls.

Absolute paths are within the folder, and `python` is ours. What it does not know, fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from tests.integration.processes import ROOT

_PREFIX = "/opt/chatstream"
_LATER = {"USER", "STOPSIGNAL", "HEALTHCHECK", "CMD"}


class Image:
    """What is built, and what it says of how it wants to be run."""

    def __init__(self, dockerfile: Path, folder: Path) -> None:
        """
        Args:
            dockerfile: What is done. Beside it is what is copied.
            folder: Where all of it goes.
        """
        self.root = folder / "image"
        self.environ: dict[str, str] = {}
        self.said: dict[str, str] = {}
        """The instructions that are for later."""
        self._before = folder / "stage-before"
        self._cwd = self.root
        self._ignored = _patterns(dockerfile.with_name(".dockerignore"))
        for word, rest in instructions(dockerfile.read_text()):
            if word in _LATER:
                self.said[word] = rest
            elif word != "EXPOSE":
                getattr(self, f"_{word.lower()}")(rest)

    def command(self, name: str = "CMD") -> list[str]:
        """The exec form of an instruction. Fails if it is the shell's."""
        words: list[str] = json.loads(re.sub(r"^(--\S+\s+)*(CMD\s+)?", "", self.said[name]))
        return words

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a command as in the finished image."""
        environ = {**self.environ, **more}
        return subprocess.run(
            command, cwd=self._cwd, env=environ, capture_output=True, text=True, timeout=120
        )

    def _from(self, rest: str) -> None:
        """Nothing of the stage before is there, but for what is copied."""
        if self.root.exists():
            self.root.rename(self._before)
        self.root.mkdir()
        self.environ.clear()

    def _workdir(self, rest: str) -> None:
        self._cwd = self._inside(rest)
        self._cwd.mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        if rest.startswith("--from="):
            source, target = rest.split()[1:]
            shutil.move(self._before / source.lstrip("/"), self._cwd / target)
            return
        *sources, target = rest.split()
        for name in sources:
            assert not self._is_ignored(name), f".dockerignore keeps {name} from the build"
            where = self._cwd / target
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, where, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, where)

    def _run(self, rest: str) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        keep = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        keep |= {"HOME": os.environ.get("HOME", "/"), "PATH": path}
        subprocess.run(
            ["sh", "-ec", rest], cwd=self._cwd, env=keep, check=True, timeout=120, text=True
        )

    def _env(self, rest: str) -> None:
        for pair in rest.split():
            key, _, value = pair.partition("=")
            value = value.replace("$PATH", "/usr/bin:/bin")
            self.environ[key] = value.replace(_PREFIX, str(self._inside(_PREFIX)))

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _is_ignored(self, name: str) -> bool:
        """The last pattern that matches decides."""
        ignored = False
        for pattern in self._ignored:
            if fnmatch(name, pattern.lstrip("!")):
                ignored = not pattern.startswith("!")
        return ignored


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction's word and the rest, lines that go on joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line]
    return [(word, rest.strip()) for word, _, rest in pairs]


def _patterns(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
