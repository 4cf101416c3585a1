"""A reader for each page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.reader import Reader


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Reader]]:
    """`reads(page)`: who reads it. One page is read at a time."""
    with contextlib.ExitStack() as stack:
        latest: list[Reader] = []

        def reads(page: Path) -> Reader:
            if not latest or latest[-1].page != page:
                stack.close()
                latest.append(Reader(page, tmp_path_factory.mktemp(page.stem)))
                stack.callback(latest[-1].close)
            return latest[-1]

        yield reads
