"""cli: the `flask chatstream` commands."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib.metadata import entry_points

import flask
import pytest
from click.testing import CliRunner, Result
from flask.cli import ScriptInfo

from chatstream import ChatStream, simulator
from chatstream.__main__ import create_app
from chatstream.cli import group


@pytest.fixture
def app() -> flask.Flask:
    app = flask.Flask("host")
    ChatStream(app)
    return app


def test_the_commands_are_the_apps(app: flask.Flask) -> None:
    """`flask chatstream` lists what there is."""
    result = app.test_cli_runner().invoke(args=["chatstream", "--help"])
    assert result.exit_code == 0
    assert "simulate" in result.output


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--port", "0", "--pace=5", "-v"], ["--", "--x"]]
)
def test_simulate_passes_everything_on(
    app: flask.Flask, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Every argument, `--help` too, is the simulator's, and its exit code the command's."""
    passed: list[object] = []

    def main(argv: object) -> int:
        passed.append(argv)
        return 7

    monkeypatch.setattr(simulator, "main", main)
    result = app.test_cli_runner().invoke(args=["chatstream", "simulate", *arguments])
    assert passed == [[argument for argument in arguments if argument != "--"]]
    assert result.exit_code == 7


@pytest.mark.parametrize(
    "arguments",
    [[], ["--owner", "me"], ["--stream", "t"], ["s", "--all"], ["--all", "--stream", "t"]],
)
def test_cancel_is_told_what(
    app: flask.Flask, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """A session, or that it is all: neither is guessed."""
    room = importlib.import_module("chatstream.cli.sessions")  # the command has the same name
    monkeypatch.setattr(room, "stop", None)
    monkeypatch.setattr(room, "stop_all", None)
    result = app.test_cli_runner().invoke(args=["chatstream", "cancel", *arguments])
    assert (result.exit_code, "say --all" in result.output) == (2, True)


def test_simulate_really_is_the_simulator(
    app: flask.Flask, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` comes from the built-in provider itself."""
    result = app.test_cli_runner().invoke(args=["chatstream", "simulate", "--help"])
    assert result.exit_code == 0
    assert "--port" in result.output + capsys.readouterr().out


# Where the app comes from


def run(create_app: Callable[[], flask.Flask], *arguments: str) -> Result:
    """A command of the group, as `python -m chatstream` has it."""
    return CliRunner().invoke(group, list(arguments), obj=ScriptInfo(create_app=create_app))


def test_flask_knows_the_commands_without_an_app() -> None:
    """As a plugin: else `doctor` could not say why the app cannot be loaded."""
    (plugin,) = entry_points(group="flask.commands", name="chatstream")
    assert plugin.load() is group


@pytest.mark.parametrize("command", ["sessions", "cancel s", "chat hi"])
def test_a_wrong_setting_is_a_sentence(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """And no traceback."""
    monkeypatch.setenv("CHATSTREAM_DRAIN", "soon")
    result = run(create_app, *command.split())
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: CHATSTREAM_DRAIN must be ")
    assert isinstance(result.exception, SystemExit)


def test_an_app_without_chatstream_is_told_so() -> None:
    result = run(lambda: flask.Flask("bare"), "sessions")
    assert result.exit_code == 1
    assert result.stderr == "Error: bare has no ChatStream: ChatStream(app)\n"


def test_an_app_that_cannot_be_found() -> None:
    """Flask's own sentence."""
    result = CliRunner().invoke(group, ["sessions"], obj=ScriptInfo("nowhere_to_be_found:app"))
    assert result.exit_code == 1
    assert "Could not import 'nowhere_to_be_found'" in result.stderr


def _exit() -> flask.Flask:
    raise SystemExit(3)


def _fail() -> flask.Flask:
    raise RuntimeError("no database")


@pytest.mark.parametrize(
    ("create", "says"),
    [
        (_exit, "the sentence above says why"),
        (_fail, "The app cannot be loaded: RuntimeError: no database"),
        (lambda: flask.Flask("bare"), "bare has no ChatStream"),
    ],
)
def test_the_doctor_needs_no_app(
    monkeypatch: pytest.MonkeyPatch, create: Callable[[], flask.Flask], says: str
) -> None:
    """It says what is the matter with it, and looks at the rest."""
    monkeypatch.setenv("CHATSTREAM_UPSTREAM_URL", "http://127.0.0.1:1/v1/chat/completions")
    result = run(create, "doctor")
    assert result.exit_code == 1
    assert says in result.stdout
    assert "ok    kernel" in result.stdout


def test_the_standalone_services_app() -> None:
    """By the name and the defaults of `wsgi.py`: its commands find its workers."""
    import wsgi

    apps = [create_app(), wsgi.create_app()]
    assert [app.import_name for app in apps] == ["chatstream"] * 2
    one, other = (app.extensions["chatstream"] for app in apps)
    assert one.settings == other.settings
    assert one.settings.page == "/"
    assert one.name[:-1] == other.name[:-1]


def test_the_commands_are_quiet() -> None:
    """The log is as it was afterwards."""
    log = logging.getLogger("chatstream")
    log.setLevel(logging.INFO)
    try:
        run(create_app, "doctor")
        assert log.level == logging.INFO
    finally:
        log.setLevel(logging.NOTSET)
