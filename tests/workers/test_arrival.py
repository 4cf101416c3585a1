"""arrival: how much of a request is there. Tables and properties; no I/O."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.workers.arrival import MAX_HEAD, READ_AHEAD, Arrival

MOST = 2000
"""Bytes of a body that are collected."""

GET = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"POST /api/chat/stream HTTP/1.1\r\nHost: a\r\n"
LENGTH = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED = CHUNKS + b"5;a=b\r\nhello\r\nA\r\n0\r\n\r\n01234\r\n0\r\nX: y\r\n\r\n"


def fed(*pieces: bytes) -> Arrival:
    arrival = Arrival(MOST)
    for piece in pieces:
        arrival.feed(piece)
    return arrival


WHOLE = {
    "no body": GET,
    "no headers": b"GET / HTTP/1.1\r\n\r\n",
    "a length": LENGTH,
    "a length of 0": HEAD + b"Content-Length: 0\r\n\r\n",
    "a length with blanks": HEAD + b"content-LENGTH:\t 5 \t\r\nX: y\r\n\r\nhello",
    "a space before the colon": HEAD + b"Content-Length : 5\r\n\r\nhello",
    "the longest length": HEAD + b"Content-Length: %d\r\n\r\n" % MOST + b"a" * MOST,
    "chunks": CHUNKED,
    "chunks after another coding": HEAD + b"Transfer-Encoding: gzip, Chunked\r\n\r\n0\r\n\r\n",
    "no chunk": CHUNKS + b"0\r\n\r\n",
    "HTTP/1.0": b"POST /a HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello",
    "a head's end in the body": HEAD + b"Content-Length: 8\r\n\r\n\r\n\r\n\r\n\r\n",
}
whole = pytest.mark.parametrize("raw", WHOLE.values(), ids=WHOLE)


@whole
def test_a_request_is_whole_with_its_last_byte(raw: bytes) -> None:
    """Cut in two anywhere, and byte by byte: not before the last byte, and then at once."""
    by_byte = Arrival(MOST)
    for end in range(1, len(raw)):
        by_byte.feed(raw[end - 1 : end])
        assert not by_byte.whole, end
        in_two = fed(raw[:end])
        assert (in_two.whole, in_two.long, in_two.overlong) == (False, False, False), end
        in_two.feed(raw[end:])
        assert in_two.whole
        assert in_two.data == raw
    by_byte.feed(raw[-1:])
    assert by_byte.whole
    assert by_byte.data == raw


@given(cuts=st.lists(st.integers(0, len(CHUNKED)), max_size=12))
def test_chunks_cut_anywhere(cuts: list[int]) -> None:
    """However a chunked request comes in pieces, it is whole with its last byte."""
    edges = [0, *sorted(cuts), len(CHUNKED)]
    arrival = Arrival(MOST)
    for start, end in itertools.pairwise(edges):
        arrival.feed(CHUNKED[start:end])
        assert arrival.whole == (end == len(CHUNKED))
    assert arrival.data == CHUNKED


@given(
    bodies=st.lists(st.binary(max_size=200), max_size=8).map(
        lambda bodies: [body for body in bodies if body]
    ),
    size=st.integers(1, 300),
)
def test_chunks_of_any_content(bodies: list[bytes], size: int) -> None:
    """No content of a chunk looks like the end: not line ends, not sizes."""
    raw = CHUNKS + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"
    arrival = Arrival(MOST)
    for start in range(0, len(raw), size):
        assert not arrival.whole
        arrival.feed(raw[start : start + size])
    assert arrival.whole


@whole
def test_what_is_pipelined_behind_it_stays_with_it(raw: bytes) -> None:
    """The parser finds out where the next request begins: nothing is lost, nothing waited for."""
    arrival = fed(raw + GET[:10])
    assert arrival.whole
    assert arrival.data == raw + GET[:10]


@pytest.mark.parametrize("lines", [b"\r\n", b"\r\n\r\n", b"\r\n" * 100])
def test_empty_lines_before_a_request_are_nothing(lines: bytes) -> None:
    """RFC 9112, 2.2; a client that sends only these has not begun."""
    for cut in range(len(lines)):
        arrival = fed(lines, lines[:cut])
        assert not arrival.begun
        assert not arrival.has_head
        arrival.feed(lines[cut:] + GET)
        assert arrival.whole
        assert arrival.data == GET


@pytest.mark.parametrize("junk", [b"\n", b"\r\r\n", b"\n\r\n", b" "])
def test_no_other_line_ends_are_nothing(junk: bytes) -> None:
    """What another server may take for a part of a request is for the parser to see."""
    arrival = fed(junk + GET)
    assert arrival.begun
    assert arrival.data == junk + GET


@pytest.mark.parametrize(
    ("line", "target"),
    [
        (b"GET /a?b=c HTTP/1.1", b"/a?b=c"),
        (b"GET /a HTTP/1.0", b"/a"),
        (b"GET /a HTTP/1.9", b"/a"),
        (b"POST http://host:1/a HTTP/1.1", b"http://host:1/a"),
        (b"OPTIONS * HTTP/1.1", b"*"),
        (b"GET /a", b""),
        (b"GET /a b HTTP/1.1", b""),
        (b"GET /a HTTP/2.0", b""),
        (b"nonsense", b""),
        (b"\x16\x03\x01\x02", b""),
    ],
)
def test_the_target(line: bytes, target: bytes) -> None:
    """What is asked for; of a malformed head nothing. That is whole, for the parser to refuse."""
    arrival = fed(line + b"\r\nHost: a\r\n\r\n")
    assert arrival.target == target
    assert arrival.whole


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\nGET",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: five\r\n\r\n",
        HEAD + b"Content-Length: \r\n\r\n",
        CHUNKS + b"hello\r\n",
        CHUNKS + b"1\r\nhello\r\n",
        CHUNKS + b"5" * 10_000,
    ],
)
def test_what_is_malformed_is_not_waited_for(raw: bytes) -> None:
    """It is for the parser, which says what is wrong."""
    assert fed(raw).whole == (raw != b"\r\n\r\nGET")


def test_a_field_that_only_looks_like_a_length() -> None:
    """Names are whole, values end with their line, and a folded line is no field."""
    for field in (b"X-Content-Length: 5", b"X: a\r\n Content-Length: 5", b"X: Content-Length: 5"):
        assert fed(HEAD + field + b"\r\n\r\n").whole, field


EXPECTS = HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"


def test_100_continue() -> None:
    """Who waits for it is named once; the parser, which would send it again, does not see it."""
    arrival = Arrival(MOST)
    assert not arrival.feed(EXPECTS[:-1])
    assert arrival.feed(EXPECTS[-1:])
    assert not arrival.whole
    assert not arrival.feed(b"hel")
    assert not arrival.whole
    assert not arrival.feed(b"lo")
    assert arrival.whole
    assert arrival.data == LENGTH


def test_100_continue_with_chunks() -> None:
    """Likewise where the body has no length."""
    arrival = Arrival(MOST)
    assert arrival.feed(CHUNKS.replace(b"Host: a", b"expect:100-Continue "))
    arrival.feed(b"0\r\n\r\n")
    assert arrival.whole
    assert b"xpect" not in arrival.data


@pytest.mark.parametrize(
    "raw",
    [
        EXPECTS + b"h",
        EXPECTS + b"hello",
        EXPECTS.replace(b": 5", b": 0"),
        EXPECTS.replace(b": 5", b": 99999"),
        EXPECTS.replace(b"HTTP/1.1", b"HTTP/1.0"),
        EXPECTS.replace(b"100-continue", b"nothing"),
    ],
    ids=["body comes", "body is there", "no body", "long", "HTTP/1.0", "something else"],
)
def test_nobody_waits_for_100_continue(raw: bytes) -> None:
    """A body that comes anyway, none, one for the app to accept, and a client that knows no 100."""
    arrival = Arrival(MOST)
    assert not arrival.feed(raw)
    assert arrival.data == raw


def test_a_long_body_is_not_collected() -> None:
    """By its length that is known with the head."""
    arrival = fed(HEAD + b"Content-Length: %d\r\n\r\n" % (MOST + 1))
    assert arrival.long
    assert not arrival.whole


def test_long_chunks_are_collected_until_an_app_can_refuse_them() -> None:
    """One byte too many is there for it to see, and as much as its parser reads at a time."""
    arrival = fed(CHUNKS + b"fffff\r\n" + b"a" * (MOST + READ_AHEAD))
    assert not arrival.long
    arrival.feed(b"a")
    assert arrival.long


def test_chunks_that_are_mostly_sizes_are_overlong() -> None:
    """What is kept of a body is bound, also where its bytes come one to a chunk."""
    arrival = fed(CHUNKS)
    fed_bytes = 0
    while not arrival.overlong:
        assert not arrival.long
        arrival.feed(b"1;%b\r\na\r\n" % (b"a" * 93) * 10)
        fed_bytes += 1000
        assert fed_bytes < 2 * MOST + 2 * MAX_HEAD
    assert arrival.has_head


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["open", "closed"])
def test_an_overlong_head(end: bytes) -> None:
    """It is refused as a head, whether or not its end has come with it."""
    arrival = fed(HEAD + b"X: " + b"a" * MAX_HEAD + end)
    assert arrival.overlong
    assert not arrival.has_head
    assert not arrival.whole


def test_the_longest_head() -> None:
    """A long body behind a head does not make that long."""
    fill = MAX_HEAD - len(HEAD + b"X: \r\n") - len(b"Content-Length: 99999")
    head = HEAD + b"X: " + b"a" * fill + b"\r\nContent-Length: 99999\r\n\r\n"
    assert head.index(b"\r\n\r\n") == MAX_HEAD
    arrival = fed(head + b"a" * 1000)
    assert not arrival.overlong
    assert arrival.long
