"""slots: how many streams a process can hold. Tables."""

from __future__ import annotations

import re
import resource

import pytest

from chatstream.workers import slots
from chatstream.workers.slots import MOST, Slots


@pytest.mark.parametrize(
    ("threads", "streams"),
    [(1, 1), (4, 1), (5, 1), (8, 4), (16, 12), (32, 28), (64, 56), (256, 224)],
)
def test_threads_that_may_be_kept(threads: int, streams: int) -> None:
    """An eighth of them, and at least four, are for cancels; but one stream there is always."""
    assert slots.of_threads(threads) == streams


@pytest.mark.parametrize(
    ("connections", "streams"), [(1, 1), (32, 1), (33, 1), (100, 68), (1000, 968)]
)
def test_connections_that_may_carry_a_stream(connections: int, streams: int) -> None:
    """A few are left for what else is asked of a worker."""
    assert slots.of_connections(connections) == streams


@pytest.mark.parametrize(
    ("limit", "streams"), [(3, 1), (256, 1), (1024, 153), (4096, 768), (65536, 13056)]
)
def test_descriptors_that_are_enough(limit: int, streams: int) -> None:
    """Five for each stream, while its provider is called; the rest is the process's own."""
    assert slots.of_descriptors(limit) == streams


def test_the_limit_is_the_processs_own() -> None:
    """The soft one: that is what EMFILE goes by."""
    assert slots.limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(
    ("limit", "connections", "threads", "wanted", "expected"),
    [
        (1 << 20, 100_000, 16, None, Slots(MOST, 12)),
        (4096, 100_000, 16, None, Slots(768, 12)),
        (1 << 20, 1000, 16, None, Slots(968, 12)),
        (1 << 20, 100_000, 256, None, Slots(MOST, 224)),
        (1024, 1000, 256, None, Slots(153, 153)),
        (1024, 1000, 16, 5000, Slots(5000, 12)),  # said to be so: it is warned of
        (1 << 20, 100_000, 16, 4, Slots(4, 4)),
    ],
)
def test_where_the_loop_moves_the_streams(
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    connections: int,
    threads: int,
    wanted: int | None,
    expected: Slots,
) -> None:
    """The least of what each limit allows; of those, as many may keep threads as there are."""
    monkeypatch.setattr(slots, "limit", lambda: limit)
    assert slots.detached(connections, slots.of_threads(threads), wanted) == expected


def test_too_many_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed, what there is, and what to do; and what it advises is not too much."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    sentence = slots.too_many(1000)
    assert "CHATSTREAM_MAX_STREAMS=1000 needs 5256 descriptors" in sentence
    assert "1024" in sentence
    assert "ulimit -n" in sentence
    most = int(re.search(r"at most (\d+)", sentence)[1])  # type: ignore[index]
    assert [slots.too_many(wanted) for wanted in (0, 1, most)] == [""] * 3
    assert slots.too_many(most + 1) != ""


@pytest.mark.parametrize(
    ("greenlets", "detaches", "wanted", "found"),
    [
        (False, True, None, Slots(768, 12)),
        (False, False, None, Slots(12, 12)),
        (True, True, None, Slots(968, 968)),
        (True, False, None, Slots(968, 968)),
        (False, True, 8, Slots(8, 8)),
        (False, False, 40, Slots(40, 40)),
        (True, True, 40, Slots(40, 40)),
    ],
)
def test_the_slots_of_a_server(
    greenlets: bool, detaches: bool, wanted: int | None, found: Slots
) -> None:
    """Sixteen threads, a thousand connections, 4,096 descriptors: by worker, and what was asked."""
    assert found == slots.of_server(
        16, 1000, greenlets=greenlets, detaches=detaches, wanted=wanted, descriptors=4096
    )


def test_the_descriptors_of_a_server_are_this_processs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it is said that they are another's."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    assert slots.of_server(16, 1000, greenlets=False, detaches=True).all == 153
