"""completions: chunks whose stop is said, and one piece; how that is moved by either mover."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from chatstream.dialects.openai_chat import error_object
from chatstream.errors import ProviderEvent, Refused, UpstreamError
from chatstream.stream import forms
from chatstream.stream.forms import ChunkStream, WholeStream
from chatstream.stream.outcome import Cause, Kind
from tests.conftest import eventually
from tests.stream.moving import DONE, EVENT, FINISH, MOVERS, Moved, error_of

pytestmark = pytest.mark.usefixtures("nothing_left")

ANSWER = b'{"choices": [{"message": {"content": "\xc5\xbelu\xc5\xa5"}}], "usage": {"x": 1}}'
OVERLOADED = b'{"error": {"message": "overloaded", "code": "busy"}}'


@pytest.fixture
def stream() -> WholeStream:
    return WholeStream("s", "t", "me", model="m")


# Chunks


def chunks_of(words: bytes) -> Any:
    """The JSON of the one chunk before the end."""
    chunk, done, rest = words.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return json.loads(chunk.removeprefix(b"data: "))


@pytest.mark.parametrize("cause", [Cause.CANCEL, Cause.SUPERSEDED])
def test_a_stop_of_chunks_is_said(cause: Cause) -> None:
    """By a last one, in which nothing is said but why there are no more."""
    stream = ChunkStream("s", "t", model="m")
    stream.abort(cause)
    said = chunks_of(stream.last_words())
    [choice] = said["choices"]
    assert (choice["index"], choice["delta"], choice["finish_reason"]) == (0, {}, "cancelled")
    assert (said["object"], said["model"], said["id"]) == (
        "chat.completion.chunk",
        "m",
        "chatcmpl-t",
    )
    assert said["usage"] is None


def test_a_stop_after_the_last_chunk_changes_no_reason() -> None:
    """The provider has said why it said no more; only its last event is missing."""
    stream = ChunkStream("s", "t", model="m")
    assert stream.feed(FINISH) == FINISH
    stream.abort(Cause.CANCEL)
    assert stream.last_words() == DONE


def test_other_ends_of_chunks_are_as_ever() -> None:
    """An error event where there is an error, nothing where the provider said it all."""
    failed, aborted, whole = (ChunkStream("s", "t") for _ in range(3))
    failed.fail(UpstreamError("No.", code="upstream_idle"))
    aborted.abort(Cause.DEADLINE)
    whole.feed(DONE)
    assert [error_of(stream.last_words()) for stream in (failed, aborted)] == [
        "upstream_idle",
        "deadline",
    ]
    assert whole.last_words() == b""


def given(stream: WholeStream, *pieces: bytes) -> bytes:
    """What a provider's body of these pieces comes to."""
    assert [stream.feed(piece) for piece in pieces] == [b""] * len(pieces)
    return stream.eof()


# One piece


@pytest.mark.parametrize("cut", [0, 1, 20, 41, len(ANSWER) - 1])
def test_an_answer_is_handed_out_once_it_is_whole(stream: WholeStream, cut: int) -> None:
    """In one piece, byte for byte, however it came; and it counts as one event."""
    assert given(stream, ANSWER[:cut], ANSWER[cut:]) == ANSWER
    outcome = stream.outcome()
    assert (outcome.kind, outcome.events, outcome.bytes) == (Kind.COMPLETED, 1, len(ANSWER))
    assert stream.last_words() == b""


def test_newlines_before_it_are_a_sign_of_life_and_no_part_of_it(stream: WholeStream) -> None:
    """What a provider sends while it queues the request stays here; what is inside goes on."""
    assert given(stream, b"\n", b"\r\n \t", b"\n" + ANSWER + b"\n") == ANSWER + b"\n"


NO_ANSWERS = {
    "nothing": b"",
    "newlines": b"\n\n",
    "half": ANSWER[:-1],
    "two": ANSWER + ANSWER,
    "null": b"null",
    "no JSON": b"<h1>Sorry</h1>",
    "no UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("body", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_whole_answer_fails(stream: WholeStream, body: bytes) -> None:
    """A body that ends with its connection may end anywhere: it is looked at, not believed."""
    assert given(stream, body) == b""
    assert stream.outcome().code == "upstream_truncated"
    assert json.loads(stream.last_words())["error"]["code"] == "upstream_truncated"


def test_other_json_is_no_answer(stream: WholeStream) -> None:
    """It is whole, and would be the same if it were asked for again."""
    assert given(stream, b"[1]") == b""
    assert stream.outcome().code == "upstream_not_json"


LONG = b'{"a": [' + b"1," * forms.EXAMINED + b"1]}\n"


def test_a_long_answer_is_looked_at_from_without(
    stream: WholeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To parse it would hold up all other streams of the worker: 40 ms a MB."""
    monkeypatch.delattr(forms.json, "loads")
    assert given(stream, LONG) == LONG
    assert stream.outcome().kind is Kind.COMPLETED


@pytest.mark.parametrize("body", [LONG[:-3], LONG[1:], LONG[7:-3]])
def test_a_long_answer_that_breaks_off_fails(stream: WholeStream, body: bytes) -> None:
    """Its last brace is missing, or its first."""
    assert given(stream, body) == b""
    assert stream.outcome().code == "upstream_truncated"


def test_a_providers_own_error_is_passed_on(stream: WholeStream) -> None:
    """A 200 that says it failed is no answer; its words are the client's."""
    assert given(stream, b"\n", OVERLOADED) == b""
    assert isinstance(stream.error, ProviderEvent)
    assert (stream.outcome().code, stream.last_words()) == ("upstream_error", OVERLOADED)


def test_no_error_is_no_fault(stream: WholeStream) -> None:
    """Some providers have the field in every answer."""
    assert given(stream, b'{"error": null}') == b'{"error": null}'


def test_an_answer_is_bounded(stream: WholeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is kept, so it ends where it is too long, not when it is there."""
    monkeypatch.setattr(forms, "MAX_ANSWER", len(ANSWER))
    assert given(WholeStream("s", "t"), ANSWER) == ANSWER
    stream.feed(ANSWER + b" ")
    assert stream.error is not None
    assert (stream.error.code, stream.error.status) == ("answer_too_large", 502)


@pytest.mark.parametrize("cause", [Cause.CANCEL, Cause.SUPERSEDED])
def test_a_stop_is_an_answer_in_which_nothing_is_said(stream: WholeStream, cause: Cause) -> None:
    """Whole and well formed, so that no client asks again; of its cost nothing is claimed."""
    stream.feed(ANSWER[:20])
    stream.abort(cause)
    said = json.loads(stream.last_words())
    [choice] = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": ""}
    assert (choice["index"], choice["finish_reason"]) == (0, "cancelled")
    assert (said["object"], said["model"], said["usage"]) == ("chat.completion", "m", None)
    assert (said["id"], type(said["created"])) == ("chatcmpl-t", int)


def test_a_stop_that_comes_first_wins(stream: WholeStream) -> None:
    """An answer that is whole after it is not handed out, nor one that is wrong blamed."""
    stream.abort(Cause.CANCEL)
    assert given(stream, ANSWER) == b""
    assert stream.outcome().cause is Cause.CANCEL
    assert b"cancelled" in stream.last_words()


@pytest.mark.parametrize(
    ("cause", "code"), [(Cause.DEADLINE, "deadline"), (Cause.SHUTDOWN, "shutting_down")]
)
def test_an_end_that_is_told_is_an_error(stream: WholeStream, cause: Cause, code: str) -> None:
    """What the client did not ask for it is told."""
    stream.abort(cause)
    assert json.loads(stream.last_words())["error"]["code"] == code


ERRORS = {
    "ours": (Refused("No.", code="conflict", status=409), "invalid_request_error", None),
    "a field": (Refused("No.", code="bad_messages"), "invalid_request_error", "messages"),
    "another field": (Refused("No.", code="bad_stream"), "invalid_request_error", "stream"),
    "nobody": (Refused("No.", code="unauthenticated", status=401), "authentication_error", None),
    "rate": (UpstreamError("No.", code="x", status=429), "rate_limit_error", None),
    "theirs": (UpstreamError("No.", code="x", status=502), "upstream_error", None),
}


@pytest.mark.parametrize(("error", "kind", "param"), ERRORS.values(), ids=ERRORS)
def test_an_error_as_openai_puts_it(error: Any, kind: str, param: str | None) -> None:
    """Four fields, always; the code is ours."""
    told = {"message": "No.", "type": kind, "param": param, "code": error.code}
    assert error_object(error) == {"error": told}


# How it is moved

MakeMoved = Callable[..., Moved]


@pytest.fixture(params=MOVERS)
def move(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[MakeMoved]:
    """Makes a stream of one piece that is moved, by the one or the other."""
    made: list[Moved] = []

    def make(**options: Any) -> Moved:
        made.append(MOVERS[request.param](**{"form": partial(WholeStream, model="m"), **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_nothing_goes_out_before_the_end(move: MakeMoved) -> None:
    """What has come is kept until the provider's body has ended, and then is all there is."""
    m = move()
    m.start()
    m.say(b"\n", ANSWER[:9])
    m.say(ANSWER[9:])
    m.provider.close()
    assert m.rest() == [ANSWER]
    assert m.end().kind is Kind.COMPLETED


def test_newlines_show_life_and_keep_it(move: MakeMoved) -> None:
    """Ours go to the client in its silence; the provider's hold our patience, and stay here."""
    m = move(answers=False, ping_interval=0.1, idle_timeout=0.3)
    assert m.next() == b"\n"
    m.answer()
    for _ in range(5):
        m.say(b"\n")
        assert m.next() == b"\n"  # a tenth of a second each
    m.say(ANSWER)
    m.provider.close()
    assert b"".join(m.rest()).lstrip() == ANSWER
    assert m.end().kind is Kind.COMPLETED


@pytest.mark.parametrize("answers", [False, True], ids=["headers", "body"])
@pytest.mark.parametrize("pings", [0, 1])
def test_a_stop_leaves_json(move: MakeMoved, answers: bool, pings: int) -> None:
    """Whatever came before it: the body is one JSON text, and the provider is told at once."""
    m = move(answers=answers, ping_interval=0.05 if pings else 30.0)
    m.start()
    before = [m.next() for _ in range(pings)]
    eventually(lambda: m.stream.body if answers else m.connects, "the call")
    m.stream.abort(Cause.CANCEL)
    body = b"".join(before + m.rest())
    assert json.loads(body)["choices"][0]["finish_reason"] == "cancelled"
    assert m.refusal is None
    assert not answers or m.hears_the_end()
    assert m.end().cause is Cause.CANCEL


@pytest.mark.parametrize("events", [0, 1])
def test_a_stop_of_chunks_that_are_moved(move: MakeMoved, events: int) -> None:
    """Whether it comes before the first byte or after one."""
    m = move(form=partial(ChunkStream, model="m"))
    m.start()
    m.say(EVENT * events)
    before = [m.next() for _ in range(events)]
    m.stream.abort(Cause.CANCEL)
    body = b"".join(before + m.rest())
    assert body.startswith(EVENT * events)
    assert chunks_of(body[len(EVENT) * events :])["choices"][0]["finish_reason"] == "cancelled"
    assert m.end().events == events


def test_a_fault_before_a_byte_is_a_refusal(move: MakeMoved) -> None:
    """So it has its true status; the connection broke before the answer was whole."""
    m = move()
    m.start()
    m.say(ANSWER[:-1])
    m.provider.close()
    assert m.rest() == []
    assert m.refusal is not None
    assert (m.refusal.code, m.refusal.status) == ("upstream_truncated", 502)


@pytest.mark.parametrize(
    ("said", "code"), [(ANSWER[:-1], "upstream_truncated"), (OVERLOADED, "busy")]
)
def test_a_fault_after_a_ping_is_the_answer(move: MakeMoved, said: bytes, code: str) -> None:
    """The status has gone: the whole JSON is the error, the provider's own if it has one."""
    m = move(ping_interval=0.05)
    assert m.next() == b"\n"
    m.say(said)
    m.provider.close()
    assert json.loads(b"".join(m.rest()))["error"]["code"] == code


def test_silence_ends_it(move: MakeMoved) -> None:
    """A provider that says nothing inside its answer is given up."""
    m = move(idle_timeout=0.1)
    m.start()
    m.say(ANSWER[:5])
    assert m.rest() == []
    assert m.end().code == "upstream_idle"


def test_a_client_that_leaves_stops_it(move: MakeMoved) -> None:
    """While nothing has been said to it yet."""
    m = move(answers=False)
    m.start()
    m.answer()
    m.leave()
    assert m.hears_the_end()
    assert m.end().cause is Cause.CLIENT


def test_a_long_answer_to_a_slow_client(move: MakeMoved) -> None:
    """It is sent as the client takes it, and nothing of it is lost."""
    m = move(buffers=8192)
    answer = b'{"a": "%b"}' % (b"0123456789" * 200_000)
    m.start()
    m.say(answer)
    m.provider.close()
    m.blocked()
    received = m.take(len(answer) + 100)
    assert received.endswith(answer)
    assert m.end().kind is Kind.COMPLETED


def test_a_whole_answer_that_quotes_the_key() -> None:
    """A provider's error in one piece is passed on without it."""
    stream = WholeStream("s", "t")
    stream.key = b"sk-very-secret"
    stream.feed(b'{"error": {"message": "bad key sk-very-secret"}}')
    assert stream.eof() == b""
    assert stream.last_words() == b'{"error": {"message": "bad key [key]"}}'
