"""A real nginx."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import PATIENCE, eventually

CONFIG = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    {temporary}
    {sites}
}}
"""

USER = "user root;" if os.geteuid() == 0 else ""
"""Whose the folder is."""


def temporary(folder: Path) -> str:
    """Where nginx keeps what is too long for its buffers."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)


def configured(folder: Path, sites: str) -> str:
    """A whole configuration, of these sites."""
    return CONFIG.format(user=USER, folder=folder, temporary=temporary(folder), sites=sites)


@contextlib.contextmanager
def nginx(folder: Path, config: str, *listeners: socket.socket) -> Iterator[None]:
    """nginx with this configuration, which takes over what already listens; ended by its pid.

    So no port has to be free twice. (It is how one nginx hands over to the next.)
    """
    (folder / "nginx.conf").write_text(config)
    numbers = [listener.fileno() for listener in listeners]
    inherited = "".join(f"{number};" for number in numbers)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log")]
    process = subprocess.Popen(
        command, env={**os.environ, "NGINX": inherited}, pass_fds=numbers, stdin=subprocess.DEVNULL
    )
    try:
        pid = folder / "nginx.pid"
        eventually(lambda: pid.exists() or process.poll() is not None, "nginx")
        assert process.poll() is None, (folder / "error.log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)
