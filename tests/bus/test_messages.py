"""bus.messages: the wire format, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.bus.messages import (
    Action,
    Answer,
    Claim,
    Enquiry,
    Live,
    Malformed,
    Message,
    Name,
    Page,
    Reply,
    Request,
    decode,
    digest,
    encode,
)

THOROUGH = settings(max_examples=200, deadline=None, database=None)

TEXTS = st.text(st.characters(exclude_categories=()))
"""Any Python text, half a surrogate pair and NUL included: an app's owners may be anything."""

TIMES = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers()

REQUESTS = st.builds(
    Request,
    st.sampled_from(Action),
    TEXTS,
    st.none() | TEXTS,
    st.none() | TEXTS,
    TEXTS,
    TEXTS,
    TIMES,
)
REPLIES = st.builds(Reply, st.sampled_from(Answer), TEXTS, TEXTS)
ENQUIRIES = st.builds(
    Enquiry, st.none() | TEXTS, st.integers(0), TEXTS, TEXTS, st.booleans(), TIMES
)
LIVES = st.builds(
    Live,
    st.builds(Name, TEXTS, TEXTS, TEXTS),
    st.integers(1),
    TEXTS,
    st.integers(0, 10**6).map(lambda ms: ms / 1000),
    st.integers(0),
)
PAGES = st.builds(Page, st.tuples(LIVES), st.booleans(), TEXTS, TEXTS)
MESSAGES = REQUESTS | REPLIES | ENQUIRIES | PAGES

REQUEST = {
    "chatstream": 1,
    "id": "5f0c",
    "origin": "4711",
    "action": "cancel",
    "owner": "7",
    "session": "s1",
    "stream": None,
    "before": 81.25,
}
REPLY = {"chatstream": 1, "id": "5f0c", "origin": "4712", "answer": "stopped"}
ENQUIRY = {
    "chatstream": 1,
    "id": "5f0c",
    "origin": "4711",
    "action": "list",
    "owner": None,
    "after": 3,
    "before": 81.25,
}
LISTED = ["7", "s1", "a1", 4, "body", 1.25, 17]
PAGE = {"chatstream": 1, "id": "5f0c", "origin": "4712", "streams": [LISTED], "more": True}


# Names


def test_a_stream_is_named_by_all_three() -> None:
    """Two names are the same when owner, session and stream are, and can be keys."""
    assert Name("o", "s", "t") == Name("o", "s", "t")
    assert len({Name("o", "s", "t"), Name("o", "t", "s"), Name("s", "o", "t")}) == 3


def test_two_claims_of_a_name_are_two() -> None:
    """A name that is used again is claimed by another stream: the number tells them apart."""
    assert Claim(Name("o", "s", "t"), 1) != Claim(Name("o", "s", "t"), 2)


def test_each_request_is_an_exchange_of_its_own() -> None:
    """Two requests for the same thing have two ids, so each gets its own reply."""
    one, two = Request(Action.CANCEL, "o", "s"), Request(Action.CANCEL, "o", "s")
    assert one.id
    assert one.id != two.id


def test_a_request_is_for_all_streams_unless_it_says_when() -> None:
    """Where two processes have no clock in common, a request goes without its time."""
    request = Request(Action.CANCEL, "o", "s")
    assert request.before is None
    assert json.loads(encode(request))["before"] is None
    assert decode(encode(request)) == request


def test_a_digest_is_one_of_many() -> None:
    """32 hexadecimal digits, the same in each process; where a word ends is part of it."""
    assert digest("7", "s1") == "02afb6450c2de39982b8e850b1de8685"
    words = [("7", "s1"), ("7s1",), ("7s", "1"), ("", "7", "s1"), ("s1", "7"), ("\ud83d",), ("",)]
    digests = {digest(*each) for each in words}
    assert len(digests) == len(words)
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in digests)


# The drawing


def test_a_request_looks_as_drawn() -> None:
    """One JSON object in UTF-8, with the fields of the drawing and no other."""
    request = Request(Action.CANCEL, "7", "s1", None, "4711", "5f0c", 81.25)
    assert json.loads(encode(request).decode()) == REQUEST
    assert decode(json.dumps(REQUEST).encode()) == request


def test_a_reply_looks_as_drawn() -> None:
    """The id is the request's, the origin who answers."""
    reply = Reply(Answer.STOPPED, "5f0c", "4712")
    assert json.loads(encode(reply).decode()) == REPLY
    assert decode(json.dumps(REPLY).encode()) == reply


def test_an_enquiry_looks_as_drawn() -> None:
    """A null owner means everybody's."""
    enquiry = Enquiry(None, 3, "4711", "5f0c", False, 81.25)
    assert json.loads(encode(enquiry).decode()) == ENQUIRY
    assert decode(json.dumps(ENQUIRY).encode()) == enquiry


def test_an_enquiry_that_stops_looks_as_drawn() -> None:
    """It differs by its action, and as a rule has no time."""
    enquiry = Enquiry("7", 3, "4711", "5f0c", True)
    drawn = {**ENQUIRY, "action": "cancel-all", "owner": "7", "before": None}
    assert json.loads(encode(enquiry).decode()) == drawn
    assert decode(json.dumps(drawn).encode()) == enquiry


def test_a_page_looks_as_drawn() -> None:
    """A stream is a list of seven, its seconds to the millisecond."""
    live = Live(Name("7", "s1", "a1"), 4, "body", 1.25, 17)
    page = Page((live,), True, "5f0c", "4712")
    assert json.loads(encode(page).decode()) == PAGE
    assert decode(json.dumps(PAGE).encode()) == page
    precise = Page((live._replace(seconds=1.2499999),), True, "5f0c", "4712")
    assert encode(precise) == encode(page)


def test_a_page_of_nothing_is_the_last() -> None:
    """Or whoever asks would ask for ever."""
    page = decode(page_with(streams=[]))
    assert isinstance(page, Page)
    assert page.more is False


@pytest.mark.parametrize("action", Action)
def test_every_action_has_its_word(action: Action) -> None:
    """cancel, supersede, probe, vacate."""
    request = Request(action, "o", None, "t", id="x")
    assert json.loads(encode(request))["action"] == action.name.lower()
    assert decode(encode(request)) == request


@pytest.mark.parametrize("answer", Answer)
def test_every_answer_has_its_word(answer: Answer) -> None:
    """stopped, live, absent."""
    reply = Reply(answer, "x")
    assert json.loads(encode(reply))["answer"] == answer.name.lower()
    assert decode(encode(reply)) == reply


@THOROUGH
@given(MESSAGES)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    """Whatever the names are made of, the other side has them as they were."""
    assert message == decode(encode(message))


@pytest.mark.parametrize("name", ["žluť 🙂", "a\0b", '"}', "\n", "\ud83d", ""])
def test_a_message_is_one_line_of_text(name: str) -> None:
    """Any name travels as printable ASCII: nothing on the way can break it in two."""
    data = encode(Request(Action.CANCEL, name, name, name, name, name))
    assert data.decode("ascii").isprintable()
    assert decode(data) == Request(Action.CANCEL, name, name, name, name, name)


# What is none


def request_with(**fields: Any) -> bytes:
    return json.dumps({**REQUEST, **fields}).encode()


def reply_with(**fields: Any) -> bytes:
    return json.dumps({**REPLY, **fields}).encode()


def enquiry_with(**fields: Any) -> bytes:
    return json.dumps({**ENQUIRY, **fields}).encode()


def page_with(**fields: Any) -> bytes:
    return json.dumps({**PAGE, **fields}).encode()


def without(message: dict[str, Any], field: str) -> bytes:
    return json.dumps({key: value for key, value in message.items() if key != field}).encode()


MALFORMED = {
    "nothing": b"",
    "no JSON": b"cancel s1",
    "half of one": json.dumps(REQUEST).encode()[:-1],
    "two of them": json.dumps(REQUEST).encode() * 2,
    "no UTF-8": b'{"chatstream": 1, "id": "\xff"}',
    "null": b"null",
    "a number": b"1",
    "a text": b'"chatstream"',
    "a list": b'["chatstream"]',
    "an empty object": b"{}",
    "too deep": b"[" * 100_000,
    "a number too long": b'{"chatstream": ' + b"1" * 10_000 + b"}",
    "another program's": b'{"type": "message", "pattern": null, "channel": "x", "data": "y"}',
    "a later format": request_with(chatstream=2),
    "a format in words": request_with(chatstream="1"),
    "no format": without(REQUEST, "chatstream"),
    "an unknown action": request_with(action="restart"),
    "an action in capitals": request_with(action="CANCEL"),
    "an action that is none": request_with(action=["cancel"]),
    "a request for all": request_with(owner=None),
    "an owner that is a number": request_with(owner=7),
    "a session that is a number": request_with(session=7),
    "a stream that is a list": request_with(stream=["t"]),
    "a time that is a text": request_with(before="81.25"),
    "a time that is a truth": request_with(before=True),
    "a time that is a list": request_with(before=[81.25]),
    "an id that is null": request_with(id=None),
    "an origin that is a number": request_with(origin=4711),
    "an unknown answer": reply_with(answer="perhaps"),
    "an answer that is null": reply_with(answer=None),
    "an answer that is an object": reply_with(answer={}),
    "a reply to nobody": reply_with(id=7),
    "a reply of nobody": reply_with(origin=None),
    "an enquiry for an owner that is a number": enquiry_with(owner=7),
    "an enquiry from a text on": enquiry_with(after="3"),
    "an enquiry from a fraction on": enquiry_with(after=3.5),
    "an enquiry from a truth on": enquiry_with(after=True),
    "an enquiry before a text": enquiry_with(before="now"),
    "an enquiry before a truth": enquiry_with(before=True),
    "an enquiry that does something else": enquiry_with(action="list-all"),
    "a page of a number": page_with(streams=1),
    "a page of objects": page_with(streams=[{}]),
    "a page of too little": page_with(streams=[LISTED[:-1]]),
    "a page of too much": page_with(streams=[[*LISTED, 1]]),
    "a page without an owner": page_with(streams=[[None, *LISTED[1:]]]),
    "a page without seconds": page_with(streams=[[*LISTED[:5], None, 17]]),
    "a page with half an event": page_with(streams=[[*LISTED[:6], 0.5]]),
    **{f"an enquiry without {field}": without(ENQUIRY, field) for field in ENQUIRY},
    **{f"a page without {field}": without(PAGE, field) for field in PAGE},
    **{f"a request without {field}": without(REQUEST, field) for field in REQUEST},
    **{f"a reply without {field}": without(REPLY, field) for field in REPLY},
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_message_is_malformed(data: bytes) -> None:
    """Neither half a message nor anybody else's is taken for one."""
    with pytest.raises(Malformed):
        decode(data)


def test_what_is_dropped_is_not_repeated() -> None:
    """The error says what is wrong, not what was in it: a message may hold names of users."""
    with pytest.raises(Malformed) as caught:
        decode(request_with(action="hunter2", owner="alice"))
    assert "hunter2" not in str(caught.value)
    assert "alice" not in str(caught.value)
    assert caught.value.__suppress_context__


def message_or_malformed(data: bytes) -> None:
    """Fails on any other way for `decode` to end, by its exception or here."""
    try:
        message = decode(data)
    except Malformed:
        return
    assert isinstance(message, (Request, Reply, Enquiry, Page))
    texts = [message.id, message.origin]
    if isinstance(message, Request):
        texts += [message.owner, message.session_id or "", message.stream_id or ""]
        assert message.before is None or type(message.before) in (int, float)
    assert all(isinstance(text, str) for text in texts)
    assert encode(message) == encode(decode(encode(message)))  # not ==: JSON's NaN is not itself


@THOROUGH
@given(st.binary())
def test_bytes_are_a_message_or_malformed(data: bytes) -> None:
    """Whatever arrives, there is no third way."""
    message_or_malformed(data)


@THOROUGH
@given(MESSAGES, st.data())
def test_damaged_messages_are_messages_or_malformed(message: Message, data: st.DataObject) -> None:
    """Nor for a message with some bytes cut out and others put in."""
    whole = encode(message)
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    message_or_malformed(whole[:begin] + data.draw(st.binary(max_size=8)) + whole[end:])


STRANGE = [None, True, False, 0, 1, 2, -1, 1.0, float("nan"), 10**30, "", "probe", "live", "\0"]
STRANGE += [[], ["cancel"], {}, {"chatstream": 1}, [[]], [None]]
FIELDS = st.sampled_from(sorted({*REQUEST, *REPLY, *ENQUIRY, *PAGE}))


@THOROUGH
@given(
    st.sampled_from([REQUEST, REPLY, ENQUIRY, PAGE]),
    st.dictionaries(FIELDS, st.sampled_from(STRANGE), max_size=3),
)
def test_strange_fields_are_messages_or_malformed(
    message: dict[str, Any], strange: dict[str, Any]
) -> None:
    """Nor for JSON that has the fields of a message and anything in them."""
    message_or_malformed(json.dumps({**message, **strange}).encode())
