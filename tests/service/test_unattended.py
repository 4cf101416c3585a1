"""Both movers: the text that a client was sent, and a stream that outlives its client.

As in `test_movers`, the tests know nothing of who moves the stream.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chatstream.stream.forms import EventStream, WholeStream
from chatstream.stream.outcome import Cause, Kind, Phase
from chatstream.stream.stream import Stream
from chatstream.stream.transcript import Transcript
from tests.conftest import eventually
from tests.stream.moving import DONE, EVENT, FINISH, MOVERS, Moved

pytestmark = pytest.mark.usefixtures("nothing_left")

MakeMoved = Callable[..., Moved]


def heard(session_id: str, stream_id: str) -> Stream:
    """A stream to whose end somebody listens."""
    stream = EventStream(session_id, stream_id)
    stream.transcript = Transcript()
    return stream


def outliving(session_id: str, stream_id: str) -> Stream:
    """One that goes on when its client has gone."""
    stream = heard(session_id, stream_id)
    stream.outlives_client = True
    return stream


@pytest.fixture(params=MOVERS)
def move(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[MakeMoved]:
    """Makes a stream that is moved, by the one or the other; somebody listens."""
    made: list[Moved] = []

    def make(**options: Any) -> Moved:
        made.append(MOVERS[request.param](**{"form": heard, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def said(number: int, size: int = 1000) -> bytes:
    """A long event with a number in its text."""
    text = f"<{number}>".ljust(size, ".")
    return b"data: %b\n\n" % json.dumps({"choices": [{"delta": {"content": text}}]}).encode()


def numbers(text: str) -> list[int]:
    """Those of the long events in a text."""
    return [int(number) for number in re.findall(r"<(\d+)>\.+", text)]


# The text, as it was sent


@pytest.mark.parametrize("form", [heard, outliving])
def test_the_text_of_a_whole_answer(move: MakeMoved, form: Callable[[str, str], Stream]) -> None:
    """What came, and what the provider said of its cost. A client that stays has not left."""
    m = move(form=form)
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    m.say(EVENT, EVENT, FINISH, usage, DONE)
    assert b"".join(m.rest()) == EVENT + EVENT + FINISH + usage + DONE
    outcome = m.end()
    assert (outcome.text, outcome.reasoning, outcome.usage) == ("aa", "", (1, 2, False))
    assert 0 < outcome.time_to_headers <= outcome.time_to_first_event <= outcome.duration
    assert not outcome.client_left


@pytest.mark.parametrize("form", [heard, outliving])
def test_a_stopped_answer_is_kept_as_it_was_seen(
    move: MakeMoved, form: Callable[[str, str], Stream]
) -> None:
    """Case 40: what the client got, and no event more. The stop of one who stays is a stop."""
    m = move(form=form)
    m.say(EVENT * 3)
    got = m.take(len(b"HTTP/1.1 200 OK\r\n\r\n") + len(EVENT * 3))
    m.stream.abort(Cause.CANCEL)
    m.rest()
    outcome = m.end()
    assert got.count(EVENT) == len(outcome.text or "") == 3
    assert (outcome.cause, outcome.client_left) == (Cause.CANCEL, False)


def test_nobody_listened(move: MakeMoved) -> None:
    """Then no text is kept: there is none, not an empty one."""
    m = move(form=EventStream)
    m.say(EVENT, DONE)
    m.rest()
    outcome = m.end()
    assert (outcome.text, outcome.reasoning, outcome.model, outcome.usage) == (None,) * 4
    assert outcome.events == 2


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_what_the_connection_did_not_take_was_not_seen(move: MakeMoved, chunked: bool) -> None:
    """Case 40, where a client stops reading: the events that it can still read, no others."""
    m = move(buffers=4096, chunked=chunked)
    m.start()
    for number in range(200):
        m.provider.setblocking(False)
        try:
            m.say(said(number))
        except BlockingIOError:
            break
    m.provider.setblocking(True)
    m.blocked()
    m.stream.abort(Cause.CANCEL)
    m.client.settimeout(None)
    eventually(lambda: m.outcomes, "an end without a reader")
    m._drain_client()
    m._left = True  # it was cut off; what it got is compared here
    got = b"".join(re.split(rb"\r\n[0-9A-F]+\r\n", m._received)) if chunked else m._received
    seen = [number for number in range(200) if said(number) in got]
    kept = numbers(m.end().text or "")
    if type(m).__name__ == "Detached":
        assert kept == seen, "to the event"
    else:  # of its last write a thread does not know how much was taken
        assert kept == seen[: len(kept)]
        assert len(seen) - len(kept) <= 66, "one read of the provider's at most"
    assert seen


def test_nothing_was_sent_to_whom_had_left(move: MakeMoved) -> None:
    """A client that went before the first byte has seen nothing."""
    m = move(answers=False)
    m.start()
    m.leave()
    outcome = m.end()
    assert (outcome.cause, outcome.text, outcome.usage) == (Cause.CLIENT, "", None)
    assert (outcome.time_to_headers, outcome.time_to_first_event) == (None, None)


def test_an_answer_in_one_piece_has_its_text(move: MakeMoved) -> None:
    """OpenAI's other form."""

    def whole(session_id: str, stream_id: str) -> Stream:
        stream = WholeStream(session_id, stream_id)
        stream.transcript = Transcript(whole=True)
        return stream

    m = move(form=whole)
    m.start()
    m.say(b'{"choices":[{"index":0,"message":{"content":"so"}}]}')
    m.provider.close()
    m.rest()
    outcome = m.end()
    assert (outcome.kind, outcome.text) == (Kind.COMPLETED, "so")
    assert outcome.time_to_first_event is not None


# A stream that outlives its client


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_an_answer_is_read_to_its_end_without_its_client(move: MakeMoved, how: str) -> None:
    """CHATSTREAM_ON_DISCONNECT=finish: it completes, and who listens has all of it."""
    m = move(form=outliving)
    m.say(EVENT)
    assert m.next() == EVENT
    m.leave(how)
    eventually(lambda: m.stream.unattended, "that the client has gone")
    for _ in range(3):
        m.say(EVENT)
    m.say(FINISH, DONE)
    outcome = m.end()
    assert (outcome.kind, outcome.text) == (Kind.COMPLETED, "aaaa")
    assert outcome.client_left


@pytest.mark.parametrize("answers", [False, True], ids=["headers", "silent"])
def test_a_client_that_leaves_before_the_first_byte(move: MakeMoved, answers: bool) -> None:
    """The provider has yet to answer: it is waited for, and its answer read."""
    m = move(form=outliving, answers=answers)
    m.start()
    eventually(lambda: m.connects, "a call")
    m.leave()
    eventually(lambda: m.stream.unattended, "that the client has gone")
    if not answers:
        m.answer()
    m.say(EVENT, DONE)
    outcome = m.end()
    assert (outcome.kind, outcome.text) == (Kind.COMPLETED, "a")


def test_a_client_that_leaves_while_it_does_not_read(move: MakeMoved) -> None:
    """What it did not take is for who listens all the same."""
    m = move(form=outliving, buffers=4096)
    m.start()
    m.provider.setblocking(False)
    sent = 0
    try:
        while sent < 500:
            m.say(said(sent, 5000))
            sent += 1
    except BlockingIOError:
        pass
    m.provider.setblocking(True)
    m.blocked()
    m.leave("reset")
    m.say(b"\n\n", DONE)
    outcome = m.end()
    assert outcome.kind is Kind.COMPLETED
    kept = numbers(outcome.text or "")
    assert kept[: sent - 1] == list(range(sent))[: sent - 1]


@pytest.mark.parametrize("begun", [False, True], ids=["headers", "body"])
def test_a_cancel_stops_what_nobody_watches(move: MakeMoved, begun: bool) -> None:
    """It is what it always is: the provider is told at once, and the cause is the cancel."""
    m = move(form=outliving, answers=begun)
    if begun:
        m.say(EVENT)
        assert m.next() == EVENT
    else:
        m.start()
        eventually(lambda: m.connects, "a call")
    m.leave()
    eventually(lambda: m.stream.unattended, "that the client has gone")
    assert m.stream.abort(Cause.CANCEL)
    if begun:
        assert m.hears_the_end()
    outcome = m.end()
    assert (outcome.kind, outcome.cause) == (Kind.ABORTED, Cause.CANCEL)
    assert outcome.client_left


def test_a_provider_that_falls_silent_is_given_up_alone_too(move: MakeMoved) -> None:
    """The clocks run on, and pings to nobody keep no stream alive."""
    m = move(form=outliving, idle_timeout=0.3, ping_interval=0.05)
    m.say(EVENT)
    assert m.next() == EVENT
    m.leave()
    outcome = m.end()
    assert (outcome.kind, outcome.code) == (Kind.FAILED, "upstream_idle")
    assert outcome.text == "a"


def test_the_client_is_gone_once(move: MakeMoved) -> None:
    """However often that is noticed; and not once it has ended."""
    m = move(form=outliving)
    m.say(EVENT)
    assert m.next() == EVENT
    m.stream.client_gone(Cause.STALLED)
    m.stream.client_gone()
    assert (m.stream.ended, m.stream.unattended) == (False, True)
    m.say(EVENT, DONE)
    assert m.end().text == "aa"
    assert m.stream.phase in (Phase.BODY, Phase.SENDING)


def test_a_client_that_leaves_as_the_answer_comes(nothing_left: None) -> None:
    """Who notices that it has gone, the loop, begins no response: app code is for threads."""
    m = MOVERS["detached"](form=outliving, answers=False)
    started_in: list[int] = []
    start_response = m.start_response

    def noting(data: bytes) -> bytes:
        started_in.append(threading.get_ident())
        return start_response(data)

    m.start_response = noting
    m.start()
    eventually(lambda: m.connects, "a call")
    m.stream.arm(m.sock)
    m.say(EVENT, DONE)
    m.stream._body = m.body  # the call thread is just about to say so
    m.loop.call_soon(m.stream.client_gone)
    eventually(lambda: m.stream.unattended, "that the client has gone")
    m.stream._tell()
    assert m.end().text == "a"
    assert started_in
    assert m.loop._thread not in started_in
    m.close()
