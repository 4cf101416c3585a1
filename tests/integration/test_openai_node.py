"""The Vercel AI SDK in Node against a real server: see tests/node/ai.mjs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require_package
from tests.integration.conftest import Rig
from tests.integration.processes import ROOT
from tests.integration.test_openai import ENDLESS, assert_stopped

FOLDER = ROOT / "tests" / "node"
numbers = itertools.count(1)


class Node:
    """The SDK in a process of its own, which does what it is told."""

    def __init__(self, base_url: str, log: Path) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                ["node", "ai.mjs", base_url],
                cwd=FOLDER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "NO_PROXY": "*"},
            )
        self._log = log

    def tell(self, what: str, name: str, **more: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "name": name, **more}) + "\n")
        self._process.stdin.flush()

    def next(self, name: str) -> dict[str, Any]:
        """What it sees next of that call."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            seen: dict[str, Any] = json.loads(line)
            if seen["name"] == name:
                return seen
        raise EOFError(self._log.read_text())

    def end_of(self, name: str) -> dict[str, Any]:
        while (seen := self.next(name))["event"] == "text":
            pass
        return seen

    def close(self) -> None:
        """Ends it: it has no more to do."""
        self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def node_rig(rigs: Callable[..., Rig]) -> Rig:
    require_package("ai")
    return rigs("plain", "gthread", CHATSTREAM_OPENAI_PREFIX="/v1", CHATSTREAM_PING_INTERVAL="0.6")


@pytest.fixture(scope="module")
def node(node_rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    log = tmp_path_factory.mktemp("node") / "errors.log"
    node = Node(f"http://127.0.0.1:{node_rig.server.port}/v1", log)
    yield node
    node.close()


@pytest.fixture
def rig(node_rig: Rig) -> Iterator[Rig]:
    yield node_rig
    node_rig.check_leaks()
    assert node_rig.server.errors() == []


@pytest.fixture
def session() -> str:
    return f"node-{next(numbers)}"


def test_a_stream_and_one_piece_say_the_same(rig: Rig, node: Node, session: str) -> None:
    """Both to the end."""
    ends = []
    for number, what in enumerate(("stream", "generate")):
        node.tell(what, f"{session}-{number}", simulate={"tokens": 20, "rate": 0})
        ends.append(node.end_of(f"{session}-{number}"))
    assert [end["event"] for end in ends] == ["end", "end"]
    assert [end["reason"] for end in ends] == ["stop", "stop"]
    assert len(ends[0]["text"].split()) == 20
    assert ends[0]["text"] == ends[1]["text"]


@pytest.mark.parametrize("what", ["stream", "generate"])
def test_an_abort_signal_stops_the_provider(rig: Rig, node: Node, session: str, what: str) -> None:
    """In the middle of a stream, and while an answer in one piece is awaited."""
    node.tell(what, session, simulate={"id": session, **ENDLESS})
    rig.provider.request(session)
    if what == "stream":
        assert node.next(session)["event"] == "text"
    node.tell("abort", session)
    assert node.end_of(session)["event"] == "aborted"
    assert_stopped(rig, session)


@pytest.mark.parametrize("what", ["stream", "generate"])
def test_a_cancel_elsewhere_is_no_error(rig: Rig, node: Node, session: str, what: str) -> None:
    """The answer ends, or is one in which nothing is said; the provider is asked once."""
    node.tell(what, session, simulate={"id": session, **ENDLESS})
    rig.provider.request(session)
    if what == "stream":
        assert node.next(session)["event"] == "text"
    assert rig.server.cancel(session)[0] == 200
    end = node.end_of(session)
    assert end["event"] == "end"
    assert (end["text"] == "") is (what == "generate")
    assert_stopped(rig, session, "cause=cancel")


@pytest.mark.parametrize("what", ["stream", "generate"])
def test_a_fault_is_an_error_with_its_sentence(
    rig: Rig, node: Node, session: str, what: str
) -> None:
    """The SDK finds status and message where it looks for them."""
    node.tell(what, session, simulate={"status": 422, "message": "Say less."}, maxRetries=0)
    end = node.end_of(session)
    assert (end["event"], end["status"], end["message"]) == ("error", 400, "Say less.")
