"""sse: bytes to whole events, events to bytes. A table for each rule; no I/O."""

from __future__ import annotations

import itertools
import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.dialects import sse
from chatstream.dialects.base import Kind
from chatstream.dialects.openai_chat import classify
from chatstream.dialects.sse import BOM, Splitter, error_event

MIXED = b": hi\r\ndata: a\n\nevent: x\rdata: b\r\rdata: c\r\ndata: d\r\n\r\n"


def fed(*pieces: bytes, max_event: int = sse.MAX_EVENT) -> list[bytes]:
    splitter = Splitter(max_event)
    return [block for piece in pieces for block in splitter.feed(piece)]


def dispatched(data: bytes) -> list[tuple[str, str]]:
    """What a browser's EventSource would dispatch: the standard's rules, written out plainly."""
    events, name, lines = [], "", []
    for line in re.split(rb"\r\n|\n|\r", data)[:-1]:
        field, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode(errors="replace")
        if not line:
            if lines:
                events.append((name, "\n".join(lines)))
            name, lines = "", []
        elif field == b"event":
            name = text
        elif field == b"data":
            lines.append(text)
    return events


STREAMS = {
    "LF": (b"data: a\n\ndata: b\ndata: c\n\n", [("", "a"), ("", "b\nc")]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\ndata: c\r\n\r\n", [("", "a"), ("", "b\nc")]),
    "CR": (b"data: a\r\rdata: b\rdata: c\r\r", [("", "a"), ("", "b\nc")]),
    "mixed": (MIXED, [("", "a"), ("x", "b"), ("", "c\nd")]),
    "multi-byte text": (
        "data: žluť 漢字 🙂\n\ndata: é\n\n".encode(),
        [("", "žluť 漢字 🙂"), ("", "é")],
    ),
    "blank lines": (b"\n\n\ndata: a\n\n\n\ndata: b\n\n", [("", "a"), ("", "b")]),
    "CRLF then LF": (b"data: a\r\n\r\ndata: b\n\n", [("", "a"), ("", "b")]),
    "CR then LF": (b"data: a\r\rdata: b\n\n", [("", "a"), ("", "b")]),
    "a byte order mark": (BOM + b"data: a\n\ndata: b\n\n", [("", "a"), ("", "b")]),
    "a mark before CRLF": (BOM + b"\r\n\r\ndata: a\r\n\r\n", [("", "a")]),
    "a mark that is none": (b"data: a\n\n" + BOM + b"data: b\n\n", [("", "a")]),
    "two marks": (BOM + BOM + b"data: a\n\ndata: b\n\n", [("", "b")]),
    "CR then CRLF": (b"data: a\r\r\ndata: b\r\r\n: c\n\n", [("", "a"), ("", "b")]),
}
streams = pytest.mark.parametrize(("data", "events"), STREAMS.values(), ids=STREAMS)


@streams
def test_the_reference_parser_reads_the_table(data: bytes, events: list[tuple[str, str]]) -> None:
    """The events listed beside each stream are those of an EventSource."""
    assert events == dispatched(data.removeprefix(BOM))


@streams
def test_a_cut_at_any_byte_changes_nothing(data: bytes, events: list[tuple[str, str]]) -> None:
    """A stream cut in two anywhere gives the same bytes, and block by block the same events."""
    for cut in range(len(data) + 1):
        blocks = fed(data[:cut], data[cut:])
        assert data == b"".join(blocks), cut
        assert events == [event for block in blocks for event in dispatched(block)], cut


@streams
def test_byte_by_byte_changes_nothing(data: bytes, events: list[tuple[str, str]]) -> None:
    """A stream that arrives one byte at a time gives the same bytes and the same events."""
    blocks = fed(*(data[i : i + 1] for i in range(len(data))))
    assert data == b"".join(blocks)
    assert events == [event for block in blocks for event in dispatched(block)]


@pytest.mark.parametrize("name", sorted(STREAMS.keys() - {"CR then CRLF"}))
def test_every_pair_of_cuts_gives_the_same_blocks(name: str) -> None:
    """Where no CR stands before a CRLF, the very blocks do not depend on the cuts."""
    data, _ = STREAMS[name]
    whole = fed(data)
    for a, b in itertools.combinations(range(len(data) + 1), 2):
        assert whole == fed(data[:a], data[a:b], data[b:]), (a, b)


def test_each_block_is_one_event() -> None:
    """Two events in one read are two blocks, each with the empty line that ends it."""
    assert fed(b"data: a\n\n: c\r\n\r\ndata: b\r\rdata: tail\n") == [
        b"data: a\n\n",
        b": c\r\n\r\n",
        b"data: b\r\r",
    ]


def test_a_byte_order_mark_comes_with_the_first_block() -> None:
    """Not before it: till then the client can still be told with a status that all went wrong."""
    splitter = Splitter()
    assert splitter.feed(BOM) == splitter.feed(b"data: a\n") == []
    assert splitter.feed(b"\n" + BOM + b"\n\n") == [BOM, b"data: a\n\n", BOM + b"\n\n"]


line_ends_and_text = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"data: x", b"data", b":", b"event: e", b"\xc3", b"a", BOM]
    ),
    max_size=24,
).map(b"".join)


@settings(max_examples=400, deadline=None, database=None)
@given(
    data=st.one_of(line_ends_and_text, st.binary(max_size=40)), cuts=st.lists(st.integers(0, 60))
)
def test_any_bytes_cut_anywhere(data: bytes, cuts: list[int]) -> None:
    """Blocks joined are the input less a tail in which no event has ended, whatever the cuts."""
    blocks = fed(*pieces_of(data, cuts))
    joined = b"".join(blocks)
    half_crlf = re.search(rb"\n\r\Z", data) is not None
    assert data.startswith(joined)
    assert dispatched(data[:-1] if half_crlf else data) == dispatched(joined)
    if b"\r\r\n" not in data:  # where the LF may come alone, and then begins the next block
        assert fed(data) == blocks


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data`, cut there."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def taken(pieces: list[bytes], max_event: int) -> tuple[list[bytes], bool]:
    """The blocks and the overflow; nothing more is fed after one. What is kept never exceeds it."""
    splitter, blocks = Splitter(max_event), []
    for piece in pieces:
        blocks += splitter.feed(piece)
        if splitter.overflow:
            break
        assert len(splitter._buffer) <= max_event
    return blocks, splitter.overflow


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(
    data=st.one_of(line_ends_and_text, st.binary(max_size=40)),
    cuts=st.lists(st.integers(0, 60)),
    max_event=st.integers(1, 24),
)
def test_any_bytes_with_any_bound(data: bytes, cuts: list[int], max_event: int) -> None:
    """Which event is too long does not depend on the cuts, and no more than the bound is kept."""
    blocks, overflow = taken(pieces_of(data, cuts), max_event)
    assert data.startswith(b"".join(blocks))
    assert all(len(block) <= max_event for block in blocks)
    if b"\r\r\n" not in data:  # where the LF may come alone, and then begins the next block
        assert (blocks, overflow) == taken([data], max_event)
        assert (blocks, overflow) == taken([data[i : i + 1] for i in range(len(data))], max_event)
        unbounded = fed(data)
        assert blocks == unbounded[: len(blocks)]
        assert overflow or blocks == unbounded


@pytest.mark.parametrize("piece", [b"x" * 65_536, b"data: x\n" * 8_192, b"x\r" * 999])
def test_an_endless_event_takes_no_more_memory_than_the_bound(piece: bytes) -> None:
    """16 MiB of an event that does not end: what is kept is the bound and a read, at most twice."""
    splitter, reads = Splitter(), 0
    tracemalloc.start()
    try:
        while not splitter.overflow and reads * len(piece) < 16 * 1024 * 1024:
            splitter.feed(piece)
            reads += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert splitter.overflow
    assert sse.MAX_EVENT < reads * len(piece) <= sse.MAX_EVENT + len(piece)
    assert peak < 2 * (sse.MAX_EVENT + len(piece))


@pytest.mark.parametrize(
    ("pieces", "after_each"),
    [
        ([b"data: a\r\r"], [[b"data: a\r\r"]]),
        ([b"data: a\r", b"\r"], [[], [b"data: a\r\r"]]),
        ([b"data: a\n", b"\n"], [[], [b"data: a\n\n"]]),
        ([b"data: a\r\n\r", b"\n"], [[], [b"data: a\r\n\r\n"]]),
        ([b"data: a\n\r", b"\n"], [[], [b"data: a\n\r\n"]]),
        ([b"data: a\r\n\r", b"data: b"], [[], [b"data: a\r\n\r"]]),
        ([b"data: a\r\r", b"\ndata: b\r\r"], [[b"data: a\r\r"], [b"\ndata: b\r\r"]]),
    ],
    ids=["CR at once", "CR CR", "LF LF", "CRLF cut", "LF CRLF cut", "CRLF CR text", "late LF"],
)
def test_an_event_is_handed_over_when_it_ends(
    pieces: list[bytes], after_each: list[list[bytes]]
) -> None:
    """An event of CR lines does not wait for the next; one of CRLF lines waits for its last LF."""
    splitter = Splitter()
    assert after_each == [splitter.feed(piece) for piece in pieces]


def test_an_event_of_the_greatest_size_passes() -> None:
    """An event of exactly 1 MiB, in reads of 64 KiB, comes out whole."""
    event = b"data: " + b"x" * (sse.MAX_EVENT - 8) + b"\n\n"
    splitter = Splitter()
    pieces = [event[i : i + 65536] for i in range(0, len(event), 65536)]
    assert event == b"".join(block for piece in pieces for block in splitter.feed(piece))
    assert not splitter.overflow


@pytest.mark.parametrize("step", [1, 7, 11, 64])
def test_an_event_one_byte_too_long_overflows(step: int) -> None:
    """One byte more than the bound is an overflow, however it is cut; nothing of it comes out."""
    event = b"data: 789\n\n"
    pieces = [event[i : i + step] for i in range(0, len(event), step)]
    fits, tight = Splitter(len(event)), Splitter(len(event) - 1)
    assert [event] == [block for piece in pieces for block in fits.feed(piece)]
    assert [block for piece in pieces for block in tight.feed(piece)] == []
    assert (fits.overflow, tight.overflow) == (False, True)


def test_events_before_the_overflow_come_out() -> None:
    """What ended before the event that is too long is still returned; what follows is not."""
    splitter = Splitter(10)
    assert splitter.feed(b"data: a\n\ndata: too long\n\ndata: b\n\n") == [b"data: a\n\n"]
    assert splitter.overflow


def test_an_endless_event_is_noticed_at_the_bound() -> None:
    """An event that never ends overflows with the first byte over the bound, not later."""
    splitter = Splitter(1000)
    for _ in range(10):
        assert splitter.feed(b"x" * 100) == []
    assert not splitter.overflow
    splitter.feed(b"x")
    assert splitter.overflow


def test_what_has_been_handed_over_is_not_kept() -> None:
    """16 MiB of events, fed in pieces, take a fraction of a MiB of memory."""
    splitter, piece, total = Splitter(), b"data: " + b"x" * 4000 + b"\n\n: c\n\ndata: half", 0
    tracemalloc.start()
    try:
        for _ in range(4096):
            total += sum(map(len, splitter.feed(piece)))
            splitter.feed(b"\n\n")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 15 * 1024 * 1024
    assert peak < 256 * 1024


@pytest.mark.parametrize(
    "message", ["Too slow.", 'Two\nlines, "quoted" \\', "žluť 漢字 🙂", "\r\r data: [DONE]"]
)
def test_an_error_event_says_what_it_was_given(message: str) -> None:
    """An error event is one block, is known as an error, and its JSON holds the three words."""
    block = error_event(message, "upstream_idle", "upstream_error")
    [(name, data)] = dispatched(block)
    assert [block] == fed(block)
    assert Kind.ERROR is classify(block)
    assert name == "error"
    assert {
        "error": {"message": message, "type": "upstream_error", "code": "upstream_idle"}
    } == json.loads(data)


def test_a_ping_is_a_comment_and_whole() -> None:
    """A ping ends with its own empty line and dispatches nothing in a browser."""
    assert fed(sse.PING) == [sse.PING]
    assert dispatched(sse.PING) == []
