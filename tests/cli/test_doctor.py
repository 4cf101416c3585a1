"""cli.doctor: each finding, and the sentence that says what to change."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flask
import pytest
import trustme
from click.testing import CliRunner
from flask.cli import ScriptInfo

from chatstream import ChatStream, Outcome, stream_ended
from chatstream.cli import group
from chatstream.cli.doctor import examine, provider
from chatstream.cli.doctor.bus import check_bus
from chatstream.cli.doctor.check import Check, State
from chatstream.cli.doctor.provider import check_provider
from chatstream.cli.doctor.server import (
    Gunicorn,
    check_gunicorn,
    check_kernel,
    check_reach,
    read_gunicorn,
)
from chatstream.cli.doctor.settings import check_app, check_key, check_keys, given_keys
from chatstream.cli.terminal import Terminal
from chatstream.settings.table import Settings
from chatstream.simulator import Simulator
from chatstream.telemetry.signals import usage_only
from chatstream.web.standalone import create_app
from tests.bus.peer import listening

if TYPE_CHECKING:
    from tests.redis_server import RedisServer

KEY = "sk-very-secret"
OURS = "chatstream.workers.gthread.ThreadWorker"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings, proxies or configuration of this machine's."""
    for name in list(os.environ):
        if name.startswith(("CHATSTREAM_", "DEEPSEEK_", "GUNICORN_")) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    monkeypatch.chdir(tmp_path)


def states(checks: Iterable[Check]) -> dict[str, str]:
    return {check.name: check.state.value for check in checks}


def only(checks: Iterable[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


# Settings


def test_settings_that_are_well() -> None:
    (check,) = check_keys([], {"CHATSTREAM_MODEL", "CHATSTREAM_THREADS"})
    assert check.state is State.OK
    assert check.says.startswith("2 of ")


def test_each_wrong_setting_has_its_sentence() -> None:
    """All of them at once, not one after the other."""
    environ = {"CHATSTREAM_DRAIN": "x", "CHATSTREAM_MODEL": "", "CHATSTREAM_MAX_BODY": "7"}
    settings, faults = Settings.survey({}, environ)
    assert settings.max_body == 7  # what is right counts
    checks = list(check_keys(faults, set(environ)))
    assert [check.state for check in checks] == [State.FAIL] * 2
    assert "CHATSTREAM_MODEL" in checks[0].says
    assert "CHATSTREAM_DRAIN" in checks[1].says


@pytest.mark.parametrize(
    ("key", "near"), [("CHATSTREAM_DRIAN", "CHATSTREAM_DRAIN"), ("CHATSTREAM_COLOUR", "")]
)
def test_a_key_that_nobody_reads(key: str, near: str) -> None:
    """With what may have been meant."""
    check = list(check_keys([], {key}))[1]
    assert check.state is State.WARN
    assert check.says.startswith(f"{key} is read by nobody.")
    assert check.says.endswith(f"Did you mean {near}?" if near else "nobody.")


def test_the_keys_of_app_and_environment() -> None:
    found = given_keys({"CHATSTREAM_A": 1, "DEBUG": True}, {"CHATSTREAM_B": "", "PATH": ""})
    assert found == {"CHATSTREAM_A", "CHATSTREAM_B"}


@pytest.mark.parametrize(
    ("url", "key", "state", "says"),
    [
        (None, "", State.FAIL, "DEEPSEEK_API_KEY"),
        ("https://other.test/v1/chat/completions", "", State.WARN, "CHATSTREAM_API_KEY"),
        ("http://127.0.0.1:9/v1/chat/completions", "", State.OK, "on this machine"),
        (None, KEY, State.OK, "of 14 characters"),
        (None, f"Bearer {KEY}", State.WARN, "without Bearer"),
        (None, f'"{KEY}"', State.WARN, "quotes"),
    ],
)
def test_the_key(url: str | None, key: str, state: State, says: str) -> None:
    """Whether there is one; never what it is."""
    settings = Settings(api_key=key, **({"upstream_url": url} if url else {}))
    check = check_key(settings, {})
    assert check.state is state
    assert says in check.says
    assert KEY not in check.says


def test_the_app() -> None:
    """Where it is, and whether it asks who calls."""
    checks = list(check_app(Settings(page="/", openai_prefix="/v1"), identifies=True))
    assert states(checks) == {"routes": "ok"}
    assert checks[0].says == "chat /api/chat, page /, OpenAI's /v1."
    open_to_all = only(check_app(Settings(), identifies=False), "identify")
    assert open_to_all.state is State.NOTE
    assert "CHATSTREAM_TOKENS" in open_to_all.says


LONG = "a" * 16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"CHATSTREAM_TOKENS": f"ann:{LONG},bob:{LONG}2"}, [(State.OK, "tokens 2, of owners 2")]),
        (
            {"CHATSTREAM_TOKENS": f"ann:{LONG}", "CHATSTREAM_ADMIN_TOKENS": f"ann:{LONG}2"},
            [(State.OK, "tokens 2, of owners 1, for admins 1.")],
        ),
        (
            {"CHATSTREAM_TOKENS": f"ann:{LONG[1:]},{LONG}"},
            [(State.OK, "tokens 2, of owners 2, for admins 0"), (State.WARN, "guessed: 1.")],
        ),
    ],
)
def test_a_closed_app(settings: dict[str, str], expected: list[tuple[State, str]]) -> None:
    """By how many tokens, and whether they are good ones; none is shown."""
    loaded = Settings.load(settings, {})
    checks = [check for check in check_app(loaded, identifies=True) if check.name != "routes"]
    assert [check.state for check in checks] == [state for state, _ in expected]
    for check, (_, says) in zip(checks, expected, strict=True):
        assert check.name == "tokens"
        assert says in check.says
        assert LONG[1:] not in check.says


@pytest.mark.parametrize(("origins", "warns"), [("*", True), ("https://a.example", False)])
def test_an_open_app_for_the_pages_of_all_sites(origins: str, warns: bool) -> None:
    settings = Settings.load({"CHATSTREAM_CORS_ORIGINS": origins}, {})
    assert ("cors" in states(check_app(settings, identifies=False))) is warns
    assert "cors" not in states(check_app(settings, identifies=True))


@pytest.mark.parametrize("then", ["abort", "finish"])
def test_answers_that_are_finished_for_nobody(then: str) -> None:
    """Figures are nobody who would read them; the app's own listener is."""
    app = flask.Flask("finishing")
    app.config["CHATSTREAM_ON_DISCONNECT"] = then
    ChatStream(app)

    @stream_ended.connect_via(app)
    @usage_only
    def count(sender: flask.Flask, outcome: Outcome) -> None: ...

    def said() -> str:
        made = ScriptInfo(create_app=lambda: app)
        return CliRunner().invoke(group, ["doctor"], obj=made).output

    assert ("answers to their" in said()) is (then == "finish")

    @stream_ended.connect_via(app)
    def keep(sender: flask.Flask, outcome: Outcome) -> None: ...

    assert "answers to their" not in said()


@pytest.mark.parametrize(("host", "warns"), [("provider.test", True), ("127.0.0.1", False)])
def test_a_meter_of_somebody_elses_provider(host: str, warns: bool) -> None:
    settings = Settings(meter=True, upstream_url=f"http://{host}/v1/chat/completions")
    assert ("meter" in states(check_app(settings, identifies=True))) is warns


# The provider


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


# The server


def gunicorn(**facts: Any) -> Gunicorn:
    usual = {"worker": "gthread", "ours": True, "workers": 2, "threads": 16}
    usual |= {"connections": 2000, "graceful": 30, "preload": False, "h2": False}
    return Gunicorn(**{**usual, "descriptors": 20_000, **facts})


@pytest.mark.parametrize(
    ("facts", "name", "state", "says"),
    [
        ({}, "worker", State.OK, "2 of gthread of 16 threads, ours."),
        ({"worker": "gevent"}, "worker", State.OK, "2 of gevent, ours."),
        ({"worker": "sync"}, "worker", State.FAIL, f"--worker-class {OURS}"),
        ({"ours": False}, "worker", State.WARN, "chatstream.workers.gthread"),
        ({"worker": "gevent", "ours": False}, "worker", State.WARN, "chatstream.workers.gevent"),
        ({"worker": "tornado", "ours": False}, "worker", State.WARN, "not one that"),
        ({"threads": 4}, "worker", State.WARN, "at least 5"),
        ({}, "slots", State.OK, "1968 streams a worker"),
        ({"connections": 11_000}, "slots", State.OK, "3948 streams a worker; 20000"),
        ({"ours": False}, "slots", State.OK, "12 streams a worker"),
        ({"worker": "gevent"}, "slots", State.OK, "1968 streams a worker"),
        ({"worker": "gevent", "descriptors": 1024}, "slots", State.WARN, "MAX_STREAMS=153"),
        ({}, "drain", State.OK, "25 s"),
        ({"graceful": 28}, "drain", State.OK, "25 s"),
        ({"graceful": 27}, "drain", State.WARN, "24 s, not for CHATSTREAM_DRAIN=25"),
        ({"ours": False, "preload": True}, "preload_app", State.WARN, "post_worker_init"),
        ({"h2": True}, "http2", State.WARN, "nginx"),
    ],
)
def test_a_configuration_of_gunicorn(
    facts: dict[str, Any], name: str, state: State, says: str
) -> None:
    """Worker class, numbers and times: what they come to, and what to change."""
    check = only(check_gunicorn(gunicorn(**facts), Settings()), name)
    assert check.state is state
    assert says in check.says


def test_a_configuration_that_is_well_says_no_more() -> None:
    found = states(check_gunicorn(gunicorn(preload=True), Settings()))  # ours is told by itself
    assert found == {"worker": "ok", "slots": "ok", "drain": "ok"}


CLOSED = Settings.load({"CHATSTREAM_TOKENS": "tok-1"}, {})


@pytest.mark.parametrize(
    ("hosts", "here"),
    [
        ((), True),
        (("127.0.0.1",), True),
        (("127.1.2.3", "::1", "localhost"), True),
        (("[::1]",), True),
        (("",), False),
        (("0.0.0.0",), False),
        (("::",), False),
        (("10.0.0.7",), False),
        (("web-1",), False),
        (("127.0.0.1", "0.0.0.0"), False),
    ],
)
def test_who_reaches_it(hosts: tuple[str, ...], here: bool) -> None:
    """Open and beyond this machine is worth a warning; a token without TLS, a note."""
    found = gunicorn(hosts=hosts)
    opened = list(check_reach(found, Settings(), identifies=False))
    closed = list(check_reach(found, CLOSED, identifies=True))
    assert [check.state for check in opened] == ([] if here else [State.WARN])
    assert [check.state for check in closed] == ([] if here else [State.NOTE])
    assert all("CHATSTREAM_TOKENS" in check.says for check in opened)
    assert list(check_reach(gunicorn(hosts=hosts, tls=True), CLOSED, identifies=True)) == []
    assert list(check_reach(found, Settings(), identifies=True)) == []  # it has a login


@pytest.mark.parametrize(
    ("arguments", "hosts", "tls"),
    [
        ("--bind 0.0.0.0:80 --bind [::1]:81", ("0.0.0.0", "::1"), False),
        ("--bind :8000", ("",), False),
        ("--bind unix:/run/x.sock", (), False),
        ("--bind 127.0.0.1:1 --certfile x --keyfile y", ("127.0.0.1",), True),
    ],
)
def test_where_gunicorn_listens(arguments: str, hosts: tuple[str, ...], tls: bool) -> None:
    """As it understands its arguments itself."""
    found = read_gunicorn(arguments)
    assert isinstance(found, Gunicorn), found
    assert (found.hosts, found.tls) == (hosts, tls)


def test_more_streams_than_descriptors() -> None:
    check = only(check_gunicorn(gunicorn(descriptors=1024), Settings(max_streams=500)), "slots")
    assert check.state is State.WARN
    assert "500 streams a worker" in check.says
    assert "ulimit -n" in check.says


def test_streams_that_keep_their_threads() -> None:
    check = only(check_gunicorn(gunicorn(threads=64), Settings(detach=False)), "slots")
    assert "56 streams a worker" in check.says


@pytest.mark.parametrize("how", ["arguments", "GUNICORN_CMD_ARGS", "file"])
def test_gunicorns_configuration_is_read_as_gunicorn_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """Its command line, its environment, its file."""
    arguments = f"--worker-class {OURS} --threads 9 --workers 3 --graceful-timeout 40"
    if how == "file":
        lines = [f"worker_class = {OURS!r}", "threads = 9", "workers = 3", "graceful_timeout = 40"]
        (tmp_path / "gunicorn.conf.py").write_text("\n".join(lines))
    elif how == "GUNICORN_CMD_ARGS":
        monkeypatch.setenv(how, arguments)
    found = read_gunicorn(arguments if how == "arguments" else "")
    assert isinstance(found, Gunicorn)
    assert (found.worker, found.ours, found.threads, found.workers) == ("gthread", True, 9, 3)
    assert found.graceful == 40


@pytest.mark.parametrize(
    ("arguments", "worker"),
    [
        ("--threads 1", "sync"),
        ("--threads 2", "gthread"),
        ("-k gevent", "gevent"),
        ("-k a.B", "a.B"),
    ],
)
def test_gunicorns_own_workers(arguments: str, worker: str) -> None:
    """More than one thread makes sync gthread, as in gunicorn. No class is imported for it."""
    found = read_gunicorn(arguments)
    assert isinstance(found, Gunicorn)
    assert (found.worker, found.ours) == (worker, False)


def test_a_class_in_the_file(tmp_path: Path) -> None:
    """The class itself, not its name."""
    lines = ["from chatstream.workers.gthread import ThreadWorker", "worker_class = ThreadWorker"]
    (tmp_path / "other.py").write_text("\n".join(lines))
    found = read_gunicorn("-c other.py")
    assert isinstance(found, Gunicorn)
    assert (found.worker, found.ours) == ("gthread", True)


def test_what_the_file_does_to_the_process_is_put_back(tmp_path: Path) -> None:
    """Command line, directory and the limit, which counts as the file leaves it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lines = [
        "import os, resource",
        "os.makedirs('sub', exist_ok=True)",
        "chdir = 'sub'",
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft - 1}, {hard}))",
    ]
    (tmp_path / "gunicorn.conf.py").write_text("\n".join(lines))
    argv = list(sys.argv)
    found = read_gunicorn("")
    assert isinstance(found, Gunicorn)
    assert found.descriptors == soft - 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    assert sys.argv == argv
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("arguments", "text", "says"),
    [
        ("--threads many", "", "invalid"),
        ("-c missing.py", "", "missing.py"),
        ("-c bad.py", "1/0", "ZeroDivisionError"),
        ("-c bad.py", "raise SystemExit('CHATSTREAM_THREADS must be at least 5.')", "at least 5"),
    ],
)
def test_a_configuration_that_fails(
    tmp_path: Path, arguments: str, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line that gunicorn says of it."""
    (tmp_path / "bad.py").write_text(text)
    check = read_gunicorn(arguments)
    assert isinstance(check, Check)
    assert check.state is State.FAIL
    assert says in check.says
    assert capsys.readouterr() == ("", "")


def test_no_configuration_of_gunicorn() -> None:
    """It is not guessed; how to say it is said."""
    check = read_gunicorn("")
    assert isinstance(check, Check)
    assert check.state is State.NOTE
    assert "--gunicorn" in check.says


def test_without_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "gunicorn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gunicorn", None)
    check = read_gunicorn("--threads 5")
    assert isinstance(check, Check)
    assert check.state is State.NOTE


def test_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that these tests run on has it all."""
    assert check_kernel().state is State.OK
    monkeypatch.delattr(os, "eventfd")
    check = check_kernel()
    assert check.state is State.FAIL
    assert "eventfd" in check.says


# The bus


@pytest.mark.parametrize(
    ("text", "workers", "state", "says"),
    [
        (None, None, State.OK, "under gunicorn it would be unix"),
        ("local", 1, State.OK, "single process"),
        ("local", 4, State.WARN, "there are 4 workers"),
    ],
)
def test_a_local_bus(text: str | None, workers: int | None, state: State, says: str) -> None:
    (check,) = check_bus(Settings(bus=text), "app", workers)
    assert check.state is state
    assert says in check.says


def test_a_unix_bus(short_base: Path) -> None:
    """Nobody runs yet, and nothing is made by looking."""
    checks = list(check_bus(Settings(bus=f"unix://{short_base}"), "app", 4))
    assert states(checks) == {"bus": "ok", "workers": "note"}
    assert list(short_base.iterdir()) == []


def test_a_unix_bus_without_gunicorn() -> None:
    assert next(iter(check_bus(Settings(bus="unix"), "app", None))).state is State.NOTE


def test_a_directory_that_is_missing_or_not_ones_own(short_base: Path) -> None:
    (check,) = check_bus(Settings(bus=f"unix://{short_base}/missing"), "app", 1)
    assert check.state is State.FAIL
    assert "Please make it" in check.says
    (short_base / f"chatstream-{os.geteuid()}").mkdir(mode=0o755)
    (check,) = check_bus(Settings(bus=f"unix://{short_base}"), "app", 1)
    assert check.state is State.FAIL
    assert "only this user can enter" in check.says


def test_a_worker_that_does_not_answer_is_named(short_base: Path) -> None:
    """It has entered and listens, and that is all it does."""
    path = short_base / f"chatstream-{os.geteuid()}" / "service-app"
    peer = listening(path)
    try:
        _, silent, running = check_bus(Settings(bus=f"unix://{short_base}"), "app", 1)
    finally:
        peer.kill()
    assert silent.state is State.WARN
    assert str(peer.pid) in silent.says
    assert running.says == "1 run, with 0 streams."


def test_redis(redis_server: RedisServer) -> None:
    """Its version and time; a policy that evicts is warned of."""
    settings = Settings(bus=redis_server.url)
    checks = list(check_bus(settings, "app", 4))
    assert states(checks) == {"bus": "ok", "workers": "note"}
    assert " answers in " in checks[0].says
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    check = next(iter(check_bus(settings, "app", 4)))
    assert check.state is State.WARN
    assert "allkeys-lru" in check.says
    assert "noeviction" in check.says
    assert redis_server.command("DBSIZE") == 0


def test_redis_that_is_away_or_wants_a_password(redis_server: RedisServer) -> None:
    redis_server.command("CONFIG", "SET", "requirepass", "hunter2")
    (check,) = check_bus(Settings(bus=redis_server.url), "app", 4)
    assert check.state is State.FAIL
    assert "password" in check.says
    redis_server.stop()
    (check,) = check_bus(Settings(bus=redis_server.url), "app", 4)
    assert check.state is State.FAIL
    assert "refused" in check.says


def test_without_redis_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that needs it has been imported, and it is not there to be."""
    for name in [name for name in sys.modules if name.startswith("chatstream.bus.redis.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    (check,) = check_bus(Settings(bus="redis://127.0.0.1:1/0"), "app", 4)
    assert check.state is State.FAIL
    assert "chatstream[redis]" in check.says


# All of it


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, short_base: Path) -> Iterator[flask.Flask]:
    """An app whose provider and bus are there."""
    simulator = Simulator().start()
    monkeypatch.setenv("CHATSTREAM_UPSTREAM_URL", simulator.url)
    monkeypatch.setenv("CHATSTREAM_BUS", f"unix://{short_base}")
    monkeypatch.setenv("CHATSTREAM_API_KEY", KEY)
    app = flask.Flask("host")
    ChatStream(app)
    yield app
    simulator.close()


def doctor(app: flask.Flask, *arguments: str) -> Any:
    return app.test_cli_runner().invoke(args=["chatstream", "doctor", *arguments])


def test_a_service_that_is_well(healthy: flask.Flask) -> None:
    """0, with a line for everything; the key is in none."""
    result = doctor(healthy, "--gunicorn", f"-k {OURS} --threads 8")
    assert result.exit_code == 0, result.output
    found = {line.split()[1] for line in result.stdout.splitlines()}
    looked_at = {"settings", "key", "routes", "name", "connection", "answer"}
    assert found >= looked_at | {"worker", "slots", "drain", "bus", "workers", "kernel"}
    assert KEY not in result.output


def test_a_service_that_is_not(healthy: flask.Flask) -> None:
    """1 for what fails; a warning alone is none."""
    result = doctor(healthy, "--gunicorn", "-k sync")
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if line.startswith("fail  worker")]


def test_for_programs(healthy: flask.Flask) -> None:
    """One object; the same exit code."""
    result = doctor(healthy, "--json", "--gunicorn", "-k sync")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    worker = only((Check(**check) for check in found["checks"]), "worker")
    assert worker.state == "fail"  # type: ignore[comparison-overlap]
    assert "sync" in worker.says


def test_the_apps_own_keys_are_looked_at(healthy: flask.Flask) -> None:
    healthy.config["CHATSTREAM_MODLE"] = "m-1"
    assert "Did you mean CHATSTREAM_MODEL?" in doctor(healthy).stdout


def test_an_app_that_does_not_start(healthy: flask.Flask) -> None:
    """The rest is looked at all the same, with the environment's settings."""
    out = io.StringIO()
    terminal = Terminal(out, io.StringIO())
    assert examine(None, {}, "No such app.", "", terminal, as_json=False) == 1
    assert "fail  app         No such app.\n" in out.getvalue()
    assert "ok    connection" in out.getvalue()


def test_an_extra_that_is_missing_is_named(
    healthy: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a setting needs and the app does not start without."""
    monkeypatch.setitem(sys.modules, "flask_cors", None)
    monkeypatch.setenv("CHATSTREAM_CORS_ORIGINS", "https://a.example")

    result = CliRunner().invoke(group, ["doctor"], obj=ScriptInfo(create_app=create_app))
    assert result.exit_code == 1
    assert "fail  app         CHATSTREAM_CORS_ORIGINS needs Flask-CORS" in result.output
    assert "chatstream[cors]" in result.output


def test_a_wrong_setting_is_said_once(
    healthy: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the app does not start because of it."""
    monkeypatch.setenv("CHATSTREAM_DRAIN", "soon")
    out = io.StringIO()
    fault = "CHATSTREAM_DRAIN must be …"
    assert examine(None, {}, fault, "", Terminal(out, io.StringIO()), as_json=False) == 1
    assert out.getvalue().count("CHATSTREAM_DRAIN must be") == 1


def test_a_wrong_address_is_not_taken_for_the_default(
    healthy: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek has nothing to do with it, and is not asked."""
    monkeypatch.setenv("CHATSTREAM_UPSTREAM_URL", "htp://here")
    monkeypatch.setattr("chatstream.cli.doctor.check_provider", lambda settings: 1 / 0)
    out = io.StringIO()
    assert examine(None, {}, "…", "", Terminal(out, io.StringIO()), as_json=False) == 1
    assert "fail  settings    CHATSTREAM_UPSTREAM_URL must be" in out.getvalue()
    assert "provider  " not in out.getvalue()


def test_a_look_that_fails_is_a_finding(
    healthy: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a way nobody foresaw: it is said, and the others go on."""

    def broken(settings: Settings) -> Any:
        raise KeyError("surprise")

    monkeypatch.setattr("chatstream.cli.doctor.check_provider", broken)
    result = doctor(healthy)
    assert result.exit_code == 1
    assert "fail  provider    Could not be looked at: KeyError: 'surprise'" in result.stdout
    assert "ok    kernel" in result.stdout
