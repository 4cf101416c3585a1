"""examples/login with two workers: who may do what, whichever of them is asked."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatstream.testing import Browser, Reply
from tests.conftest import eventually
from tests.integration.processes import ROOT, Provider, Server

PASSWORD = "correct horse battery staple"
QUESTION = {"messages": [{"role": "user", "content": "Hello?"}]}


class Example:
    """Its server, and its provider."""

    def __init__(self, server: Server, provider: Provider) -> None:
        self.server = server
        self.provider = provider
        self.browsers: list[Browser] = []

    def close_browsers(self) -> None:
        while self.browsers:
            self.browsers.pop().close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def browser(self, name: str | None = None) -> Browser:
        """A visitor's, who is logged in where a name is given."""
        browser = Browser(self.url)
        self.browsers.append(browser)
        if name is not None:
            form = {"name": name, "password": PASSWORD, "csrf_token": token(browser, "/login")}
            assert browser.post("/login", data=form).status == 302
            browser.headers["X-CSRFToken"] = token(browser, "/")
        return browser

    def by_all(self, ask: Callable[[], Reply]) -> list[Reply]:
        """The answers to one request, asked again and again until every worker has given one."""
        replies: dict[str, Reply] = {}

        def all_have() -> bool:
            reply = ask()
            replies[reply.headers["X-Worker"]] = reply
            return set(replies) == set(map(str, self.server.workers))

        eventually(all_have, "an answer of each worker")
        return [*replies.values()]


def token(browser: Browser, path: str) -> str:
    """The CSRF token of a page."""
    found = re.search(r'name="csrf-token" content="([^"]+)"', browser.get(path).text)
    assert found
    return found[1]


def add_user(name: str, *options: str, **environ: str) -> None:
    """With the example's own command."""
    command = [sys.executable, "-m", "flask", "--app", "examples/login/app.py", "add-user", name]
    subprocess.run(
        [*command, "--password", PASSWORD, *options],
        cwd=ROOT,
        env={**os.environ, **environ},
        check=True,
        capture_output=True,
        timeout=30,
    )


@contextlib.contextmanager
def serving(
    folder: Path, worker_class: str, defaults: dict[str, Any] | None = None
) -> Iterator[Example]:
    environ = {
        "SECRET_KEY": "for the tests only",
        "DATABASE": str(folder / "users.sqlite"),
    }
    add_user("ada", "--admin", **environ)
    add_user("bob", **environ)
    with contextlib.closing(Provider(defaults=defaults or {})) as provider:
        server = Server(
            folder / "server.log",
            "--pythonpath",
            "examples/login",
            app="tests.integration.example:app",
            CHATSTREAM_UPSTREAM_URL=provider.url,
            CHATSTREAM_WORKER_CLASS=worker_class,
            WEB_CONCURRENCY="2",
            **environ,
        )
        try:
            yield Example(server, provider)
            assert server.errors() == []
        finally:
            server.stop()


@pytest.fixture(scope="module", params=["gthread", "gevent"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Example]:
    with serving(tmp_path_factory.mktemp("example"), request.param) as example:
        yield example


@pytest.fixture
def example(shared: Example) -> Iterator[Example]:
    yield shared
    shared.close_browsers()


def test_somebody_elses_answer_is_none(example: Example) -> None:
    """The same 404 by every worker; and its owner stops it by any."""
    ada, bob = example.browser("ada"), example.browser("bob")
    answer = ada.ask("Tell me a story.", script={"rate": 1})
    for reply in example.by_all(lambda: bob.cancel(answer)):
        assert (reply.status, reply.json) == (404, {"ok": False, "reason": "not_found"})
    assert not example.provider.request(answer.stream_id)["closed_by"]
    replies = example.by_all(lambda: ada.cancel(answer))
    assert {reply.status for reply in replies} <= {200, 404}
    assert example.provider.request(answer.stream_id, "closed")["closed_by"] in ("client", "reset")
    ended = example.server.ending_of(answer.session_id)
    assert "aborted by client/cancel cause=cancel" in ended


def test_an_owner_is_the_users_id(example: Example) -> None:
    """On every worker the same: a second question in a session finds the first one."""
    browser = example.browser("bob")
    answers = [browser.ask("?", session_id="mine", script={"rate": 1}) for _ in range(2)]
    answers[0].read()
    assert not answers[0].broken
    assert "aborted by superseded" in example.server.ending_of("mine", answers[0].stream_id)
    assert browser.cancel("mine").status == 200


def test_without_the_token_nothing_is_asked(example: Example) -> None:
    """Neither route, by no worker; and the refusal is JSON."""
    ada = example.browser("ada")
    answer = ada.ask("Tell me a story.", script={"rate": 1})
    del ada.headers["X-CSRFToken"]
    before = example.provider.names()
    for ask in (lambda: ada.post("/api/chat/stream", json=QUESTION), lambda: ada.cancel(answer)):
        for reply in example.by_all(ask):
            assert (reply.status, reply.json["reason"]) == (400, "csrf")
            assert reply.headers.get_content_type() == "application/json"
    assert example.provider.names() == before
    assert not example.provider.request(answer.stream_id)["closed_by"]
    answer.close()
    assert example.provider.request(answer.stream_id, "closed")["closed_by"] in ("client", "reset")


def test_a_stranger_is_asked_who_they_are(example: Example) -> None:
    """By each worker, on both routes."""
    stranger = example.browser()
    stranger.headers["X-CSRFToken"] = token(stranger, "/login")
    before = example.provider.names()
    for path in ("/api/chat/stream", "/api/chat/cancel/s-1"):
        for reply in example.by_all(lambda path=path: stranger.post(path, json=QUESTION)):
            assert (reply.status, reply.json["reason"]) == (401, "unauthenticated")
    assert example.provider.names() == before


def test_logging_out_ends_it_all(example: Example) -> None:
    """What streams in any worker, and access to each of them."""
    ada = example.browser("ada")
    answers = [ada.ask("Tell me a story.", script={"rate": 1}) for _ in range(3)]
    other = example.browser("bob").ask("Tell me a story.", script={"rate": 1})
    form = {"csrf_token": ada.headers["X-CSRFToken"]}
    assert ada.post("/logout", data=form).status == 302
    for answer in answers:
        closed = example.provider.request(answer.stream_id, "closed")["closed_by"]
        assert closed in ("client", "reset")
        assert "cause=cancel" in example.server.ending_of(answer.session_id)
    for reply in example.by_all(lambda: ada.post("/api/chat/stream", json=QUESTION)):
        assert reply.status == 401
    assert not example.provider.request(other.stream_id)["closed_by"]


def test_no_database_is_held_while_it_streams(example: Example) -> None:
    """The users' one was asked who it is, and is closed before the first byte."""
    answer = example.browser("ada").ask("Tell me a story.", script={"rate": 1})
    opened = []
    for entry in Path(f"/proc/{answer.headers['X-Worker']}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.append(os.readlink(entry))
    assert [name for name in opened if name.startswith("socket:")]
    assert not [name for name in opened if "users.sqlite" in name]
