"""forms: events, chunks whose stop is said, and one piece; how that is moved by either mover."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from time import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.dialects import openai_chat, sse
from chatstream.errors import ProviderEvent, UpstreamError
from chatstream.stream import forms
from chatstream.stream.forms import ChunkStream, EventStream, WholeStream
from chatstream.stream.outcome import Cause, Kind, Outcome
from chatstream.stream.transcript import Transcript
from tests.conftest import eventually
from tests.stream.moving import DONE, EVENT, FAULT, FINISH, MOVERS, Moved, error_of

pytestmark = pytest.mark.usefixtures("nothing_left")

ANSWER = b'{"choices": [{"message": {"content": "\xc5\xbelu\xc5\xa5"}}], "usage": {"x": 1}}'
LONG = b'{"a": [' + b"1," * forms.EXAMINED + b"1]}\n"
OVERLOADED = b'{"error": {"message": "overloaded", "code": "busy"}}'


@pytest.fixture
def stream() -> EventStream:
    return EventStream("s", "t", "me")


@pytest.fixture
def whole() -> WholeStream:
    return WholeStream("s", "t", "me", model="m")


# Events


def test_feed_passes_whole_events_only(stream: EventStream) -> None:
    """An event comes out when it is whole, byte for byte, however it came in."""
    assert [stream.feed(EVENT[:9]), stream.feed(EVENT[9:] + b"da")] == [b"", EVENT]
    assert stream.feed(b"ta: b\n\n: c\n\ndata: tail") == b"data: b\n\n: c\n\n"
    assert not stream.ended


def test_feed_counts(stream: EventStream) -> None:
    """Events are events; comments count as bytes only; what is not whole counts as nothing."""
    stream.feed(b": keep-alive\n\n" + EVENT + EVENT + b"data: tail")
    stream.complete()
    outcome = stream.outcome()
    assert outcome.events == 2
    assert outcome.bytes == len(b": keep-alive\n\n" + EVENT + EVENT)


def test_done_completes_and_drops_what_follows(stream: EventStream) -> None:
    """Case 17: `[DONE]` is relayed and ends the stream; nothing after it comes out or counts."""
    assert stream.feed(EVENT + DONE + EVENT + b"data: tail") == EVENT + DONE
    assert stream.outcome().kind is Kind.COMPLETED
    assert stream.outcome().events == 2
    assert stream.outcome().bytes == len(EVENT + DONE)


def test_done_before_an_event_too_long_completes(stream: EventStream) -> None:
    """What comes after `[DONE]` cannot fail the stream any more."""
    assert stream.feed(DONE + b"x" * (sse.MAX_EVENT + 1)) == DONE
    assert stream.outcome().kind is Kind.COMPLETED


@pytest.mark.parametrize("cause", [Cause.CLIENT, Cause.CANCEL, Cause.DEADLINE])
def test_after_a_cause_nothing_comes_out(stream: EventStream, cause: Cause) -> None:
    """Once a cause is recorded no byte is handed over, not even `[DONE]`, and none is counted."""
    stream.feed(EVENT)
    stream.abort(cause)
    assert stream.feed(EVENT + DONE) == b""
    outcome = stream.outcome()
    assert outcome.cause is cause
    assert (outcome.events, outcome.bytes) == (1, len(EVENT))


def test_a_providers_error_is_relayed_and_fails(stream: EventStream) -> None:
    """A provider's own error event goes through, ends the stream, and adds nothing of ours."""
    assert stream.feed(EVENT + FAULT + DONE) == EVENT + FAULT
    assert isinstance(stream.error, ProviderEvent)
    outcome = stream.outcome()
    assert (outcome.kind, outcome.code, outcome.events) == (Kind.FAILED, "upstream_error", 2)


def test_an_event_too_long_fails(stream: EventStream) -> None:
    """The events before one that is too long come out; the stream has failed."""
    assert stream.feed(EVENT + b"data: " + b"x" * sse.MAX_EVENT) == EVENT
    assert stream.outcome().code == "event_too_large"


MIXTURE = st.lists(
    st.sampled_from(
        [
            *[EVENT, EVENT, EVENT, b": c\n\n", EVENT[:-2] + b"\r\n\r\n", b"data: {}\r\r", b"\n"],
            *[FINISH, b"data: text\n\n", EVENT.replace(b'"a"', b'"error"'), EVENT * 60],
        ]
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    before=MIXTURE,
    last=st.sampled_from([b"", DONE, FAULT, b"event: error\ndata: x\n\n"]),
    after=MIXTURE,
    cuts=st.lists(st.integers(0, 60_000), max_size=4),
)
def test_feed_is_what_a_look_at_each_block_gives(
    before: list[bytes], last: bytes, after: list[bytes], cuts: list[int]
) -> None:
    """However events come and whatever lies between them: the same bytes, count and end."""
    data = b"".join([*before, last, *after])
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    relayed: list[tuple[bytes, Outcome]] = []
    for each in (False, True):
        stream, out = EventStream("s", "t"), b""
        with pytest.MonkeyPatch.context() as patch:
            if each:
                patch.setattr(openai_chat, "plain_events", lambda blocks: None)
            for start, end in itertools.pairwise(edges):
                if not stream.ended:  # a mover asks no further
                    out += stream.feed(data[start:end])
            stream.eof()
        timeless = {"duration": 0, "time_to_first_event": None}
        relayed.append((out, replace(stream.outcome(), **timeless)))
    assert relayed[0] == relayed[1]
    if last:
        assert relayed[0][0] == b"".join([*before, last])


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        (b"", Kind.FAILED, "upstream_truncated"),
        (EVENT, Kind.FAILED, "upstream_truncated"),
        (EVENT + FINISH, Kind.COMPLETED, None),
        (FINISH + b'data: {"choices":[],"usage":{}}\n\n', Kind.COMPLETED, None),
        (FINISH[:-1], Kind.FAILED, "upstream_truncated"),
        (EVENT + DONE, Kind.COMPLETED, None),
    ],
    ids=["nothing", "an event", "finish", "finish and usage", "finish cut off", "done"],
)
def test_the_end_of_the_body(
    stream: EventStream, data: bytes, kind: Kind, code: str | None
) -> None:
    """Case 8: an end without `[DONE]` or a finish_reason is a failure, never `completed`."""
    stream.feed(data)
    stream.eof()
    assert (stream.outcome().kind, stream.outcome().code) == (kind, code)


def test_the_end_of_an_aborted_body_is_no_completion(stream: EventStream) -> None:
    """Case 2: a stop surfaces as a clean end of a close-delimited body; the cause stays."""
    stream.feed(EVENT + FINISH)
    stream.abort(Cause.CANCEL)
    stream.eof()
    assert stream.outcome().cause is Cause.CANCEL


def test_a_provider_that_quotes_the_key(stream: EventStream) -> None:
    """No client gets to see it, in whatever pieces the event comes; nothing else is changed."""
    stream.key = b"sk-very-secret"
    before = EVENT.replace(b'"a"', b'"sk-very-secret"')  # what people write is theirs
    event = b'data: {"error":{"message":"bad key sk-very-secret","code":"sk-very-secret"}}\n\n'
    assert stream.feed(before + event[:30]) == before
    told = event.replace(b"sk-very-secret", b"[key]")
    assert stream.feed(event[30:] + EVENT) == told
    assert stream.outcome().code == "upstream_error"


MARKED = {
    "an event": (EVENT, 1, "upstream_truncated", "a"),
    "of CRLF lines": (EVENT.replace(b"\n", b"\r\n") * 2, 2, "upstream_truncated", "aa"),
    "a comment": (b": c\n\n" + EVENT, 1, "upstream_truncated", "a"),
    "all of it": (EVENT + FINISH + DONE, 3, None, "a"),
    "no [DONE]": (EVENT + FINISH, 2, None, "a"),
    "finish": (FINISH, 1, None, ""),
    "[DONE] only": (DONE, 1, None, ""),
    "an error": (FAULT, 1, "upstream_error", ""),
    "an error event": (b"event: error\ndata: x\n\n", 1, "upstream_error", ""),
    "a second mark": (sse.BOM + EVENT, 0, "upstream_truncated", ""),
}


@pytest.mark.parametrize(("data", "events", "code", "text"), MARKED.values(), ids=MARKED)
def test_a_byte_order_mark_before_it(data: bytes, events: int, code: str | None, text: str) -> None:
    """It is passed on, and hides nothing of the first event, wherever it is cut."""
    data = sse.BOM + data
    cuts = [[data[:cut], data[cut:]] for cut in range(len(data) + 1)]
    for pieces in [*cuts, [data[i : i + 1] for i in range(len(data))]]:
        stream = EventStream("s", "t")
        stream.transcript = Transcript()
        assert b"".join(map(stream.feed, pieces)) == data
        stream.eof()
        outcome = stream.outcome()
        assert (outcome.events, outcome.code, outcome.text) == (events, code, text)


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
    delta = {"delta": {}}
    kind = "chat.completion.chunk"
    assert said == openai_chat.cancelled(kind, "t", "m", said["created"], delta)
    assert abs(said["created"] - time()) < 60


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


def answer_of(stream: WholeStream, *pieces: bytes) -> bytes:
    """What a provider's body of these pieces comes to."""
    assert [stream.feed(piece) for piece in pieces] == [b""] * len(pieces)
    return stream.eof()


# One piece


@pytest.mark.parametrize("cut", [0, 1, 20, 41, len(ANSWER) - 1])
def test_an_answer_is_handed_out_once_it_is_whole(whole: WholeStream, cut: int) -> None:
    """In one piece, byte for byte, however it came; and it counts as one event."""
    assert answer_of(whole, ANSWER[:cut], ANSWER[cut:]) == ANSWER
    outcome = whole.outcome()
    assert (outcome.kind, outcome.events, outcome.bytes) == (Kind.COMPLETED, 1, len(ANSWER))
    assert whole.last_words() == b""


def test_newlines_before_it_are_a_sign_of_life_and_no_part_of_it(whole: WholeStream) -> None:
    """What a provider sends while it queues the request stays here; what is inside goes on."""
    assert answer_of(whole, b"\n", b"\r\n \t", b"\n" + ANSWER + b"\n") == ANSWER + b"\n"


@pytest.mark.parametrize("body", [ANSWER, LONG], ids=["short", "long"])
def test_a_byte_order_mark_before_one_piece(whole: WholeStream, body: bytes) -> None:
    """Python's json reads over it; it is passed on."""
    assert answer_of(whole, sse.BOM[:2], sse.BOM[2:] + body) == sse.BOM + body


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
def test_what_is_no_whole_answer_fails(whole: WholeStream, body: bytes) -> None:
    """A body that ends with its connection may end anywhere: it is looked at, not believed."""
    assert answer_of(whole, body) == b""
    assert whole.outcome().code == "upstream_truncated"
    assert json.loads(whole.last_words())["error"]["code"] == "upstream_truncated"


def test_other_json_is_no_answer(whole: WholeStream) -> None:
    """It is whole, and would be the same if it were asked for again."""
    assert answer_of(whole, b"[1]") == b""
    assert whole.outcome().code == "upstream_not_json"


def test_a_long_answer_is_looked_at_from_without(
    whole: WholeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To parse it would hold up all other streams of the worker: 40 ms a MB."""
    monkeypatch.delattr(forms.json, "loads")
    assert answer_of(whole, LONG) == LONG
    assert whole.outcome().kind is Kind.COMPLETED


@pytest.mark.parametrize("body", [LONG[:-3], LONG[1:], LONG[7:-3]])
def test_a_long_answer_that_breaks_off_fails(whole: WholeStream, body: bytes) -> None:
    """Its last brace is missing, or its first."""
    assert answer_of(whole, body) == b""
    assert whole.outcome().code == "upstream_truncated"


def test_a_providers_own_error_is_passed_on(whole: WholeStream) -> None:
    """A 200 that says it failed is no answer; its words are the client's."""
    assert answer_of(whole, b"\n", OVERLOADED) == b""
    assert isinstance(whole.error, ProviderEvent)
    assert (whole.outcome().code, whole.last_words()) == ("upstream_error", OVERLOADED)


def test_no_error_is_no_fault(whole: WholeStream) -> None:
    """Some providers have the field in every answer."""
    assert answer_of(whole, b'{"error": null}') == b'{"error": null}'


def test_an_answer_is_bounded(whole: WholeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is kept, so it ends where it is too long, not when it is there."""
    monkeypatch.setattr(forms, "MAX_ANSWER", len(ANSWER))
    assert answer_of(WholeStream("s", "t"), ANSWER) == ANSWER
    whole.feed(ANSWER + b" ")
    assert whole.error is not None
    assert (whole.error.code, whole.error.status) == ("answer_too_large", 502)


@pytest.mark.parametrize("cause", [Cause.CANCEL, Cause.SUPERSEDED])
def test_a_stop_is_an_answer_in_which_nothing_is_said(whole: WholeStream, cause: Cause) -> None:
    """Whole and well formed, so that no client asks again; of its cost nothing is claimed."""
    whole.feed(ANSWER[:20])
    whole.abort(cause)
    said = json.loads(whole.last_words())
    message = {"message": {"role": "assistant", "content": ""}}
    assert said == openai_chat.cancelled("chat.completion", "t", "m", said["created"], message)


def test_a_stop_that_comes_first_wins(whole: WholeStream) -> None:
    """An answer that is whole after it is not handed out, nor one that is wrong blamed."""
    whole.abort(Cause.CANCEL)
    assert answer_of(whole, ANSWER) == b""
    assert whole.outcome().cause is Cause.CANCEL
    assert b"cancelled" in whole.last_words()


@pytest.mark.parametrize(
    ("cause", "code"), [(Cause.DEADLINE, "deadline"), (Cause.SHUTDOWN, "shutting_down")]
)
def test_an_end_that_is_told_is_an_error(whole: WholeStream, cause: Cause, code: str) -> None:
    """What the client did not ask for it is told."""
    whole.abort(cause)
    assert json.loads(whole.last_words())["error"]["code"] == code


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


def test_a_whole_answer_that_quotes_the_key() -> None:
    """A provider's error in one piece is passed on without it."""
    stream = WholeStream("s", "t")
    stream.key = b"sk-very-secret"
    stream.feed(b'{"error": {"message": "bad key sk-very-secret"}}')
    assert stream.eof() == b""
    assert stream.last_words() == b'{"error": {"message": "bad key [key]"}}'
