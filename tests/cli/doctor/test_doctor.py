"""doctor: all of it, as a command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from click.testing import CliRunner
from flask.cli import ScriptInfo

from chatstream import ChatStream
from chatstream.cli import group
from chatstream.cli.doctor import examine
from chatstream.cli.doctor.check import Check
from chatstream.cli.terminal import Terminal
from chatstream.settings.table import Settings
from chatstream.simulator import Simulator
from chatstream.web.standalone import create_app
from tests.cli.doctor.findings import KEY, OURS, only


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
