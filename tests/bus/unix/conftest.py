"""Other processes, for what the kernel keeps for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.bus.peer import Peer

MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer() -> Iterator[MakePeer]:
    """Makes a process that has done these lines. None outlives its test."""
    made: list[Peer] = []

    def make(*lines: str) -> Peer:
        made.append(Peer(*lines))
        return made[-1]

    yield make
    for one in made:
        one.kill()
