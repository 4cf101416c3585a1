"""examples: what their READMEs say to type is what runs them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chatstream.testing import Answer, Browser
from tests.integration import test_login
from tests.integration.processes import ROOT, Provider, Server

READY = r"(?:Running on|Listening at:) http://127\.0\.0\.1:(\d+)"


def typed(name: str) -> list[str]:
    """The commands of a README, in their order."""
    readme = (ROOT / "examples" / name / "README.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return re.findall(r"^\$ (.+)$", "".join(blocks), re.MULTILINE)


def servers(name: str) -> list[list[str]]:
    """Those that serve the app."""
    words = [shlex.split(line) for line in typed(name)]
    return [each for each in words if each[0] == "gunicorn" or each[-1] == "run"]


def ask_login(browser: Browser) -> Answer:
    form = {"name": "ada", "password": test_login.PASSWORD}
    form["csrf_token"] = test_login.token(browser, "/login")
    assert browser.post("/login", data=form).status == 302
    browser.headers["X-CSRFToken"] = test_login.token(browser, "/")
    return browser.ask("Hello?")


def ask_conversations(browser: Browser) -> Answer:
    assert browser.get("/").status == 200
    return browser.ask("Hello?", session_id=browser.post("/conversations").json["id"])


ASK: dict[str, Callable[[Browser], Answer]] = {
    "login": ask_login,
    "conversations": ask_conversations,
}


@pytest.fixture
def environ(tmp_path: Path, provider: Provider) -> dict[str, str]:
    """What a README exports; but a database and a provider of the test's own."""
    return {
        "SECRET_KEY": "for the tests only",
        "DATABASE": str(tmp_path / "example.sqlite"),
        "CHATSTREAM_UPSTREAM_URL": provider.url,
        "FLASK_RUN_PORT": "0",
        "GUNICORN_CMD_ARGS": "--bind 127.0.0.1:0 --no-control-socket",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.mark.parametrize(
    ("name", "command"),
    [(name, command) for name in ASK for command in servers(name)],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_a_readme_says_to_run(
    name: str, command: list[str], environ: dict[str, str], log_file: Path
) -> None:
    """An answer comes, of the app that is served so."""
    for line in typed(name):
        if "add-user" in line:
            told = {**os.environ, **environ, "FLASK_ADD_USER_PASSWORD": test_login.PASSWORD}
            subprocess.run(shlex.split(line), cwd=ROOT, env=told, check=True, timeout=30)
    environ = {**environ, "WEB_CONCURRENCY": "1"}
    server = Server(log_file, app="", command=command, ready=READY, **environ)
    try:
        browser = Browser(f"http://127.0.0.1:{server.port}")
        answer = ASK[name](browser)
        assert answer.wait(3).text == "A stop button "
        assert answer.stop().status in (200, 404)
    finally:
        server.stop()


@pytest.mark.parametrize("name", ASK)
def test_there_is_something_to_run(name: str) -> None:
    """With either server; and the rest is what the tests above do themselves."""
    programs = [command[0] for command in servers(name)]
    assert programs == ["flask", "gunicorn"]
    rest = [line for line in typed(name) if shlex.split(line) not in servers(name)]
    known = ("pip install", "export SECRET_KEY=", "flask --app", "python -m chatstream.sim")
    address = "export CHATSTREAM_UPSTREAM_URL=http://127.0.0.1:9911/v1/chat/completions"
    assert [line for line in rest if not line.startswith(known) and line != address] == []


def test_the_built_in_provider_is_where_the_readmes_say() -> None:
    """Its port, where it is told none, and its path."""
    shown = subprocess.run(
        [sys.executable, "-m", "chatstream.simulator", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    assert "(default: 9911)" in shown
