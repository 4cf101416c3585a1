"""chatstream.js against the real service: what it calls stopped has stopped at the provider."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.integration.conftest import Rig

numbers = itertools.count(1)

SCENES: dict[str, dict[str, Any]] = {
    "headers": {"headers_after": 60},
    "silent": {"silent_after": 1},
    "streaming": {},
}


class Question:
    """A process that asks with chatstream.js: see question.mjs."""

    def __init__(self, rig: Rig, *how: str, **simulate: Any) -> None:
        self.session = f"javascript-{next(numbers)}"
        options = {
            "url": f"http://127.0.0.1:{rig.server.port}/api/chat/stream",
            "messages": [{"role": "user", "content": "hello"}],
            "sessionId": self.session,
            "simulate": {"id": self.session, "tokens": 5000, "rate": 100, **simulate},
        }
        self._process = subprocess.Popen(
            ["node", str(Path(__file__).with_name("question.mjs")), json.dumps(options), *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stream = self.told()["streamId"]

    def told(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self._process.stdout is not None
        fact: dict[str, Any] = json.loads(self._process.stdout.readline())
        return fact

    def end(self, word: str = "") -> list[dict[str, Any]]:
        """Tells it `word`. Returns what else it says than events, once it has ended."""
        rest, _ = self._process.communicate(word, timeout=20)
        assert self._process.returncode == 0
        facts = [json.loads(line) for line in rest.splitlines()]
        return [fact for fact in facts if "data" not in fact]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=20)


@pytest.fixture
def worker_class() -> str:
    return "gthread"


@pytest.fixture
def ask(rig: Rig) -> Iterator[Callable[..., Question]]:
    require("node")
    questions: list[Question] = []

    def ask(*how: str, **simulate: Any) -> Question:
        questions.append(Question(rig, *how, **simulate))
        return questions[-1]

    yield ask
    for question in questions:
        question.close()


def begin(rig: Rig, ask: Callable[..., Question], scene: str, *how: str) -> Question:
    """A question whose answer is in the middle of a scene."""
    question = ask(*how, **SCENES[scene])
    if scene == "headers":
        rig.provider.request(question.session)
    else:
        assert "data" in question.told()
    return question


def assert_halted(rig: Rig, question: Question) -> str:
    """The provider was told, long before it was done, and so says the log. Returns its line."""
    figure = rig.provider.request(question.session, "closed")
    assert (figure["open"], figure["finished"], figure["attempt"]) == (False, False, 1)
    assert figure["closed_by"] == "client"
    assert figure["generated"] < 5000
    ending = rig.server.ending_of(question.session, question.stream)
    assert "aborted by client/cancel" in ending
    return ending


@pytest.mark.parametrize("scene", SCENES)
def test_stop(rig: Rig, ask: Callable[..., Question], scene: str) -> None:
    """In every phase: the answer is over, the service confirms it, the provider was told."""
    question = begin(rig, ask, scene)
    outcome, result = sorted(question.end("stop\n"), key=lambda fact: "outcome" not in fact)
    assert outcome == {"outcome": "stopped"}
    assert result["confirmed"] is True
    assert result["reason"] in ("cancelled", "not_found")  # not_found: the abort was faster
    assert_halted(rig, question)


def test_the_cancel_alone_stops(rig: Rig, ask: Callable[..., Question]) -> None:
    """Where the connection stays open whatever the client does, it is the cancel that arrives."""
    question = begin(rig, ask, "silent", "deaf")
    facts = question.end("stop\n")
    assert {"confirmed": True, "reason": "cancelled"} in facts
    assert "cause=cancel" in assert_halted(rig, question)


@pytest.mark.parametrize("scene", SCENES)
def test_a_process_that_ends(rig: Rig, ask: Callable[..., Question], scene: str) -> None:
    """As a tab that is closed, with nothing said."""
    question = begin(rig, ask, scene)
    assert question.end("exit\n") == []
    assert "cause=client" in assert_halted(rig, question)


def test_a_newer_question(rig: Rig, ask: Callable[..., Question]) -> None:
    """Somebody else's stop is no error here, and no stop of ours."""
    question = begin(rig, ask, "silent")
    rig.client().post(question.session, simulate={"tokens": 1}).head()
    assert question.end() == [{"outcome": "ended"}]
    assert "aborted by superseded" in rig.server.ending_of(question.session, question.stream)


@pytest.mark.parametrize(
    ("simulate", "facts"),
    [
        ({}, {"outcome": "completed"}),
        (
            {"status": 429, "retry_after": 7},
            {"code": "upstream_rate_limited", "status": 429, "retryAfter": 7},
        ),
        (
            {"truncate_after": 2},
            {"code": "upstream_truncated", "status": 200, "retryAfter": None},
        ),
        ({"error_after": 2}, {"code": "upstream_error", "status": 200, "retryAfter": None}),
    ],
    ids=["completed", "refused", "broken off", "provider's error"],
)
def test_other_ends(
    ask: Callable[..., Question], simulate: dict[str, Any], facts: dict[str, Any]
) -> None:
    """A whole answer is completed; what the service says went wrong is what is thrown."""
    question = ask(**{"tokens": 5, "rate": 0, **simulate})
    assert question.end() == [{"outcome": "failed", **facts}]
