"""cli.chat: real answers of the built-in provider, and real SIGINTs, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
from flask.testing import FlaskCliRunner

from chatstream import ChatStream, Service
from chatstream.cli.chat import STOPPED, Conversation, Options
from chatstream.cli.interrupt import Interrupt
from chatstream.cli.terminal import Terminal
from chatstream.simulator import Simulator
from tests.conftest import eventually

Make = Callable[..., "Talk"]


class Talk:
    """A conversation with a provider that behaves as a test wants it."""

    def __init__(self, simulator: Simulator, app: flask.Flask, interrupt: Interrupt) -> None:
        self.simulator = simulator
        self.app = app
        self.out, self.err = io.StringIO(), io.StringIO()
        self.service: Service = app.extensions["chatstream"]
        self.conversation = Conversation(
            self.service, Terminal(self.out, self.err), interrupt, Options(system="be brief")
        )

    @property
    def figures(self) -> list[dict[str, Any]]:
        return self.simulator.ledger.all()  # type: ignore[return-value]

    def press_when(self, condition: Callable[[], object], times: int = 1) -> threading.Thread:
        """Ctrl-C from somebody who watches."""

        def watch() -> None:
            eventually(condition, "the moment for Ctrl-C")
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


@pytest.fixture
def talk() -> Iterator[Make]:
    """Makes a talk; what the provider does, by name."""
    with_ends: list[tuple[Simulator, Service]] = []
    with Interrupt() as interrupt:

        def make(url: str | None = None, **defaults: Any) -> Talk:
            simulator = Simulator(defaults={"rate": 0, "tokens": 3, **defaults}).start()
            app = flask.Flask("host")
            app.config["CHATSTREAM_UPSTREAM_URL"] = url or simulator.url
            app.config["CHATSTREAM_BUS"] = "local"
            ChatStream(app)
            with_ends.append((simulator, app.extensions["chatstream"]))
            return Talk(simulator, app, interrupt)

        yield make
        for simulator, service in with_ends:
            service.stop()
            simulator.close()


def test_an_answer_is_written_and_becomes_part_of_the_conversation(talk: Make) -> None:
    """The next question goes out with what was said before."""
    chat = talk()
    assert chat.conversation.ask("first") == 0
    answer = chat.out.getvalue()
    assert len(answer.split()) >= 3
    assert answer.endswith("\n")
    assert chat.conversation.ask("second") == 0
    roles = [message["role"] for message in chat.conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert chat.conversation.messages[2]["content"] == answer.rstrip("\n")
    assert chat.err.getvalue() == ""


def test_nothing_turns_while_words_come(talk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spinner has its line until the first of them."""

    @contextlib.contextmanager
    def waiting(terminal: Terminal, words: str) -> Iterator[None]:
        terminal.write("(")
        yield
        terminal.write(")")

    monkeypatch.setattr(Terminal, "waiting", waiting)
    chat = talk(text="word ")
    assert chat.conversation.ask("hi") == 0
    assert chat.out.getvalue() == "()word word word \n"


def test_reasoning_stands_apart(talk: Make) -> None:
    """It is shown before the answer, on lines of its own, and is no part of the conversation."""
    chat = talk(reasoning=2, tokens=4)
    chat.conversation.ask("why?")
    *thought, answer = chat.out.getvalue().rstrip("\n").split("\n")
    assert thought
    assert chat.conversation.messages[-1]["content"] == answer


SCENES: dict[str, dict[str, Any]] = {
    "headers": {"headers_after": 60},
    "silent at once": {"tokens": 5000, "rate": 20, "silent_after": 0},
    "silent": {"tokens": 5000, "rate": 20, "silent_after": 2},
    "streaming": {"tokens": 5000, "rate": 50},
    "queued": {"queue": 60},
}


@pytest.mark.parametrize("times", [1, 3], ids=["once", "three times"])
@pytest.mark.parametrize("scene", SCENES)
def test_ctrl_c_stops_the_answer_in_every_phase(talk: Make, scene: str, times: int) -> None:
    """The provider's connection is closed, the partial answer is kept, and the next one comes."""
    chat = talk(**SCENES[scene])
    enough = 2 if scene in ("silent", "streaming") else 0
    watcher = chat.press_when(
        lambda: chat.figures and chat.figures[0]["delivered"] >= enough, times
    )
    assert chat.conversation.ask("long?") == 130
    watcher.join()
    eventually(lambda: not chat.figures[0]["open"], "the provider's end")
    assert chat.figures[0]["closed_by"] == "client"
    assert STOPPED in chat.err.getvalue()
    last = chat.conversation.messages[-1]
    assert last["role"] == "assistant"
    assert last["content"].endswith(STOPPED)
    assert last["content"].removesuffix(STOPPED).strip() == chat.out.getvalue().strip()
    eventually(lambda: len(chat.service.registry) == 0, "a free slot")


def test_ctrl_c_while_the_name_server_hangs(talk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no socket yet, and the thread that looks the name up stays stuck: nobody waits."""
    asked, release = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def hang(*arguments: Any, **more: Any) -> Any:
        asked.set()
        release.wait(20)
        return real("127.0.0.1", 9)

    chat = talk("http://provider.invalid/v1/chat/completions")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    watcher = chat.press_when(asked.is_set)
    assert chat.conversation.ask("where?") == 130
    watcher.join()
    release.set()
    assert chat.out.getvalue() == ""


def test_ctrl_c_while_the_stream_is_opened(talk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the provider is not called at all."""
    chat = talk()
    real = chat.service.open

    def slow(*arguments: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments, **more)

    monkeypatch.setattr(chat.service, "open", slow)
    assert chat.conversation.ask("now?") == 130
    assert chat.figures == []


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"status": 401}, "did not accept this service's key. (upstream_auth"),
        ({"status": 500}, "(upstream_error"),
        ({"error_after": 1}, "simulator"),
        ({"truncate_after": 1}, "ended before it was whole. (upstream_truncated"),
        ({"content_type": "text/html"}, "(upstream_not_stream"),
    ],
)
def test_a_failure_is_said_in_words(talk: Make, defaults: dict[str, Any], words: str) -> None:
    """On standard error; and the conversation is as it was, so the question can be asked again."""
    chat = talk(**defaults)
    assert chat.conversation.ask("well?") == 1
    assert words in chat.err.getvalue()
    assert [message["role"] for message in chat.conversation.messages] == ["system"]


def test_a_stream_that_cannot_be_is_said_in_words(talk: Make) -> None:
    chat = talk()
    chat.service.drain(at_once=True)
    assert chat.conversation.ask("well?") == 1
    assert "restarting" in chat.err.getvalue()
    assert len(chat.conversation.messages) == 1


# The command


def invoke(chat: Talk, *arguments: str, **more: Any) -> Any:
    runner: FlaskCliRunner = chat.app.test_cli_runner()
    return runner.invoke(args=["chatstream", "chat", *arguments], **more)


def test_a_question_is_answered_and_nothing_else(talk: Make) -> None:
    """As an argument: the words are one question. No reasoning, no greeting, no log."""
    chat = talk(reasoning=2, tokens=4)
    result = invoke(chat, "how", "are you?")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    sent = chat.figures[0]
    assert sent["delivered"] == 4


def test_a_question_comes_over_a_pipe(talk: Make) -> None:
    """All of it is one question."""
    result = invoke(chat := talk(), input="how are\nyou?\n")
    assert result.exit_code == 0
    assert len(chat.figures) == 1
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "no question"), (("hi", "--session", "a b"), "--session")],
    ids=["no question", "no name of a session"],
)
def test_a_mistake_of_the_caller(talk: Make, arguments: tuple[str, ...], said: str) -> None:
    """2, and nobody is asked."""
    result = invoke(chat := talk(), *arguments, input="\n")
    assert result.exit_code == 2
    assert said in result.stderr
    assert chat.figures == []


def test_a_question_that_fails_exits_with_one(talk: Make) -> None:
    result = invoke(talk(status=401), "well?")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "key" in result.stderr


def test_a_question_that_is_stopped_exits_with_130(talk: Make) -> None:
    """What had come by then was written."""
    chat = talk(**SCENES["silent"])
    watcher = chat.press_when(lambda: chat.figures and chat.figures[0]["delivered"] >= 2)
    result = invoke(chat, "long?")
    watcher.join()
    assert result.exit_code == 130
    assert result.stdout.strip()
    assert result.stderr.strip() == STOPPED


def test_the_options_reach_the_provider(talk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, session and the system's message."""
    chat = talk()
    opened: list[Any] = []
    real = chat.service.open
    monkeypatch.setattr(
        chat.service, "open", lambda *a, **more: opened.append((a, more)) or real(*a, **more)
    )
    invoke(chat, "hi", "--model", "m-1", "--session", "s-1", "--system", "be kind")
    ((payload,), more) = opened[0]
    assert more == {"session_id": "s-1"}
    sent = flask.json.loads(payload)
    assert sent["model"] == "m-1"
    assert sent["messages"][0] == {"role": "system", "content": "be kind"}
    assert sent["messages"][1] == {"role": "user", "content": "hi"}


@pytest.mark.parametrize("verbose", [True, False])
def test_the_log_is_off_unless_asked_for(
    talk: Make, caplog: pytest.LogCaptureFixture, verbose: bool
) -> None:
    """It would stand among what is said."""
    caplog.set_level("INFO")
    invoke(talk(), "hi", *(["--verbose"] if verbose else []))
    assert ("[SSE]" in caplog.text) is verbose
