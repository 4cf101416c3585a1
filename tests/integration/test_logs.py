"""The log of a real service, one JSON object a line from its start to its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE, eventually
from tests.integration.client import Client
from tests.integration.processes import OURS, ROOT, Provider, Server, fails_to_start, is_running

JSON = {"CHATSTREAM_LOG_FORMAT": "json", "WEB_CONCURRENCY": "2"}
KEY = "sk-secret-of-the-tests"


def objects(text: str) -> list[dict[str, Any]]:
    """What was printed: fails where a line is no object."""
    values = [json.loads(line) for line in text.splitlines()]
    for value in values:
        assert {"level", "message"} <= set(value), value
    return values


def of_session(server: Server, session: str) -> list[dict[str, Any]]:
    return [value for value in objects(server.log()) if value.get("session_id") == session]


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_a_whole_run(provider: Provider, log_file: Path, worker_class: str) -> None:
    """Streams of every ending, a reload, a killed worker, and the end: all of it parses."""
    server = Server(
        log_file,
        "--access-logfile",
        "-",
        app="wsgi:app",
        CHATSTREAM_UPSTREAM_URL=provider.url,
        CHATSTREAM_WORKER_CLASS=worker_class,
        **JSON,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)

        def post(session: str, **simulate: Any) -> Client:
            client = stack.enter_context(contextlib.closing(Client(server.port)))
            secret = [{"role": "user", "content": "what-people-write"}]
            client.post(session, messages=secret, simulate={"text": "said", **simulate})
            client.head()
            return client

        post("whole", tokens=3, rate=1000).body()
        post("failed", status=500)
        post("rejected", status=400, message="You wrote what-people-write")
        post("left").close()
        post("stopped")
        assert server.cancel("stopped", "?x=what-people-write")[0] in (200, 404)
        assert server.cancel("stopped")[0] in (200, 404)
        for session in ("whole", "failed", "rejected", "left", "stopped"):
            eventually(lambda session=session: len(of_session(server, session)) == 2, session)  # type: ignore[misc]
        old = server.workers
        os.kill(old[0], signal.SIGKILL)
        eventually(lambda: "SIGKILL" in server.log(), "word of it")
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: not any(map(is_running, old)), "other workers")
        eventually(lambda: server.get("/api/chat/openapi.json")[0] == 200, "an answer")
    log = server.log()
    values = objects(log)
    assert KEY not in log
    assert "what-people-write" not in log
    started, ended = of_session(server, "stopped")
    assert started["message"].startswith("[SSE] stopped started stream=")
    assert (ended["kind"], ended["cause"], ended["phase"]) == ("aborted", "cancel", "body")
    assert ended["stop_ms"] < 100
    assert ended["stream_id"] == started["stream_id"]
    assert of_session(server, "failed")[1]["code"] == "upstream_error"
    assert of_session(server, "left")[1]["cause"] == "client"
    assert {"completed", "aborted", "failed"} == {v["kind"] for v in values if "kind" in v}
    accesses = [value for value in values if value["logger"] == "gunicorn.access"]
    assert {200, 400, 502} <= {value["status"] for value in accesses}
    assert "/api/chat/cancel/stopped" in {value["path"] for value in accesses}
    assert "Shutting down: Master" in {value["message"] for value in values}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CHATSTREAM_PING_INTERVAL", "soon"),  # the app's
        ("CHATSTREAM_WORKER_CLASS", "sync"),  # gunicorn.conf.py's
        ("CHATSTREAM_THREADS", "4"),
    ],
)
def test_a_wrong_setting_is_an_object_too(log_file: Path, key: str, value: str) -> None:
    values = objects(fails_to_start(log_file, **{key: value}, **JSON))
    assert [v for v in values if f"{key} must be" in v["message"]]


def test_an_exception_of_the_app_is_one_object(provider: Provider, log_file: Path) -> None:
    """With its traceback in a field: of a request, and of an app that cannot be imported."""
    environ = {"CHATSTREAM_UPSTREAM_URL": provider.url, **JSON}
    server = Server(log_file, app="tests.integration.unruly:app", **environ)
    try:
        with pytest.raises((OSError, http.client.HTTPException)):
            server.get("/breaks")
    finally:
        server.stop()
    raised = [value for value in objects(server.log()) if "exc_info" in value]
    assert any("ValueError: in the middle" in value["exc_info"] for value in raised)


def test_an_app_that_cannot_be_imported(log_file: Path, tmp_path: Path) -> None:
    """gunicorn's own traceback of it is a field as well."""
    (tmp_path / "broken_app.py").write_text("raise RuntimeError('in the app')\n")
    log = fails_to_start(log_file, app="broken_app:app", PYTHONPATH=str(tmp_path), **JSON)
    raised = [value for value in objects(log) if "exc_info" in value]
    assert any("RuntimeError: in the app" in value["exc_info"] for value in raised)


@pytest.mark.parametrize("captured", [False, True])
def test_where_the_log_goes(provider: Provider, tmp_path: Path, captured: bool) -> None:
    """gunicorn's file is for its own lines; with --capture-output for all, also after USR1."""
    stderr, file, moved = (tmp_path / name for name in ("stderr", "file", "moved"))
    options = ["--error-logfile", str(file), *(["--capture-output"] if captured else [])]

    def text(path: Path) -> str:
        return path.read_text() if path.exists() else ""

    def ready() -> re.Match[str] | None:
        return re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", text(file))

    environ = {"CHATSTREAM_UPSTREAM_URL": provider.url, "WEB_CONCURRENCY": "1"}
    with stderr.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *OURS, *options, "wsgi:app"],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        port = int(eventually(ready, "a server")[1])

        def end(session: str) -> None:
            client = Client(port)
            client.post(session, simulate={"tokens": 2, "rate": 0})
            client.until(b"[DONE]")
            client.close()

        ours = file if captured else stderr
        end("first")
        eventually(lambda: "[SSE] first completed" in text(ours), "its line")
        assert "[SSE]" not in text(stderr if captured else file)
        file.rename(moved)
        process.send_signal(signal.SIGUSR1)
        eventually(file.exists, "a file anew")
        eventually(lambda: end("second") or "[SSE] second" in text(ours), "the next line")
    finally:
        process.terminate()
        process.wait(PATIENCE * 3)
    eventually(lambda: "Shutting down: Master" in text(file), "gunicorn's last line")
