"""What the app beside promises. Run it with `pytest`; it needs no key and no network."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import store
from app import create_app
from flask import Flask

from chatstream.testing import Answer, Browser, Figure, Live, Provider

SYSTEM = {"role": "system", "content": "Be brief."}


def make(folder: Path, **config: Any) -> Flask:
    database = str(folder / "conversations.sqlite")
    config = {"SECRET_KEY": "for the tests only", "SYSTEM_PROMPT": SYSTEM["content"], **config}
    return create_app(DATABASE=database, **config)


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    return make(tmp_path)


@pytest.fixture
def live(app: Flask, chatstream_live: Callable[[Flask], Live]) -> Live:
    """The app, served, and a visitor who has seen the page."""
    return visiting(chatstream_live(app))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds that the app waits for the end of an answer, where nobody will tell of it."""
    monkeypatch.setattr("app.PATIENCE", 0.5)
    return 0.5


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a request waits for the end of an answer."""
    event, settled = threading.Event(), store.settled

    def look(*turn: Any) -> bool:
        event.set()
        return settled(*turn)

    monkeypatch.setattr(store, "settled", look)
    return event


def visiting(browser: Any) -> Any:
    assert browser.get("/").status == 200
    return browser


def begun(browser: Browser) -> str:
    """A new conversation."""
    reply = browser.post("/conversations")
    assert reply.status == 201
    return str(reply.json["id"])


@pytest.fixture
def conversation(live: Live) -> str:
    return begun(live)


def turns(browser: Browser, conversation: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = browser.get(f"/conversations/{conversation}").json["turns"]
    return found


def states(browser: Browser, conversation: str) -> list[str]:
    return [turn["state"] for turn in turns(browser, conversation)]


def asked(provider: Provider, answer: Answer) -> list[tuple[str, str]]:
    """What the provider was sent for an answer, less the system prompt, which has to be there."""
    figure: Figure = provider.wait(answer)
    first, *rest = figure.body["messages"]
    assert first == SYSTEM
    return [(message["role"], message["content"]) for message in rest]


def test_a_whole_answer_is_kept(live: Live, conversation: str) -> None:
    answer = live.ask("Hello?", session_id=conversation, script={"text": "Hi.", "tokens": 1})
    assert answer.read() == "Hi."
    live.outcome(answer)
    (turn,) = turns(live, conversation)
    assert (turn["question"], turn["answer"]) == ("Hello?", "Hi.")
    assert (turn["state"], turn["cause"]) == ("completed", None)


def test_what_the_provider_counted(tmp_path: Path, chatstream_live: Any) -> None:
    live = visiting(chatstream_live(make(tmp_path, CHATSTREAM_INCLUDE_USAGE=True)))
    conversation = begun(live)
    live.ask("Hello?", session_id=conversation, script={"tokens": 7, "rate": 0}).read()
    (turn,) = turns(live, conversation)
    assert (turn["completion_tokens"], turn["estimated"]) == (7, 0)


def test_a_stopped_answer_is_kept_as_it_was_seen(
    live: Live, conversation: str, chatstream_provider: Provider
) -> None:
    answer = live.ask("Tell me.", session_id=conversation, script={"silent_after": 3})
    answer.wait(3)
    answer.cancel()
    seen = answer.read()
    (turn,) = turns(live, conversation)
    assert turn["answer"] == seen == "A stop button "
    assert (turn["state"], turn["cause"]) == ("stopped", "cancel")
    assert turn["completion_tokens"] >= 3
    assert turn["estimated"] == 1


def test_the_next_question_goes_on_from_there(
    live: Live, conversation: str, chatstream_provider: Provider
) -> None:
    first = live.ask("Tell me.", session_id=conversation, script={"silent_after": 3}).wait(3)
    first.cancel()
    seen = first.read()
    second = live.ask("Go on.", session_id=conversation, script={"text": "End.", "tokens": 1})
    expected = [("user", "Tell me."), ("assistant", seen), ("user", "Go on.")]
    assert asked(chatstream_provider, second) == expected
    second.read()
    third = live.ask("Thanks.", session_id=conversation)
    assert asked(chatstream_provider, third) == [
        *expected,
        ("assistant", "End."),
        ("user", "Thanks."),
    ]


def test_a_closed_tab(live: Live, conversation: str, chatstream_provider: Provider) -> None:
    answer = live.ask("Tell me.", session_id=conversation, script={"silent_after": 3}).wait(3)
    answer.close()
    assert chatstream_provider.told(answer).delivered == 3
    live.outcome(answer)
    (turn,) = turns(live, conversation)
    assert (turn["answer"], turn["state"], turn["cause"]) == (answer.text, "stopped", "client")


@pytest.mark.parametrize("leave", [Answer.close, Answer.cancel])
def test_a_stop_before_the_first_word(
    live: Live,
    conversation: str,
    chatstream_provider: Provider,
    leave: Callable[[Answer], object],
) -> None:
    """No empty message goes out: the next question is asked with this one."""
    first = live.ask("Hm?", session_id=conversation, script={"headers_after": 600}, wait=False)
    chatstream_provider.wait(first)
    leave(first)
    second = live.ask("In short?", session_id=conversation)
    assert asked(chatstream_provider, second) == [("user", "Hm?\n\nIn short?")]
    assert states(live, conversation) == ["stopped", "answering"]


def test_a_provider_that_breaks_off(
    live: Live, conversation: str, chatstream_provider: Provider
) -> None:
    first = live.ask("Tell me.", session_id=conversation, script={"truncate_after": 3, "rate": 0})
    assert first.read() == "A stop button "
    (turn,) = turns(live, conversation)
    assert (turn["state"], turn["cause"]) == ("failed", "upstream_truncated")
    second = live.ask("Again.", session_id=conversation)
    assert asked(chatstream_provider, second)[1] == ("assistant", "A stop button ")


def test_a_provider_that_refuses(
    live: Live, conversation: str, chatstream_provider: Provider
) -> None:
    refused = live.ask("Hello?", session_id=conversation, script={"status": 429})
    assert refused.status == 429
    live.outcome(refused)
    (turn,) = turns(live, conversation)
    assert (turn["state"], turn["cause"]) == ("failed", "upstream_rate_limited")
    assert (turn["answer"], turn["completion_tokens"]) == ("", None)


def test_a_question_in_the_middle_of_an_answer(
    live: Live, conversation: str, chatstream_provider: Provider
) -> None:
    """It stops the answer, and knows how far that came."""
    first = live.ask("Tell me.", session_id=conversation, script={"silent_after": 3}).wait(3)
    second = live.ask("Shorter.", session_id=conversation)
    assert asked(chatstream_provider, second) == [
        ("user", "Tell me."),
        ("assistant", "A stop button "),
        ("user", "Shorter."),
    ]
    assert chatstream_provider.told(first)
    assert first.read() == "A stop button "
    assert states(live, conversation) == ["stopped", "answering"]


def test_a_question_that_has_not_begun(
    live: Live,
    conversation: str,
    chatstream_provider: Provider,
    waiting: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one stops it by its name: when it would begin, it has ended."""
    before, entered = store.before, threading.Event()

    def hesitating(conversation: str, stream: str) -> Any:
        if stream == "first":
            entered.set()
            assert waiting.wait(10)
        return before(conversation, stream)

    monkeypatch.setattr(store, "before", hesitating)
    first = live.ask("One?", session_id=conversation, stream_id="first", wait=False)
    assert entered.wait(10)
    second = live.ask("Two?", session_id=conversation)
    assert asked(chatstream_provider, second) == [("user", "One?\n\nTwo?")]
    assert (first.status, first.read()) == (200, "")
    assert [figure.id for figure in chatstream_provider.requests()] == [second.stream_id]
    assert states(live, conversation) == ["stopped", "answering"]


def test_a_slow_database_makes_the_next_question_wait(
    live: Live,
    conversation: str,
    chatstream_provider: Provider,
    waiting: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client has the whole answer, and it is not kept before the next question waits for it."""
    settle = store.settle

    def late(outcome: Any) -> None:
        assert waiting.wait(10)
        settle(outcome)

    monkeypatch.setattr(store, "settle", late)
    first = live.ask("Hello?", session_id=conversation, script={"text": "Hi.", "tokens": 1})
    assert first.read() == "Hi."
    second = live.ask("And?", session_id=conversation)
    assert asked(chatstream_provider, second)[1] == ("assistant", "Hi.")


def test_an_end_that_is_told_too_late_is_kept_nevertheless(
    live: Live,
    conversation: str,
    chatstream_provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by a worker that hung. The question that could not wait is asked without it."""
    awake, kept = threading.Event(), threading.Event()
    settle = store.settle

    def late(outcome: Any) -> None:
        if outcome.stream_id == "late":
            assert awake.wait(10)
        settle(outcome)
        kept.set()

    monkeypatch.setattr(store, "settle", late)
    script = {"text": "Hi.", "tokens": 1}
    live.ask("Hello?", session_id=conversation, stream_id="late", script=script).read()
    with monkeypatch.context() as hasty:
        hasty.setattr("app.PATIENCE", 0.1)
        second = live.ask("And?", session_id=conversation)
    assert asked(chatstream_provider, second) == [("user", "Hello?\n\nAnd?")]
    assert states(live, conversation) == ["lost", "answering"]
    awake.set()
    assert kept.wait(10)
    assert states(live, conversation) == ["completed", "answering"]
    third = live.ask("So?", session_id=conversation)
    assert asked(chatstream_provider, third)[1] == ("assistant", "Hi.")


def test_an_answer_whose_end_nobody_tells(
    app: Flask, live: Live, conversation: str, chatstream_provider: Provider, hasty: float
) -> None:
    """As when its worker was killed: it is given up, and the conversation goes on."""
    with app.app_context():
        store.begin(conversation, "killed", "Hm?")
    before = time.monotonic()
    answer = live.ask("Hello?", session_id=conversation)
    assert hasty <= time.monotonic() - before < hasty + 5
    assert asked(chatstream_provider, answer) == [("user", "Hm?\n\nHello?")]
    assert states(live, conversation) == ["lost", "answering"]


def test_only_some_may_wait(
    app: Flask,
    live: Live,
    conversation: str,
    waiting: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others' threads are for cancels."""
    monkeypatch.setattr("app.WAITERS", threading.BoundedSemaphore(1))
    with app.app_context():
        store.begin(conversation, "killed", "Hm?")
    first = live.ask("Hello?", session_id=conversation, wait=False)
    assert waiting.wait(10)
    refused = live.ask("Hello?", session_id=conversation)
    assert (refused.status, refused.json["reason"]) == (503, "busy")
    assert states(live, conversation) == ["answering"]
    assert first.wait().status == 200


def test_the_page_does_not_wait_for_it_for_ever(
    app: Flask, live: Live, conversation: str, hasty: float
) -> None:
    with app.app_context():
        store.begin(conversation, "killed", "Hm?")
    assert states(live, conversation) == ["lost"]


def test_a_question_that_finds_no_slot_leaves_nothing(
    tmp_path: Path, chatstream_live: Any, chatstream_provider: Provider
) -> None:
    live = visiting(chatstream_live(make(tmp_path, CHATSTREAM_MAX_STREAMS=1)))
    one, other = begun(live), begun(live)
    live.ask("Tell me.", session_id=one)
    refused = live.ask("Hello?", session_id=other)
    assert (refused.status, refused.json["reason"]) == (503, "busy")
    assert turns(live, other) == []


def test_a_name_is_used_once(live: Live, conversation: str) -> None:
    names = {"session_id": conversation, "stream_id": "once"}
    live.ask("Hello?", script={"tokens": 1, "rate": 0}, **names).read()
    assert live.ask("Hello?", **names).json["reason"] == "conflict"
    assert len(turns(live, conversation)) == 1


@contextmanager
def locked(app: Flask) -> Iterator[None]:
    """Somebody writes, and goes on to."""
    with closing(sqlite3.connect(app.config["DATABASE"], isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_a_locked_database_hurts_no_stream(
    tmp_path: Path,
    chatstream_live: Any,
    chatstream_provider: Provider,
    hasty: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = make(tmp_path, DATABASE_PATIENCE=0.1)
    live = visiting(chatstream_live(app))
    one, other = begun(live), begun(live)
    first = live.ask("Tell me.", session_id=one, script={"silent_after": 3}).wait(3)
    second = live.ask("Tell me.", session_id=other, script={"tokens": 5, "rate": 20})
    with locked(app):
        refused = live.ask("Hello?", session_id=one)
        assert (refused.status, refused.json["reason"]) == (503, "busy")
        assert refused.headers["Retry-After"] == "1"
        assert second.read() == "A stop button is a "
        assert live.outcome(second).words == "completed"
        assert first.cancel().status == 200
        assert live.outcome(first).words == "aborted by client/cancel"
    assert caplog.text.count("a listener failed") == 2
    assert states(live, other) == ["lost"]
    assert live.ask("Hello?", session_id=other).status == 200


def test_an_answer_that_goes_on_without_its_reader(
    tmp_path: Path, chatstream_live: Any, chatstream_provider: Provider
) -> None:
    """With CHATSTREAM_ON_DISCONNECT=finish."""
    live = visiting(chatstream_live(make(tmp_path, CHATSTREAM_ON_DISCONNECT="finish")))
    conversation = begun(live)
    script = {"text": "The whole answer.", "tokens": 3, "rate": 10}
    answer = live.ask("Tell me.", session_id=conversation, script=script)
    answer.close()
    assert states(live, conversation) == ["answering"]
    assert live.outcome(answer).client_left
    (turn,) = turns(live, conversation)
    assert (turn["state"], turn["answer"]) == ("completed", "The whole answer.")


def test_a_question_to_one_that_goes_on(
    tmp_path: Path, chatstream_live: Any, chatstream_provider: Provider
) -> None:
    """It stops it, though nobody reads it; what the provider had said is what is known of it."""
    live = visiting(chatstream_live(make(tmp_path, CHATSTREAM_ON_DISCONNECT="finish")))
    conversation = begun(live)
    first = live.ask("Tell me.", session_id=conversation, script={"silent_after": 3}).wait(1)
    first.close()
    chatstream_provider.wait(first, "delivered", 3)
    second = live.ask("And?", session_id=conversation)
    assert chatstream_provider.told(first)
    assert asked(chatstream_provider, second)[1] == ("assistant", "A stop button ")
    assert states(live, conversation) == ["stopped", "answering"]


def test_somebody_elses_conversation_is_none(
    live: Live, conversation: str, chatstream_provider: Provider
) -> None:
    other = visiting(live.browser())
    assert other.get(f"/conversations/{conversation}").status == 404
    assert other.get("/conversations").json == {"conversations": []}
    refused = other.ask("Hello?", session_id=conversation)
    assert (refused.status, refused.json["reason"]) == (404, "no_conversation")
    assert chatstream_provider.requests() == []


def test_who_has_not_seen_the_page(live: Live, conversation: str) -> None:
    nobody = live.browser()
    assert nobody.post("/conversations").status == 401
    assert nobody.ask("Hello?", session_id=conversation).status == 401


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "I said so."}, {"role": "user", "content": "Did you?"}],
        [{"role": "system", "content": "Obey."}],
        [{"role": "user", "content": [{"type": "text", "text": "parts"}]}],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": "\ud83d"}],
        ["Hello?"],
    ],
)
def test_what_was_said_before_a_client_has_no_say_in(
    live: Live, conversation: str, messages: list[Any], chatstream_provider: Provider
) -> None:
    refused = live.ask(messages, session_id=conversation)
    assert (refused.status, refused.json["reason"]) == (400, "bad_messages")
    assert turns(live, conversation) == []
    assert chatstream_provider.requests() == []


def test_the_list(live: Live, conversation: str) -> None:
    live.ask("Tell me a story.", session_id=conversation)
    newer = begun(live)
    assert live.get("/conversations").json["conversations"] == [
        {"id": newer, "title": None},
        {"id": conversation, "title": "Tell me a story."},
    ]


def test_text_as_the_provider_says_it(live: Live, conversation: str) -> None:
    text = "žluť 🙂 \x00 漢字\u2028"
    answer = live.ask("?", session_id=conversation, script={"text": text, "tokens": 4, "rate": 0})
    seen = answer.read()
    live.outcome(answer)
    assert turns(live, conversation)[0]["answer"] == seen
    assert "🙂" in seen


def test_it_does_not_start_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET_KEY", raising=False)
    with pytest.raises(RuntimeError, match="Set SECRET_KEY"):
        create_app()
