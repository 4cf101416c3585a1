"""Receiving in other configurations: ends, full workers, other sockets, protocols and apps."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import serving
from tests.integration.processes import Provider, is_running
from tests.integration.test_receiving import (
    BEGUN,
    CASES,
    FIRST,
    HELLO,
    SHORT,
    SLACK,
    UPLOAD,
    Case,
    answers,
    assert_outcomes,
    assert_quiet,
    upload,
)
from tests.integration.test_servers import assert_whole_answers, silent


@pytest.mark.parametrize("worker", ["gthread", "gevent"])
def test_silent_clients_do_not_keep_a_worker(
    log_file: Path, provider: Provider, worker: str
) -> None:
    """SIGTERM: who has not begun a request is not waited for as long as gunicorn would."""
    long = {"CHATSTREAM_HEADERS_TIMEOUT": "600", "CHATSTREAM_KEEPALIVE_TIMEOUT": "600"}
    limits = {**SHORT, **long, "CHATSTREAM_WORKER_CLASS": worker}
    with serving(log_file, provider, **limits) as rig:
        for begin in (b"", b"", b"GET", BEGUN):
            rig.client().sock.sendall(begin)
        kept = rig.client()
        assert kept.ask("GET", "/hello")[0] == 200
        begun = time.monotonic()
        rig.server.terminate()
        eventually(lambda: not is_running(rig.server.pid) or not rig.server.workers, "the end")
        assert time.monotonic() - begun < 4 + SLACK
        assert_quiet(rig)


def test_idle_connections_give_way(log_file: Path, provider: Provider) -> None:
    """Where worker_connections is reached, who asks for nothing makes room for who asks."""
    limits = {**SHORT, "CHATSTREAM_HEADERS_TIMEOUT": "600", "CHATSTREAM_KEEPALIVE_TIMEOUT": "600"}
    with serving(log_file, provider, "--worker-connections=20", "--threads=8", **limits) as rig:
        kept = [rig.client() for _ in range(15)]
        for client in kept:
            assert client.ask("GET", "/hello")[0] == 200
        for _ in range(30):
            rig.client()
        silent(rig, "asking")
        begun = time.monotonic()
        assert rig.server.cancel("asking")[0] == 200
        assert time.monotonic() - begun < 1
        assert kept[0].to_the_end() == b""
        assert_quiet(rig)


def test_a_full_gevent_worker_goes_on(log_file: Path, provider: Provider) -> None:
    """When those that filled it have been cut."""
    options = ["--worker-connections=40"]  # 32 of them are for cancels
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": "gevent"}
    with serving(log_file, provider, *options, **limits) as rig:
        for _ in range(60):
            rig.client()
        begun = time.monotonic()
        assert rig.server.get("/hello") == (200, b"hello")
        assert time.monotonic() - begun < 2 * FIRST + SLACK
        assert_quiet(rig)


class Unix(Client):
    """A client of a socket in the file system."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self._buffer = b""


def test_a_unix_socket(
    log_file: Path, tmp_path: Path, provider: Provider, worker_class: str
) -> None:
    """The same limits, the same answers."""
    path = tmp_path / "here"
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, "--bind", f"unix:{path}", **limits) as rig:
        names = ("silent", "half a body", "half a long upload", "kept, and half a request")

        def connect() -> Client:
            rig.clients.append(Unix(path))
            return rig.clients[-1]

        assert_outcomes({name: CASES[name] for name in names}, connect)
        client = connect()
        client.sock.sendall(HELLO + upload(b"a" * 30_000))
        assert answers(client, 2) == [(200, b"hello"), (200, b"30000")]
        assert_whole_answers(rig)
        assert_quiet(rig)


def test_proxy_protocol_is_gunicorns(log_file: Path, provider: Provider, worker_class: str) -> None:
    """What we do not know is received as gunicorn does, and everything else goes on."""
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, "--proxy-protocol=auto", **limits) as rig:
        client = rig.client()
        client.sock.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + HELLO)
        assert answers(client, 1) == [(200, b"hello")]
        client = rig.client()  # the binary form begins with what could be empty lines
        client.sock.sendall(b"\r\n\r\n\0\r\nQUIT\n" + b"\x20\0\0\0" + HELLO)
        assert answers(client, 1) == [(200, b"hello")]
        assert_whole_answers(rig)
        silent(rig, "cancelled")
        assert rig.server.cancel("cancelled")[0] == 200
        assert_quiet(rig)


def test_without_keep_alive(log_file: Path, provider: Provider, worker_class: str) -> None:
    """gunicorn's `keepalive = 0`: every answer is a connection's last, and says so."""
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, "--keep-alive", "0", **limits) as rig:
        client = rig.client()
        client.sock.sendall(HELLO)
        status, headers = client.head()
        assert (status, headers["connection"]) == (200, "close")
        assert client.to_the_end() == b"hello"
        assert_outcomes({name: CASES[name] for name in ("silent", "half a body")}, rig.client)
        assert_quiet(rig)


def test_apps_that_are_not_flasks(log_file: Path, provider: Provider, worker_class: str) -> None:
    """Any WSGI app has the limits of the environment, and only one answer to a request."""
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, app="tests.integration.plain:app", **limits) as rig:
        client = rig.client()
        client.sock.sendall(upload(b"a" * 30_000))
        assert client.head()[0] == 200
        for path in (b"/upload", b"/careless"):
            cut = rig.client()
            head = UPLOAD.replace(b"/upload", path) + b"Content-Length: 99999\r\n\r\n"
            cut.sock.sendall(head + b"a" * 30_000)
            said = cut.to_the_end()
            assert said.startswith(b"HTTP/1.1 408")
            assert said.count(b"HTTP/1.1") == 1
        assert_quiet(rig)


def test_settings_of_the_app(log_file: Path, provider: Provider, worker_class: str) -> None:
    """What is in `app.config` only holds for receiving too."""
    app = "tests.integration.plain:configured"
    with serving(log_file, provider, app=app, CHATSTREAM_WORKER_CLASS=worker_class) as rig:
        ours = BEGUN.replace(b"/api/chat", b"/mine")
        cases = {
            "silent": Case(b"", None, 1),
            "half a body": Case(ours, b"408", 0.5),
            "ours drips": Case(ours, b"408", 0.5, drips=b" " * 90),
            "kept": Case(b"", None, 0.7, first=HELLO),
        }
        assert_outcomes(cases, rig.client)
        assert_quiet(rig)


def test_gunicorns_own_gthread(log_file: Path, provider: Provider) -> None:
    """--worker-class gthread is gunicorn's, and our configuration knows its slots."""
    with serving(log_file, provider, "--worker-class=gthread", "--threads=8") as rig:
        assert "Using worker: gthread" in rig.server.log()
        for number in range(4):
            silent(rig, f"slot-{number}")
        assert rig.client().post("slot-5").head()[0] == 503
        assert rig.server.cancel("slot-1")[0] == 200


def test_max_requests(log_file: Path, provider: Provider, worker_class: str) -> None:
    """A worker that has served its number ends, whoever is silent, and another goes on."""
    limits = {**SHORT, "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, "--max-requests", "10", **limits) as rig:
        first = rig.server.worker
        rig.client()
        rig.client().sock.sendall(b"GET")
        for _ in range(10):
            rig.server.get("/hello")
        eventually(lambda: rig.server.worker != first, "another worker")
        eventually(lambda: not is_running(first), "the end of the first")
        assert_quiet(rig)


def test_a_reload(log_file: Path, provider: Provider, worker_class: str) -> None:
    """HUP: the old worker lets go of who is silent, and serves what was begun."""
    limits = {"CHATSTREAM_HEADERS_TIMEOUT": "600", "CHATSTREAM_WORKER_CLASS": worker_class}
    with serving(log_file, provider, **limits) as rig:
        first = rig.server.worker
        rig.client()
        begun = rig.client()
        begun.sock.sendall(HELLO[:10])
        eventually(lambda: rig.server.get("/hello")[0] == 200, "an answer")
        os.kill(rig.server.pid, signal.SIGHUP)
        eventually(lambda: first not in rig.server.workers or rig.server.worker != first, "the new")
        begun.sock.sendall(HELLO[10:])
        assert answers(begun, 1) == [(200, b"hello")]
        eventually(lambda: not is_running(first), "the end of the first")
        assert_quiet(rig)
