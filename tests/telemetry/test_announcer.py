"""announcer: what is said of streams, to the log and to who listens; and that it harms nobody."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import responses

from chatstream import (
    BusUnavailable,
    Busy,
    Cancelled,
    Cause,
    ChatStream,
    Kind,
    Outcome,
    Service,
    Started,
    StreamError,
    Unconfirmed,
    cancel_answered,
    stream_ended,
    stream_started,
)
from chatstream.dialects.base import Usage
from chatstream.stream.forms import EventStream
from chatstream.stream.tally import Tally
from chatstream.stream.transcript import Transcript
from chatstream.telemetry.announcer import log_outcome
from chatstream.telemetry.signals import usage_only
from tests.stream.outcomes import outcome

URL = "https://provider.test/v1/chat"
PAYLOAD = b'{"messages":[{"role":"user","content":"0123456789"}],"stream":true}'
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"

pytestmark = pytest.mark.usefixtures("nothing_left")


class Listener:
    """Hears all that one app says."""

    def __init__(self, app: flask.Flask) -> None:
        self.heard: list[Any] = []
        self.contexts: list[tuple[bool, bool]] = []
        self.do: Callable[[], object] = lambda: None
        self._app = app
        stream_started.connect(self._started, app)
        stream_ended.connect(self._ended, app)
        cancel_answered.connect(self._cancelled, app)

    def _note(self, app: flask.Flask, value: Any) -> None:
        assert app is self._app
        self.contexts.append((flask.has_app_context(), flask.has_request_context()))
        self.heard.append(value)
        self.do()

    def _started(self, app: flask.Flask, started: Started) -> None:
        self._note(app, started)

    def _ended(self, app: flask.Flask, outcome: Outcome) -> None:
        self._note(app, outcome)

    def _cancelled(self, app: flask.Flask, cancel: Cancelled) -> None:
        self._note(app, cancel)

    @property
    def outcomes(self) -> list[Outcome]:
        return [value for value in self.heard if isinstance(value, Outcome)]


class Chat:
    """An app, its service, and who listens."""

    def __init__(self, **settings: Any) -> None:
        self.app = flask.Flask("signals")
        self.app.config.from_mapping(CHATSTREAM_UPSTREAM_URL=URL, CHATSTREAM_MAX_STREAMS=4)
        self.app.config.update({f"CHATSTREAM_{key}": value for key, value in settings.items()})
        ChatStream(self.app)
        self.service: Service = self.app.extensions["chatstream"]
        self.listener = Listener(self.app)

    def ask(self, **names: str) -> bytes:
        """One answer, whole."""
        iterable = self.service.open(PAYLOAD, **names)
        try:
            return b"".join(iterable)
        finally:
            iterable.close()


@pytest.fixture
def provider() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.post(URL, body=EVENT + DONE, content_type="text/event-stream")
        yield mock


@pytest.fixture
def chat(provider: responses.RequestsMock) -> Iterator[Chat]:
    made = Chat()
    yield made
    made.service.stop()


def test_an_answer_is_told_of_twice(chat: Chat) -> None:
    """When it starts and when it is over, with all that is known."""
    assert chat.ask(session_id="s", stream_id="t", owner="7") == EVENT + DONE
    started, outcome = chat.listener.heard
    assert started == Started("s", "t", "7")
    assert (outcome.session_id, outcome.stream_id, outcome.owner) == ("s", "t", "7")
    assert (outcome.kind, outcome.text, outcome.events) == (Kind.COMPLETED, "a", 2)
    assert outcome.usage == Usage(3, 1, estimated=True), "this provider said nothing of it"


def test_each_app_hears_its_own(chat: Chat) -> None:
    """Who listens to one app is not told of another's streams; who listens to all is."""
    other, everybody = Chat(), []

    def hear(app: flask.Flask, outcome: Outcome) -> None:
        everybody.append(app)

    with stream_ended.connected_to(hear):
        chat.ask()
        other.ask()
    other.service.stop()
    assert everybody == [chat.app, other.app]
    assert (len(chat.listener.outcomes), len(other.listener.outcomes)) == (1, 1)


def test_a_client_that_left_before_the_first_byte(chat: Chat) -> None:
    """Exactly once, whatever came first: never walked, or stopped before its call."""
    chat.service.open(PAYLOAD, session_id="s").close()
    iterable = chat.service.open(PAYLOAD, session_id="s")
    iterable.stream.abort(Cause.CLIENT)
    assert list(iterable) == []
    iterable.close()
    iterable.close()
    assert [(o.cause, o.text, o.usage) for o in chat.listener.outcomes] == [
        (Cause.CLIENT, "", None),
        (Cause.CLIENT, "", None),
    ]


def test_what_did_not_start_does_not_end(chat: Chat) -> None:
    """A refused stream is told of by neither signal."""
    live = [chat.service.open(PAYLOAD) for _ in range(4)]
    with pytest.raises(Busy):
        chat.service.open(PAYLOAD)
    assert len(chat.listener.heard) == 4
    for one in live:
        one.close()
    assert len(chat.listener.outcomes) == 4


def test_a_listener_has_an_app_and_no_request(chat: Chat) -> None:
    """Wherever it is called from: also where the view's request is still there.

    The app's own hooks have given another answer than our view's, so nobody walks it.
    """

    @chat.app.after_request
    def another(response: flask.Response) -> flask.Response:
        flask.g.mine = True
        return flask.Response("another answer")

    def no_g() -> None:
        assert not hasattr(flask.g, "mine")

    chat.listener.do = no_g
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answer = chat.app.test_client().post("/api/chat/stream", json=body)
    assert answer.text == "another answer"
    assert [type(value) for value in chat.listener.heard] == [Started, Outcome]
    assert chat.listener.contexts == [(True, False)] * 2


def test_a_listener_sees_nothing_of_anothers_context(chat: Chat) -> None:
    """What its app context keeps goes with it: each has its own, also of one outcome."""
    kept: list[bool] = []

    def keep(app: flask.Flask, outcome: Outcome) -> None:
        kept.append("it" in flask.g)
        flask.g.it = True

    def also(app: flask.Flask, outcome: Outcome) -> None:
        keep(app, outcome)

    with stream_ended.connected_to(keep, chat.app), stream_ended.connected_to(also, chat.app):
        chat.ask()
    assert kept == [False, False]


def test_a_listener_that_fails_harms_nobody(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    """The stream has ended as ever, the others hear, and the log says whose fault it was."""

    def fail(app: flask.Flask, **value: object) -> None:
        raise LookupError("mine")

    signals = (stream_started, stream_ended)
    for signal in signals:
        signal.connect(fail, chat.app)
    with caplog.at_level(logging.INFO, "chatstream"):
        assert chat.ask(session_id="s") == EVENT + DONE
    for signal in signals:
        signal.disconnect(fail, chat.app)
    assert len(chat.listener.heard) == 2
    faults = [record for record in caplog.records if record.levelname == "ERROR"]
    assert ["fail" in record.getMessage() for record in faults] == [True, True]
    assert chat.service.at_rest()
    assert sum(" completed " in record.getMessage() for record in caplog.records) == 1


class Timeout(BaseException):
    """As gevent's: no Exception."""


NO_EXCEPTIONS = [SystemExit, KeyboardInterrupt, GeneratorExit, Timeout]


@pytest.mark.parametrize("kind", NO_EXCEPTIONS)
def test_what_is_no_exception_harms_nobody(chat: Chat, kind: type[BaseException]) -> None:
    """A listener's `sys.exit()` ends no worker, loses no slot, and the others hear."""

    def fail(app: flask.Flask, **value: object) -> None:
        raise kind

    def also(app: flask.Flask, **value: object) -> None:
        heard.append(value)

    heard: list[object] = []
    answers: list[bytes] = []
    with contextlib.ExitStack() as stack:
        for listener in (fail, also, fail):
            stack.enter_context(stream_started.connected_to(listener, chat.app))
            stack.enter_context(stream_ended.connected_to(listener, chat.app))
        thread = threading.Thread(target=lambda: answers.append(chat.ask()))
        thread.start()
        thread.join(10)
    assert answers == [EVENT + DONE]
    assert (len(heard), len(chat.listener.heard)) == (2, 2)
    assert chat.service.at_rest()


@pytest.mark.parametrize("signal", [stream_started, stream_ended], ids=lambda each: each.name)
def test_a_signal_in_the_main_thread_ends_what_it_is_to(chat: Chat, signal: Any) -> None:
    """A Ctrl-C while a listener runs is not lost, and neither is the stream's slot."""

    def interrupted(app: flask.Flask, **value: object) -> None:
        raise KeyboardInterrupt

    with signal.connected_to(interrupted, chat.app), pytest.raises(KeyboardInterrupt):
        chat.ask()
    assert [type(value) for value in chat.listener.heard] == [Started, Outcome]
    assert chat.service.at_rest()


def test_a_log_that_fails_loses_no_slot(chat: Chat) -> None:
    """A filter of the app's that raises: the end is told of, and the slot is free."""

    def fail(record: logging.LogRecord) -> bool:
        if " completed " in record.getMessage():
            raise LookupError("mine")
        return True

    log = logging.getLogger("chatstream")
    log.addFilter(fail)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(LookupError):
            chat.ask()
    finally:
        log.setLevel(level)
        log.removeFilter(fail)
    assert len(chat.listener.outcomes) == 1
    assert chat.service.at_rest()


def test_an_app_whose_context_fails_harms_nobody(chat: Chat) -> None:
    """A teardown of the app's that raises is a listener's fault, too."""

    @chat.app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise LookupError("mine")

    assert chat.ask() == EVENT + DONE
    assert len(chat.listener.heard) == 2
    assert chat.service.at_rest()


def test_a_worker_that_ends_waits_for_who_listens(chat: Chat) -> None:
    """While a listener saves an answer its process is not at rest, though the stream is over."""
    saving, saved = threading.Event(), threading.Event()

    def save() -> None:
        if chat.listener.outcomes:
            saving.set()
            assert saved.wait(10)

    chat.listener.do = save
    rested: list[bool] = []  # at each change of the slots
    chat.service.registry.on_change = lambda: rested.append(chat.service.at_rest())
    thread = threading.Thread(target=chat.ask)
    thread.start()
    assert saving.wait(10)
    assert not chat.service.at_rest()
    assert chat.service.registry.live() == []
    assert not any(rested), "not for a moment either"
    saved.set()
    thread.join(10)
    assert chat.service.at_rest()


def test_nothing_is_kept_where_nobody_listens(provider: responses.RequestsMock) -> None:
    """No transcript, no look at the request: it costs nothing."""
    app = flask.Flask("silent")
    app.config.from_mapping(CHATSTREAM_UPSTREAM_URL=URL)
    ChatStream(app)
    service: Service = app.extensions["chatstream"]
    iterable = service.open(PAYLOAD)
    assert iterable.stream.transcript is None
    iterable.close()
    hear: Callable[..., None] = lambda app, outcome: None  # noqa: E731
    with stream_ended.connected_to(hear, app):
        iterable = service.open(PAYLOAD)
        assert iterable.stream.transcript is not None
        iterable.close()
    service.stop()


ANSWERS: list[tuple[StreamError | OSError | bool, str]] = [
    (True, "stopped"),
    (False, "not_found"),
    (Unconfirmed(), "unconfirmed"),
    (BusUnavailable(), "bus_unavailable"),
    (OSError("away"), "bus_unavailable"),
]


@pytest.mark.parametrize(("found", "answer"), ANSWERS, ids=[answer for _, answer in ANSWERS])
def test_a_cancel_is_told_of(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, found: Any, answer: str
) -> None:
    """With what it was answered, and how long that took."""

    def cancel(owner: str, session_id: str, stream_id: str | None) -> bool:
        if isinstance(found, Exception):
            raise found
        return bool(found)

    chat.service.abort("other", owner="7")
    monkeypatch.setattr(chat.service._neighbours.bus, "cancel", cancel)
    with contextlib.suppress(StreamError):
        assert chat.service.abort("s", "t", owner="7") is found
    _, cancelled = chat.listener.heard
    assert cancelled == Cancelled("s", "t", "7", answer, cancelled.seconds)
    assert 0 <= cancelled.seconds < 10


def test_the_app_is_not_kept(provider: responses.RequestsMock) -> None:
    """Its service knows it as long as others do: a test's app goes when the test is done."""
    app = flask.Flask("kept")
    app.config.from_mapping(CHATSTREAM_UPSTREAM_URL=URL)
    ChatStream(app)
    service: Service = app.extensions["chatstream"]
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None
    iterable = service.open(PAYLOAD)
    assert b"".join(iterable) == EVENT + DONE
    iterable.close()
    service.stop()


# What is kept for who listens


@pytest.mark.parametrize(
    ("media_type", "with_text", "kind"),
    [
        ("text/event-stream", False, Tally),
        ("text/event-stream", True, Transcript),
        ("application/json", False, Transcript),  # a tally reads events
    ],
)
def test_text_is_kept_for_who_needs_it(
    chat: Chat, media_type: str, with_text: bool, kind: type[Transcript]
) -> None:
    """Of all who listen one is enough; where none needs it only tokens are counted."""

    @usage_only
    def count(app: flask.Flask, outcome: Outcome) -> None: ...

    stream = EventStream("s", "t")
    stream.media_type = media_type
    stream_ended.disconnect(chat.listener._ended, chat.app)
    with stream_ended.connected_to(count, chat.app):
        if with_text:
            stream_ended.connect(chat.listener._ended, chat.app)
        assert type(chat.service._announcer.transcript(PAYLOAD, stream)) is kind


# The one line in the end


ENDED = {"events": 2, "bytes": 30, "duration": 1.23456789}
FACTS = "phase=body stream=t events=2 bytes=30 duration=1.235s"


@pytest.mark.parametrize(
    ("facts", "level", "line", "fields"),
    [
        ({}, "INFO", f"completed {FACTS}", {"kind": "completed"}),
        (
            {"client_left": True},
            "INFO",
            f"completed {FACTS} client=left",
            {"kind": "completed", "client_left": True},
        ),
        (
            {"kind": Kind.ABORTED, "cause": Cause.CANCEL, "stop_ms": 0.12345},
            "INFO",
            f"aborted by client/cancel cause=cancel {FACTS} stop_ms=0.123",
            {"kind": "aborted", "cause": "cancel", "stop_ms": 0.123},
        ),
        (
            {"kind": Kind.FAILED, "code": "busy"},
            "WARNING",
            f"failed: busy {FACTS}",
            {"kind": "failed", "code": "busy"},
        ),
        (
            {"kind": Kind.FAILED, "code": "busy", "detail": "no thread"},
            "WARNING",
            f'failed: busy {FACTS} detail="no thread"',
            {"kind": "failed", "code": "busy", "detail": "no thread"},
        ),
    ],
)
def test_the_line(
    caplog: pytest.LogCaptureFixture,
    facts: dict[str, Any],
    level: str,
    line: str,
    fields: dict[str, object],
) -> None:
    """How it ended, and the figures; on the record as well, and nothing of what people wrote."""
    caplog.set_level(logging.INFO, "chatstream")
    ended = outcome(owner="somebody", text="what was said", reasoning="a thought", **ENDED, **facts)
    log_outcome(ended)
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == (level, f"[SSE] s {line}")
    plain = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
    figures = {"phase": "body", "events": 2, "bytes": 30, "duration": 1.234568}
    names = {"session_id": "s", "stream_id": "t"}
    shown = {name: value for name, value in vars(record).items() if name not in plain}
    assert shown == ended.facts == {**names, **figures, **fields}
