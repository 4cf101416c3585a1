"""Who listens, over real servers: each stream is told of once, with what its client was sent.

And CHATSTREAM_ON_DISCONNECT=finish: an answer that is read to its end without its client.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import MODES, Rig, serving
from tests.integration.processes import Provider

APP = "tests.integration.listening:app"

SERVERS: dict[str, dict[str, Any]] = {
    "gthread": {**MODES["gthread"], "CHATSTREAM_WORKER_CLASS": "gthread"},
    "gevent": {**MODES["gevent"], "CHATSTREAM_WORKER_CLASS": "gevent"},
    "iterable": MODES["iterable"],
}


class Heard:
    """What the app's listeners wrote down."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def lines(self, **wanted: object) -> list[dict[str, Any]]:
        text = self._file.read_text() if self._file.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if wanted.items() <= line.items()]

    def outcome(self, session: str) -> dict[str, Any]:
        """The one of a session with one stream, which was started once, too."""
        names = {"session_id": session}
        eventually(lambda: self.lines(signal="ended", **names), f"the end of {session}")
        assert [line["signal"] for line in self.lines(**names)] == ["started", "ended"]
        (outcome,) = self.lines(signal="ended", **names)
        assert outcome["context"] == [True, False], "an app's context, and no request's"
        return outcome


@pytest.fixture(scope="module", params=SERVERS)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def listened_to(folder: Path, mode: str, policy: str) -> Iterator[tuple[Rig, Heard]]:
    """A server with a provider of its own: a leak check counts that one's connections."""
    environ = {"CHATSTREAM_ON_DISCONNECT": policy, "TEST_HEARD": str(folder / policy)}
    with (
        contextlib.closing(Provider()) as provider,
        serving(folder / f"{policy}.log", provider, app=APP, **SERVERS[mode] | environ) as rig,
    ):
        rig.warm_up(answers=True)
        yield rig, Heard(folder / policy)


@pytest.fixture(scope="module")
def aborting(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Heard]]:
    with listened_to(tmp_path_factory.mktemp(mode), mode, "abort") as both:
        yield both


@pytest.fixture(scope="module")
def finishing(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Heard]]:
    with listened_to(tmp_path_factory.mktemp(mode), mode, "finish") as both:
        yield both


@pytest.fixture
def abort(aborting: tuple[Rig, Heard]) -> Iterator[tuple[Rig, Heard]]:
    yield aborting
    aborting[0].check_leaks()


@pytest.fixture
def finish(finishing: tuple[Rig, Heard]) -> Iterator[tuple[Rig, Heard]]:
    yield finishing
    finishing[0].check_leaks()


def text_of(body: bytes) -> str:
    """What a client that reads these events shows."""
    blocks = re.findall(rb"data: (\{.*\})\n\n", body)
    choices = [choice for block in blocks for choice in json.loads(block)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_a_whole_answer(abort: tuple[Rig, Heard]) -> None:
    """All of it, the provider's own usage, and the times in their order."""
    rig, heard = abort
    client = rig.client().post(
        "whole", stream_options={"include_usage": True}, simulate={"tokens": 30, "rate": 500}
    )
    client.head()
    body = client.body()
    outcome = heard.outcome("whole")
    assert outcome["kind"] == "completed"
    assert outcome["text"] == text_of(body) != ""
    assert outcome["usage"] == [outcome["usage"][0], 30, False]
    assert outcome["bytes"] == len(body)
    assert 0 < outcome["time_to_headers"] <= outcome["time_to_first_event"] < outcome["duration"]


def test_a_cancelled_answer_is_kept_as_it_was_seen(abort: tuple[Rig, Heard]) -> None:
    """Case 40: byte for byte what the client had; its cost an estimate that says so (case 41)."""
    rig, heard = abort
    client = rig.client().post("cancelled", simulate={"rate": 100, "tokens": 5000})
    client.until(b"decided")
    assert rig.server.cancel("cancelled") == (200, {"ok": True, "cancelled": True})
    client.head()
    outcome = heard.outcome("cancelled")
    assert outcome["text"] == text_of(client.body())
    assert (outcome["kind"], outcome["cause"]) == ("aborted", "cancel")
    prompt, completion, estimated = outcome["usage"]
    assert estimated
    assert prompt > 0
    assert completion >= outcome["events"] - 1 > 0
    assert outcome["stop_ms"] is not None


LEAVING: dict[str, Callable[[Client], None]] = {
    "close": Client.close,
    "reset": Client.reset,
    "half-close": Client.half_close,
}


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize(
    "simulate",
    [{"headers_after": 60}, {"silent_after": 0}, {"silent_after": 4}],
    ids=["headers", "silent", "silent later"],
)
def test_a_client_that_leaves(
    abort: tuple[Rig, Heard], request: pytest.FixtureRequest, how: str, simulate: dict[str, Any]
) -> None:
    """Told of once, at once, with what it had been sent; before the first byte too."""
    rig, heard = abort
    name = re.sub(r"\W+", "-", request.node.callspec.id)
    client = rig.client().post(name, simulate={"id": name, **simulate})
    if simulate.get("silent_after"):
        client.until(b"is ")
    rig.provider.request(name)
    LEAVING[how](client)
    outcome = heard.outcome(name)
    assert (outcome["kind"], outcome["cause"]) == ("aborted", "client")
    assert outcome["client_left"] is False
    if "headers_after" in simulate:
        assert outcome["time_to_headers"] is None
    if not simulate.get("silent_after"):
        assert outcome["text"] == ""
        assert outcome["usage"][1] is None, "nobody knows what it has thought"
    else:
        assert outcome["text"] == "A stop button is "
    assert rig.provider.request(name, "closed")["closed_by"] == "client"


def test_a_provider_that_fails(abort: tuple[Rig, Heard]) -> None:
    """What had come of it is there, and why no more."""
    rig, heard = abort
    client = rig.client().post("failed", simulate={"truncate_after": 5, "rate": 500})
    client.head()
    body = client.body()
    outcome = heard.outcome("failed")
    assert (outcome["kind"], outcome["code"]) == ("failed", "upstream_truncated")
    assert outcome["text"] == text_of(body.partition(b"event: error")[0]) != ""


def test_a_listener_that_fails(abort: tuple[Rig, Heard]) -> None:
    """It is logged; the stream, its client and the next stream know nothing of it."""
    rig, heard = abort
    client = rig.client()
    for name in ("broken-1", "broken-2"):  # on one connection
        client.post(name, simulate={"tokens": 3, "rate": 500})
        assert client.head()[0] == 200
        assert client.body().endswith(b"data: [DONE]\n\n")
        assert heard.outcome(name)["kind"] == "completed"
        assert " completed " in rig.server.ending_of(name)
    faults = eventually(lambda: [e for e in rig.server.errors() if "listener" in e][1:], "faults")
    assert "broken" in faults[0]


# CHATSTREAM_ON_DISCONNECT=finish


@pytest.mark.parametrize("how", LEAVING)
def test_an_answer_is_finished_without_its_client(finish: tuple[Rig, Heard], how: str) -> None:
    """The provider says all it has to, and who listens gets it: whole, with its own usage."""
    rig, heard = finish
    name = f"finished-{how}"
    client = rig.client().post(
        name,
        stream_options={"include_usage": True},
        simulate={"id": name, "tokens": 60, "rate": 100},
    )
    client.until(b"promise")
    LEAVING[how](client)
    outcome = heard.outcome(name)
    assert outcome["kind"] == "completed"
    assert outcome["client_left"] is True
    assert outcome["usage"][1:] == [60, False]
    assert len(outcome["text"].split()) > 40
    assert " completed " in (line := rig.server.ending_of(name))
    assert " client=left" in line
    figure = rig.provider.request(name, "closed")
    assert (figure["delivered"], figure["closed_by"]) == (60, "finished")


@pytest.mark.parametrize(
    "simulate",
    [{"headers_after": 0.6}, {"silent_after": 0, "silent_for": 0.6}],
    ids=["headers", "silent"],
)
def test_it_is_waited_for_too(
    finish: tuple[Rig, Heard], simulate: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """A client that leaves before the first byte has asked, all the same."""
    rig, heard = finish
    name = f"waited-{request.node.callspec.id.replace('-', '_')}"
    client = rig.client().post(name, simulate={"id": name, "tokens": 5, "rate": 500, **simulate})
    rig.provider.request(name)
    client.close()
    outcome = heard.outcome(name)
    assert (outcome["kind"], outcome["client_left"]) == ("completed", True)
    assert outcome["text"].startswith("A stop button is a")


def test_a_cancel_stops_what_nobody_watches(finish: tuple[Rig, Heard]) -> None:
    """The provider is told at once, and pays for no more; the cause is the cancel."""
    rig, heard = finish
    client = rig.client().post("unwatched", simulate={"id": "unwatched", "silent_after": 3})
    client.until(b"button")
    client.close()
    assert rig.server.cancel("unwatched") == (200, {"ok": True, "cancelled": True})
    assert rig.provider.request("unwatched", "closed")["closed_by"] == "client"
    outcome = heard.outcome("unwatched")
    assert (outcome["kind"], outcome["cause"]) == ("aborted", "cancel")
    assert outcome["text"].startswith("A stop button")


def test_the_next_question_supersedes_it(finish: tuple[Rig, Heard]) -> None:
    """The session asks again: the answer that nobody watches makes way, as any other."""
    rig, heard = finish
    client = rig.client().post("again", simulate={"id": "again-1", "silent_after": 3})
    client.until(b"button")
    client.close()
    client = rig.client().post("again", simulate={"tokens": 3, "rate": 500})
    client.head()
    assert client.body().endswith(b"data: [DONE]\n\n")
    lines = eventually(lambda: heard.lines(session_id="again", signal="ended")[1:], "both")
    causes = [line["cause"] for line in heard.lines(session_id="again", signal="ended")]
    assert sorted(causes, key=str) == [None, "superseded"], lines


# The end of a worker


@pytest.mark.parametrize("name", SERVERS)
def test_a_worker_goes_when_all_are_told_of(name: str, tmp_path: Path) -> None:
    """SIGTERM: the streams that are left are aborted, and who keeps them has the time to do so."""
    provider, heard = Provider(), Heard(tmp_path / "heard")
    environ = {
        **SERVERS[name],
        "CHATSTREAM_DRAIN": "0.3",
        "TEST_HEARD": str(tmp_path / "heard"),
        "TEST_SLOW": "0.7",
    }
    with serving(tmp_path / "log", provider, app=APP, **environ) as rig:
        for number in range(4):
            client = rig.client().post(f"s-{number}", simulate={"silent_after": 2})
            client.until(b"stop")
        rig.server.terminate()
        for number in range(4):
            outcome = heard.outcome(f"s-{number}")
            assert (outcome["cause"], outcome["text"]) == ("shutdown", "A stop ")
        rig.close_clients()
    provider.close()
