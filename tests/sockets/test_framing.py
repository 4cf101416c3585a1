"""framing: HTTP/1.1 message bodies to their bytes. Tables; no I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.sockets.framing import MAX_LINE, BadFraming, Chunked, Framing, Length, UntilClose


def body_of(framing: Framing, pieces: Iterable[bytes]) -> bytes:
    return b"".join([framing.feed(piece) for piece in pieces])


def by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


CHUNKED = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "two chunks": (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
    "nothing": (b"0\r\n\r\n", b""),
    "extensions": (b"5;a=b;c\r\nhello\r\n0;last\r\n\r\n", b"hello"),
    "trailers": (b"5\r\nhello\r\n0\r\nX: y\r\nZ: 0\r\n\r\n", b"hello"),
    "hex, both cases": (b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    "leading zeros": (b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    "spaces": (b"5 \r\nhello\r\n0\r\n\r\n", b"hello"),
    "bare LF": (b"5\nhello\n0\n\n", b"hello"),
    "a chunk as data": (b"6\r\n1\r\nx\r\n\r\n0\r\n\r\n", b"1\r\nx\r\n"),
    "line ends and sizes as data": (b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
}
chunked = pytest.mark.parametrize(("raw", "body"), CHUNKED.values(), ids=CHUNKED)


@chunked
def test_chunks_cut_anywhere_give_their_data(raw: bytes, body: bytes) -> None:
    """Chunks cut in three anywhere, or byte by byte, give the same data and then are finished."""
    cuts = itertools.combinations_with_replacement(range(len(raw) + 1), 2)
    for pieces in [[raw[:a], raw[a:b], raw[b:]] for a, b in cuts] + [by_byte(raw)]:
        framing = Chunked()
        assert body == body_of(framing, pieces)
        assert framing.finished
        assert framing.reusable


@chunked
def test_chunks_are_finished_with_their_last_byte_only(raw: bytes, body: bytes) -> None:
    """Before the last line end has come, a chunked body has not ended, and an EOF is a fault."""
    framing = Chunked()
    framing.feed(raw[:-1])
    assert not framing.finished
    with pytest.raises(BadFraming):
        framing.eof()


def test_a_chunk_is_handed_over_before_it_is_whole() -> None:
    """What has come of a chunk is not held back: an event may be shorter than its chunk."""
    framing = Chunked()
    assert framing.feed(b"ff\r\ndata: a\n\n") == b"data: a\n\n"


@pytest.mark.parametrize(
    "pieces",
    [[b"0\r\n\r\nHTTP/1.1"], [b"0\r\n\r\n", b"1\r\nx\r\n"], [b"1\r\nx\r\n0\r\n\r\n\n"]],
    ids=["an answer", "a chunk", "a line end"],
)
def test_bytes_after_the_last_chunk_spoil_the_connection(pieces: list[bytes]) -> None:
    """A connection on which bytes came that nobody asked for carries no other request."""
    framing = Chunked()
    assert body_of(framing, pieces) in (b"", b"x")
    assert framing.finished
    assert not framing.reusable


datas = st.binary(max_size=20) | st.sampled_from([b"\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n"])
sizes = st.sampled_from([b"%x", b"%X", b"00%x", b"%x;a=b", b"%x ", b" %x", b'%x;q="0"'])
line_ends = st.sampled_from([b"\r\n", b"\n"])
chunks = st.builds(
    lambda data, size, end: (size % len(data) + end + data + end, data),
    datas.filter(bool),
    sizes,
    line_ends,
)
lasts = st.builds(
    lambda size, end, trailers: size % 0 + end + b"".join(t + end for t in trailers) + end,
    sizes,
    line_ends,
    st.lists(st.sampled_from([b"X: y", b"0", b"5"]), max_size=2),
)


def fed(raw: bytes, cuts: list[int]) -> tuple[bytes, bool, bool] | None:
    """The body, and whether it is finished and the connection reusable; None if it is a fault."""
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    framing, body = Chunked(), b""
    try:
        for start, end in itertools.pairwise(edges):
            if not framing.finished:  # whoever reads asks no further
                body += framing.feed(raw[start:end])
    except BadFraming:
        return None
    return body, framing.finished, framing.reusable


fuzzed = settings(max_examples=300, deadline=None, database=None, derandomize=True)


@fuzzed
@given(parts=st.lists(chunks, max_size=6), last=lasts, cuts=st.lists(st.integers(0, 250)))
def test_any_chunking_cut_anywhere(
    parts: list[tuple[bytes, bytes]], last: bytes, cuts: list[int]
) -> None:
    """However a body was cut into chunks, and these into reads, it is the same body."""
    raw = b"".join(chunk for chunk, _ in parts) + last
    body = b"".join(data for _, data in parts)
    assert (body, True, True) == fed(raw, cuts)
    assert (body, True, True) == fed(raw, list(range(len(raw))))


@fuzzed
@given(
    raw=st.lists(
        st.sampled_from([b"\r\n", b"\n", b"\r", b"0", b"5", b"a", b";", b"-", b" ", b"hello"])
        | st.binary(max_size=4),
        max_size=16,
    ).map(b"".join),
    cuts=st.lists(st.integers(0, 60)),
)
def test_any_bytes_as_chunks(raw: bytes, cuts: list[int]) -> None:
    """Bytes that are no chunks are a fault, or none, whatever the cuts; nothing else is raised."""
    whole, cut = fed(raw, []), fed(raw, cuts)
    if whole is None or cut is None:
        assert whole is cut
    else:
        assert whole[:2] == cut[:2]


@fuzzed
@given(
    parts=st.lists(chunks, min_size=1, max_size=6),
    last=st.just(b"") | lasts,
    cuts=st.lists(st.integers(0, 250), max_size=3),
    wrong=st.tuples(
        st.integers(0, 120), st.integers(0, 2), st.sampled_from([b"", b"0", b"x", b"\n"])
    ),
)
def test_whole_chunks_are_read_as_bytes_one_by_one(
    parts: list[tuple[bytes, bytes]], last: bytes, cuts: list[int], wrong: tuple[int, int, bytes]
) -> None:
    """Chunks with a mistake anywhere are the same body, or the same fault, in reads of any size."""
    raw = b"".join(chunk for chunk, _ in parts) + last
    position, length, put = wrong
    raw = raw[:position] + put + raw[position + length :]
    by_one, by_many = fed(raw, list(range(len(raw)))), fed(raw, cuts)
    assert (by_one and by_one[:2]) == (by_many and by_many[:2])


def test_sizes_in_hex_of_both_cases_and_with_extensions_come_whole() -> None:
    """Chunks that come whole, in one read or many, keep the rules for their sizes."""
    event = b"x" * 171
    for size in (b"ab", b"AB", b"aB", b"0ab", b"ab;a=b", b" ab "):
        one = size + b"\r\n" + event + b"\r\n"
        assert Chunked().feed(one) == event
        assert Chunked().feed(one * 9) == event * 9
    for size in (b"0xab", b"+ab", b"a_b", b"-ab"):
        for chunk in (size + b"\r\n" + event + b"\r\n", b"1\r\na\r\n" + size + b"\r\n" + event):
            with pytest.raises(BadFraming):
                Chunked().feed(chunk)


BAD_CHUNKS = {
    "no number": b"hello\r\n",
    "empty line": b"\r\n",
    "only an extension": b";a\r\n",
    "negative": b"-5\r\nhello\r\n",
    "plus sign": b"+5\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "underscore": b"1_0\r\n",
    "two numbers": b"5 5\r\n",
    "absurdly large": b"1" * 16 + b"\r\n",
    "a letter no hex digit has": b"5g\r\n",
    "longer than it said": b"5\r\nhello world\r\n",
    "a line that does not end": b"1" * (MAX_LINE + 1),
    "an extension that does not end": b"5;" + b"a" * MAX_LINE,
    "a trailer that does not end": b"0\r\n" + b"a" * (MAX_LINE + 1),
    "an extension that ends too late": b"5;" + b"a" * MAX_LINE + b"\r\nhello\r\n",
}


@pytest.mark.parametrize("raw", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_are_a_fault(raw: bytes) -> None:
    """What breaks the rules for chunks raises BadFraming, in one piece and in many."""
    with pytest.raises(BadFraming):
        body_of(Chunked(), [raw])
    with pytest.raises(BadFraming):
        body_of(Chunked(), [raw[i : i + 100] for i in range(0, len(raw), 100)])


@pytest.mark.parametrize("pieces", [[b"5\r\nhello", b"1\r\nx\r\n"], [b"1\r\nxyz", b"0\r\n\r\n"]])
def test_a_chunk_without_its_line_end_is_a_fault(pieces: list[bytes]) -> None:
    """What follows a chunk's data has to be the line end, also where it looks like a chunk."""
    with pytest.raises(BadFraming):
        body_of(Chunked(), pieces)


def test_a_length_counts_its_bytes() -> None:
    """A body of a known length is finished with its last byte, at every cut."""
    for cut in range(6):
        framing = Length(5)
        assert b"hello"[:cut] == framing.feed(b"hello"[:cut])
        assert (cut == 5) == framing.finished
        assert b"hello"[cut:] == framing.feed(b"hello"[cut:])
        assert framing.finished
        assert framing.reusable


def test_a_length_of_zero_is_finished_at_once() -> None:
    """A body without bytes needs none to be complete."""
    assert Length(0).finished
    assert Length(0).reusable


def test_bytes_beyond_the_length_are_not_the_bodys() -> None:
    """What comes after the announced length is dropped, and the connection with it."""
    framing = Length(5)
    assert framing.feed(b"hello!") == b"hello"
    assert framing.finished
    assert not framing.reusable


def test_an_end_before_the_length_is_a_fault() -> None:
    """An EOF inside a body of known length raises, and says how much is missing."""
    framing = Length(5)
    framing.feed(b"he")
    with pytest.raises(BadFraming, match="3 bytes early"):
        framing.eof()


def test_until_close_takes_all_and_ends_with_the_connection() -> None:
    """A close-delimited body passes as it comes, ends with EOF, and leaves nothing to reuse."""
    framing = UntilClose()
    assert [framing.feed(b"a"), framing.feed(b"\r\n")] == [b"a", b"\r\n"]
    assert not framing.finished
    framing.eof()
    assert framing.finished
    assert not framing.reusable
