"""examples/conversations with two workers: what was seen is what is kept, and what is asked next.

The next question reaches the other worker, in every state that the answer before can be in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chatstream.dialects import sse
from chatstream.sockets.framing import Chunked
from chatstream.testing import Browser
from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.processes import Provider, Server

SETTLING = 5.0
"""Seconds that the example waits for the end of an answer: its `PATIENCE`."""

SILENT = {"silent_after": 5, "rate": 200}
"""An answer that says five words, and does not end."""


@dataclass
class Example:
    """Its server, its provider, and a visitor."""

    server: Server
    provider: Provider
    cookie: str
    clients: list[Client] = field(default_factory=list)

    def close_clients(self) -> None:
        while self.clients:
            self.clients.pop().close()

    @property
    def port(self) -> int:
        return self.server.port

    def client_of(self, worker: int, **options: Any) -> Client:
        """A client whose connection is `worker`'s. It has to connect until it is."""

        def connected() -> Client | None:
            client = Client(self.port, **options)
            self.clients.append(client)
            if client.ask("GET", "/conversations")[1]["x-worker"] == str(worker):
                return client
            client.close()
            return None

        return eventually(connected, f"a connection to worker {worker}")  # type: ignore[return-value]

    def other(self, worker: int) -> int:
        """A worker that is not this one."""
        return next(pid for pid in self.server.workers if pid != worker)

    def begin(self) -> str:
        """A new conversation."""
        status, body = self.server.ask("POST", "/conversations", Cookie=self.cookie)
        assert status == 201
        return str(json.loads(body)["id"])

    def turns(self, conversation: str) -> list[dict[str, Any]]:
        status, body = self.server.ask("GET", f"/conversations/{conversation}", Cookie=self.cookie)
        assert status == 200
        turns: list[dict[str, Any]] = json.loads(body)["turns"]
        return turns

    def settled(self, conversation: str) -> list[dict[str, Any]]:
        """The turns, once none is being answered."""

        def found() -> list[dict[str, Any]]:
            turns = self.turns(conversation)
            return turns if all(turn["state"] != "answering" for turn in turns) else []

        return eventually(found, "an end of all answers")

    def ask(
        self, worker: int, conversation: str, stream: str, question: str, **options: Any
    ) -> Client:
        """Asks, over a connection to `worker`; `simulate` says how the provider answers."""
        simulate = {"id": stream, **options.pop("simulate", {"tokens": 1, "rate": 0})}
        return self.client_of(worker, **options).post(
            conversation,
            stream,
            headers={"Cookie": self.cookie},
            messages=[{"role": "user", "content": question}],
            simulate=simulate,
        )

    def cancel(self, conversation: str, stream: str) -> int:
        """By whoever takes it."""
        path = f"/api/chat/cancel/{conversation}?streamId={stream}"
        return self.server.ask("POST", path, Cookie=self.cookie)[0]

    def was_asked(self, stream: str) -> list[tuple[str, str]]:
        """What the provider was asked, less the system prompt."""
        figure = self.provider.request(stream)
        first, *rest = figure["body"]["messages"]
        assert first["role"] == "system"
        return [(message["role"], message["content"]) for message in rest]


def text_in(body: bytes) -> str:
    """What the model says in whole events."""
    values = (sse.fields(block)[0] for block in sse.Splitter().feed(body))
    chunks = (json.loads(value) for value in values if value and value != b"[DONE]")
    deltas = (chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices"))
    return "".join(delta.get("content") or "" for delta in deltas)


def read(client: Client) -> str:
    """The answer, to its end."""
    assert client.head()[0] == 200
    return text_in(client.body())


@contextlib.contextmanager
def serving(
    folder: Path, worker_class: str, defaults: dict[str, Any] | None = None, **environ: str
) -> Iterator[Example]:
    with contextlib.closing(Provider(defaults=defaults or {})) as provider:
        server = Server(
            folder / "server.log",
            "--pythonpath",
            "examples/conversations",
            app="tests.integration.example:app",
            CHATSTREAM_UPSTREAM_URL=provider.url,
            CHATSTREAM_WORKER_CLASS=worker_class,
            WEB_CONCURRENCY="2",
            SECRET_KEY="for the tests only",
            DATABASE=str(folder / "conversations.sqlite"),
            **environ,
        )
        try:
            browser = Browser(f"http://127.0.0.1:{server.port}")
            browser.get("/")
            cookie = "; ".join(f"{each.name}={each.value}" for each in browser.cookies)
            example = Example(server, provider, cookie)
            try:
                yield example
            finally:
                example.close_clients()
            assert server.errors() == []
        finally:
            server.stop()


@pytest.fixture(scope="module", params=["gthread", "gevent"])
def example(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Example]:
    with serving(tmp_path_factory.mktemp("example"), request.param) as example:
        yield example


@pytest.fixture
def conversation(example: Example) -> Iterator[str]:
    yield example.begin()
    example.close_clients()


def cancelled(example: Example, client: Client, conversation: str, stream: str) -> str:
    """Ends an answer by a cancel. Returns what the client saw of it."""
    client.until(b'"a "')  # else it may be stopped before a word was passed on
    assert example.cancel(conversation, stream) == 200
    return read(client)


def left(example: Example, client: Client, conversation: str, stream: str) -> str:
    client.until(b'"a "')  # the fifth word
    client.close()
    return "A stop button is a "


def nothing(example: Example, client: Client, conversation: str, stream: str) -> str:
    """Leaves it to the next question."""
    client.until(b'"a "')
    return "A stop button is a "


@pytest.mark.parametrize("end", [cancelled, left, nothing])
def test_a_stopped_answer_goes_on_as_it_was_seen(
    example: Example, conversation: str, end: Callable[..., str]
) -> None:
    """However it was ended; at the other worker, at once; each time in the same conversation."""
    said: list[tuple[str, str]] = []
    worker = example.server.workers[0]
    for number in range(3):
        stream, question = f"{end.__name__}-{number}-{conversation}", f"Question {number}?"
        client = example.ask(worker, conversation, stream, question, simulate=SILENT)
        said += [("user", question)]
        assert example.was_asked(stream) == said
        example.provider.request(stream, "delivered", count=5)
        seen = end(example, client, conversation, stream)
        said += [("assistant", seen)]
        worker = example.other(worker)
    assert read(example.ask(worker, conversation, f"last-{stream}", "Last?")) == "A "
    assert example.was_asked(f"last-{stream}") == [*said, ("user", "Last?")]
    *stopped, _ = example.settled(conversation)
    assert [turn["answer"] for turn in stopped] == [text for role, text in said[1::2]]
    assert {turn["state"] for turn in stopped} == {"stopped"}


def test_whole_answers_in_quick_succession(example: Example, conversation: str) -> None:
    """The client has seen the end, and asks at the other worker what to say next."""
    said: list[tuple[str, str]] = []
    worker = example.server.workers[0]
    for number in range(15):
        stream = f"quick-{number}-{conversation}"
        script = {"text": f"Answer {number}.", "tokens": 2, "rate": 0}
        client = example.ask(worker, conversation, stream, f"{number}?", simulate=script)
        answer = read(client)
        assert answer == f"Answer {number}."
        said += [("user", f"{number}?")]
        assert example.was_asked(stream) == said
        said += [("assistant", answer)]
        worker = example.other(worker)
    assert {turn["state"] for turn in example.settled(conversation)} == {"completed"}


def test_a_client_that_reads_slowly(example: Example, conversation: str) -> None:
    """Case 40: what is kept is what its connection took in whole events, and not what was said."""
    one, stream = example.server.workers[0], f"slow-{conversation}"
    script = {"tokens": 200_000, "rate": 0}
    slow = example.ask(one, conversation, stream, "Tell me.", simulate=script, receive_buffer=4096)
    seen = [(0, 0.0)]  # what the provider has got rid of, and since when

    def stuck() -> bool:
        delivered, now = example.provider.request(stream)["delivered"], time.monotonic()
        if delivered != seen[-1][0]:
            seen.append((delivered, now))
        return delivered > 0 and now - seen[-1][1] > 0.5

    eventually(stuck, "a provider that waits for the client")
    script = {"id": f"next-{stream}", "tokens": 1, "rate": 0}
    other = example.ask(example.other(one), conversation, script["id"], "And?", simulate=script)
    assert read(other) == "A "
    slow.head()
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := slow.sock.recv(65536):
            data += piece
    text = text_in(Chunked().feed(slow._buffer + data))
    assert example.was_asked(script["id"])[1] == ("assistant", text)
    assert example.turns(conversation)[0]["answer"] == text
    assert 0 < len(text.split()) < seen[-1][0]


def test_questions_all_at_once(example: Example, conversation: str) -> None:
    """At both workers: one after the other has its stream, and none is forgotten."""
    statuses: dict[int, int] = {}

    def ask(number: int) -> None:
        worker = example.server.workers[number % 2]
        name = f"crowd-{number}-{conversation}"
        client = example.ask(worker, conversation, name, f"{number}?", simulate=SILENT)
        statuses[number] = client.head()[0]
        with contextlib.suppress(OSError):
            client.to_the_end()
        client.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(statuses) == 6, "an answer to each", patience=40)
    assert set(statuses.values()) <= {200, 409}
    asked = {f"{number}?" for number, status in statuses.items() if status == 200}
    last = example.ask(example.server.workers[0], conversation, f"last-{conversation}", "Last?")
    assert read(last) == "A "
    for thread in threads:
        thread.join(10)
    users = [text for role, text in example.was_asked(f"last-{conversation}") if role == "user"]
    assert sorted("\n\n".join(users).split("\n\n")) == sorted({*asked, "Last?"})
    assert "lost" not in {turn["state"] for turn in example.settled(conversation)}


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Nobody tells how far its answer came: it is given up, and the conversation goes on."""
    with serving(tmp_path, "gthread") as example:
        conversation = example.begin()
        one, stream = example.server.workers[0], "killed"
        client = example.ask(one, conversation, stream, "Hm?", simulate=SILENT)
        client.until(b'"a "')
        survivor = example.other(one)
        os.kill(one, signal.SIGKILL)
        begin = time.monotonic()
        assert read(example.ask(survivor, conversation, "next", "And?")) == "A "
        assert SETTLING <= time.monotonic() - begin < SETTLING + 5
        assert example.was_asked("next") == [("user", "Hm?\n\nAnd?")]
        states = [turn["state"] for turn in example.settled(conversation)]
        assert states == ["lost", "completed"]
        assert [line for line in example.server.errors() if str(one) not in line] == []
        example.server.errors = lambda: []  # type: ignore[method-assign]  # gunicorn tells of it


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_an_answer_goes_on_without_its_client(tmp_path: Path, worker_class: str) -> None:
    """With CHATSTREAM_ON_DISCONNECT=finish: kept to its end, or to the next question."""
    with serving(tmp_path, worker_class, CHATSTREAM_ON_DISCONNECT="finish") as example:
        conversation = example.begin()
        one = example.server.workers[0]
        script = {"text": "The whole answer.", "tokens": 3, "rate": 4}
        client = example.ask(one, conversation, "whole", "Tell me.", simulate=script)
        client.until(b"The")
        client.close()
        assert example.turns(conversation)[0]["state"] == "answering"
        (turn,) = example.settled(conversation)
        assert (turn["state"], turn["answer"]) == ("completed", "The whole answer.")

        client = example.ask(one, conversation, "long", "More.", simulate=SILENT)
        client.until(b'"A "')
        client.close()
        example.provider.request("long", "delivered", count=5)
        assert read(example.ask(example.other(one), conversation, "next", "Shorter.")) == "A "
        assert example.provider.request("long", "closed")["closed_by"] in ("client", "reset")
        assert example.was_asked("next")[2:] == [
            ("user", "More."),
            ("assistant", "A stop button is a "),
            ("user", "Shorter."),
        ]
