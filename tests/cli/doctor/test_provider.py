"""doctor.provider: the way to it, step by step, and what it answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from chatstream.cli.doctor import provider
from chatstream.cli.doctor.check import State
from chatstream.cli.doctor.provider import check_provider
from chatstream.settings.table import Settings
from chatstream.simulator import Simulator
from tests.cli.doctor.findings import KEY, only, states


class Provider(ThreadingHTTPServer):
    """Answers every GET as a test wants it; keeps what was asked."""

    daemon_threads = True

    def __init__(self, status: int, body: bytes, **headers: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = status, body, headers
        self.asked: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def settings(self) -> Settings:
        url = f"http://127.0.0.1:{self.server_port}/v1/chat/completions"
        return Settings(upstream_url=url, api_key=KEY, model="m-1")

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Provider

    def do_GET(self) -> None:
        """It is all that is asked: a POST would be answered with 501."""
        key = self.headers["Authorization"]
        self.server.asked.append((self.command, self.path, key))
        status, body, headers = self.server.answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def answering() -> Iterator[Callable[..., Provider]]:
    made: list[Provider] = []

    def make(status: int, body: bytes = b"", **headers: str) -> Provider:
        made.append(Provider(status, body, **headers))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.parametrize(
    ("status", "body", "state", "says"),
    [
        (200, b'{"data": [{"id": "m-1"}]}', State.OK, "The key is good, and m-1 is there"),
        (200, b'{"data": [{"id": "m-2"}]}', State.WARN, "'m-1' (CHATSTREAM_MODEL) is not among"),
        (200, b"<html>", State.OK, "answers"),
        (401, b"", State.FAIL, "refused the key (401): set CHATSTREAM_API_KEY"),
        (403, b"", State.FAIL, "refused the key"),
        (404, b"", State.OK, "lists no models"),
        (407, b"", State.FAIL, "proxy wants a password"),
        (302, b"", State.FAIL, "CHATSTREAM_UPSTREAM_URL"),
        (503, b"", State.WARN, "answered with 503"),
    ],
)
def test_what_the_provider_answers(
    answering: Callable[..., Provider], status: int, body: bytes, state: State, says: str
) -> None:
    """One GET of the models, with the key, and nothing that costs."""
    server = answering(status, body, **({"Location": "/other"} if status == 302 else {}))
    checks = list(check_provider(server.settings))
    assert states(checks[:2]) == {"name": "ok", "connection": "ok"}
    assert checks[-1].state is state
    assert says in checks[-1].says
    assert server.asked == [("GET", "/v1/models", f"Bearer {KEY}")]
    assert KEY not in str(checks)


def test_the_built_in_provider_generates_nothing_for_it() -> None:
    simulator = Simulator().start()
    checks = list(check_provider(Settings(upstream_url=simulator.url, model="simulated")))
    assert states(checks) == {"name": "ok", "connection": "ok", "answer": "ok"}
    assert "No key is wanted" in checks[-1].says
    assert simulator.ledger.stats()["requests"] == 0
    simulator.close()


def test_an_address_without_a_list_of_models(answering: Callable[..., Provider]) -> None:
    """It cannot be known where that would be: so it is not asked."""
    server = answering(200)
    settings = Settings(upstream_url=f"http://127.0.0.1:{server.server_port}/generate")
    assert states(check_provider(settings))["answer"] == "note"
    assert server.asked == []


def test_a_port_that_is_closed() -> None:
    """The way ends there, and the sentence names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checks = list(
        check_provider(Settings(upstream_url=f"http://127.0.0.1:{port}/v1/chat/completions"))
    )
    assert states(checks) == {"name": "ok", "connection": "fail"}
    assert "Connection refused" in checks[-1].says
    assert "CHATSTREAM_UPSTREAM_URL" in checks[-1].says


def test_an_answer_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and silent."""
    monkeypatch.setattr(provider, "ANSWER", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/chat/completions"
        checks = list(check_provider(Settings(upstream_url=url)))
    assert states(checks) == {"name": "ok", "connection": "ok", "answer": "fail"}
    assert "did not answer in time" in checks[-1].says


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", none)
    (check,) = check_provider(Settings(upstream_url="https://provider.invalid/chat/completions"))
    assert (check.name, check.state) == ("name", State.FAIL)
    assert "provider.invalid has no address" in check.says


def test_a_name_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for longer than said."""
    release = threading.Event()
    monkeypatch.setattr(provider, "LOOKUP", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20))
    (check,) = check_provider(Settings(upstream_url="https://provider.invalid/chat/completions"))
    release.set()
    assert (check.name, check.state) == ("name", State.FAIL)
    assert "no answer in" in check.says


def test_the_second_address_is_tried(answering: Callable[..., Provider]) -> None:
    """As the service does it: one that refuses is not the end."""
    server = answering(404)
    with provider._connect(["127.0.0.2", "127.0.0.1"], server.server_port, 5.0) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


@pytest.mark.parametrize("known", [True, False])
def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """One that nobody vouches for is said to be that, with where it was looked for."""
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
        tmp_path / "cert.pem"
    )
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    if known:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    simulator = Simulator(certfile=str(tmp_path / "cert.pem")).start()
    url = simulator.url.replace("127.0.0.1", "localhost")
    checks = list(check_provider(Settings(upstream_url=url, model="simulated")))
    simulator.close()
    tls = only(checks, "TLS")
    if known:
        assert states(checks) == {"name": "ok", "connection": "ok", "TLS": "ok", "answer": "ok"}
    else:
        assert tls.state is State.FAIL
        assert checks[-1] is tls
        assert "REQUESTS_CA_BUNDLE" in tls.says


def test_a_socks_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://name:hunter2@127.0.0.1:9")
    (check,) = check_provider(Settings(upstream_url="https://provider.invalid/chat/completions"))
    assert (check.name, check.state) == ("proxy", State.FAIL)
    assert "NO_PROXY" in check.says
    assert "hunter2" not in check.says


def test_a_proxy_is_what_is_connected_to(
    monkeypatch: pytest.MonkeyPatch, answering: Callable[..., Provider]
) -> None:
    """The provider's name is for the proxy to know."""
    proxy = answering(200, b'{"data": [{"id": "m-1"}]}')
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    url = "http://provider.invalid/v1/chat/completions"
    checks = list(check_provider(Settings(upstream_url=url, api_key=KEY, model="m-1")))
    assert states(checks) == {"proxy": "note", "name": "ok", "connection": "ok", "answer": "ok"}
    assert proxy.asked[0][1] == "http://provider.invalid/v1/models"
