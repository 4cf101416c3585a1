"""doctor.settings: each finding, and the sentence that says what to change."""

from __future__ import annotations

import flask
import pytest
from click.testing import CliRunner
from flask.cli import ScriptInfo

from chatstream import ChatStream, Outcome, stream_ended
from chatstream.cli import group
from chatstream.cli.doctor.check import State
from chatstream.cli.doctor.settings import check_app, check_key, check_keys, given_keys
from chatstream.settings.table import Settings
from chatstream.telemetry.signals import usage_only
from tests.cli.doctor.findings import KEY, only, states


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
