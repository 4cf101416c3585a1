"""Proxies in front of us, each as deploy/ has it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import PATIENCE, eventually, require
from tests.integration.conftest import Certificate
from tests.integration.nginx import USER, nginx, temporary
from tests.integration.processes import ROOT

Ports = tuple[int, int]
"""Where a proxy listens: with HTTP, and with TLS."""


@contextlib.contextmanager
def _running(log: Path, *command: str, port: int = 0, **more: Any) -> Iterator[None]:
    """A proxy in the foreground, ended by its pid. If it has to find its `port`, it has it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **more
        )

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return port == 0

    try:
        eventually(listens, command[0])
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _substituted(name: str, changes: dict[str, str]) -> str:
    """A shipped file with this machine's paths and ports. Nothing else of it is changed."""
    config = (ROOT / "deploy" / name).read_text()
    for old, new in changes.items():
        assert config.count(old) == 1, f"{old} is not in the shipped file, or twice"
        config = config.replace(old, new)
    return config


@contextlib.contextmanager
def _shipped_nginx(folder: Path, certificate: Certificate, behind: int) -> Iterator[Ports]:
    with _listeners() as (plain, tls):
        ports = _port(plain), _port(tls)
        changes = {
            "\nevents {": f"\ndaemon off;{USER}pid {folder}/nginx.pid;\nevents {{",
            "worker_processes auto;": "worker_processes 1;",
            "worker_rlimit_nofile 20000;": "",
            "worker_connections 10000;": "worker_connections 128;",
            "access_log off;": f"access_log {folder}/access.log; {temporary(folder)}",
            "listen 80;": f"listen 127.0.0.1:{ports[0]};",
            "listen 443 ssl": f"listen 127.0.0.1:{ports[1]} ssl",
            "server 127.0.0.1:8000;": f"server 127.0.0.1:{behind};",
            "/etc/ssl/chat.example.com/fullchain.pem": certificate.cert,
            "/etc/ssl/chat.example.com/privkey.pem": certificate.cert,
        }
        with nginx(folder, _substituted("nginx.conf", changes), plain, tls):
            yield ports


@contextlib.contextmanager
def _shipped_haproxy(folder: Path, certificate: Certificate, behind: int) -> Iterator[Ports]:
    with _listeners() as (plain, tls):
        changes = {
            "    user haproxy\n    group haproxy\n": "",
            "maxconn 10000 ": "maxconn 128 ",
            "bind :80": f"bind fd@{plain.fileno()}",
            "bind :443 ssl": f"bind fd@{tls.fileno()} ssl",
            "/etc/ssl/chat.example.com/both.pem": certificate.cert,
            "127.0.0.1:8000": f"127.0.0.1:{behind}",
        }
        path = folder / "haproxy.cfg"
        path.write_text(_substituted(path.name, changes))
        fds = (plain.fileno(), tls.fileno())
        with _running(folder / "log", "haproxy", "-db", "-f", str(path), pass_fds=fds):
            yield _port(plain), _port(tls)


@contextlib.contextmanager
def _shipped_caddy(folder: Path, certificate: Certificate, behind: int) -> Iterator[Ports]:
    # It inherits no sockets. These are its ports, which nobody else gets while they are bound.
    with _bound() as plain, _bound() as tls:
        ports = _port(plain), _port(tls)
        places = f"http_port {ports[0]}\nhttps_port {ports[1]}\ndefault_bind 127.0.0.1\n"
        keeps = f"storage file_system {folder}/storage\nskip_install_trust\nadmin off\n"
        changes = {
            "\nchat.example.com {\n": f"\n{{\n{places}{keeps}}}\n"
            f"localhost {{\ntls {certificate.cert} {certificate.cert}\n",
            "127.0.0.1:8000": f"127.0.0.1:{behind}",
        }
        path = folder / "Caddyfile"
        path.write_text(_substituted(path.name, changes))
        command = ("caddy", "run", "--adapter", "caddyfile", "--config", str(path))
        home = {**os.environ, **dict.fromkeys(("XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(folder))}
        with _running(folder / "log", *command, port=ports[1], env=home):
            yield ports


SHIPPED = {"nginx": _shipped_nginx, "haproxy": _shipped_haproxy, "caddy": _shipped_caddy}


@contextlib.contextmanager
def shipped(name: str, folder: Path, certificate: Certificate, behind: int) -> Iterator[Ports]:
    """A proxy as deploy/ has it: where it listens, with HTTP and with TLS.

    Args:
        name: One of `SHIPPED`.
        folder: All that it writes is there.
        certificate: What it shows.
        behind: The port of what it is in front of.
    """
    require(name)
    with SHIPPED[name](folder, certificate, behind) as ports:
        yield ports


@contextlib.contextmanager
def _listeners() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that listen already. So no port has to be free twice."""
    with (
        socket.create_server(("127.0.0.1", 0)) as plain,
        socket.create_server(("127.0.0.1", 0)) as tls,
    ):
        yield plain, tls


def _bound() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


def _port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])
