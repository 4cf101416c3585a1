"""cli: the `flask chatstream` commands."""

from __future__ import annotations

import flask
import pytest

from chatstream import ChatStream, simulator


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


def test_simulate_really_is_the_simulator(
    app: flask.Flask, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` comes from the built-in provider itself."""
    result = app.test_cli_runner().invoke(args=["chatstream", "simulate", "--help"])
    assert result.exit_code == 0
    assert "--port" in result.output + capsys.readouterr().out
