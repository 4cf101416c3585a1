"""routes: where the chat and the figures are, and what may be waited for."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from chatstream.simulator import Simulator
from tests.conftest import PATIENCE
from tests.simulator.client import CHAT, Client


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/chat/completions", "/beta/chat/completions"]
)
def test_chat_paths(client: Client, path: str) -> None:
    """Any base address of an OpenAI client will do."""
    assert client.ask("POST", path, {"simulate": {"tokens": 1, "rate": 0}}).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", "/requests"),
        ("GET", "/"),
        ("POST", "/chat/completions/x"),
        ("X", "*"),
    ],
)
def test_other_routes_are_404(client: Client, method: str, path: str) -> None:
    """In OpenAI's error shape."""
    answer = client.ask(method, path)
    assert answer.status == 404
    assert method in answer.json()["error"]["message"]


def test_models(client: Client) -> None:
    """A list with one model."""
    models = client.ask("GET", "/v1/models").json()
    assert models["object"] == "list"
    assert [model["object"] for model in models["data"]] == ["model"]


def test_requests_are_named_by_number(client: Client, desk: Client) -> None:
    """req-N, when they bring no id."""
    client.chat(tokens=1, rate=0)
    assert f"req-{desk.stats()['requests']}" == desk.ask("GET", "/requests").json()[-1]["id"]


def test_unknown_ids_are_404(desk: Client) -> None:
    """Also when somebody waited for them in vain."""
    for query in ("", "?wait=closed&timeout=0.01"):
        answer = desk.ask("GET", f"/requests/nobody{query}")
        assert answer.status == 404
        assert "nobody" in answer.json()["error"]["message"]


@pytest.mark.parametrize("wait", ["started", "headers", "delivered", "closed"])
def test_one_may_wait_before_the_request_comes(
    provider: Simulator, client: Client, desk: Client, name: str, wait: str
) -> None:
    """The answer comes when the request has come so far."""
    desk.request("GET", f"/requests/{name}?wait={wait}&count=3&timeout={PATIENCE}")
    with closing(Client(provider)) as other:  # asked later, answered first: so the wait is known
        assert other.ask("GET", f"/requests/{name}").status == 404
    client.chat(id=name, tokens=5, rate=0)
    with closing(desk.getresponse()) as response:
        figure = json.loads(response.read())
    reached = {
        "started": True,
        "headers": figure["headers_ns"] is not None,
        "delivered": figure["delivered"] >= 3,
        "closed": not figure["open"],
    }
    assert reached[wait]


def test_a_wait_that_times_out_tells_how_far_it_is(client: Client, desk: Client, name: str) -> None:
    """And one that can come true no more is answered at once."""
    client.begin(id=name, tokens=5, rate=0, silent_after=2)
    assert desk.figure(name, "delivered", count=3, timeout=0.02)["delivered"] == 2
    client.leave()
    assert desk.figure(name, "delivered", count=3)["closed_by"] == "client"


@pytest.mark.parametrize(
    "query",
    [
        "wait=later",
        "wait=closed&timeout=x",
        "wait=closed&count=nan",
        "after=-1",
        "after=soon",
        "wait=closed&after=1e9",
    ],
)
def test_bad_waits(desk: Client, query: str) -> None:
    """400, naming the field."""
    answer = desk.ask("GET", f"/requests/a?{query}")
    assert answer.status == 400
    assert answer.json()["error"]["param"] in query
