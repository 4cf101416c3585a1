"""README and the pages in docs/: every block in them is run, and does what the page says.

One test a block. What a block needs of those before it is there, also when it is run alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, blocks
from tests.docs.reader import Reader
from tests.docs.runners import run

BLOCKS = {page: blocks(page) for page in PAGES}


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(page, number, id=block.name)
        for page, found in BLOCKS.items()
        for number, block in enumerate(found)
    ],
)
def test_a_block(reads: Callable[[Path], Reader], page: Path, number: int) -> None:
    """It runs, and what it shows is what happens."""
    reader = reads(page)
    if reader.lacks:  # what the rest of the page may stand on
        pytest.skip(reader.lacks)
    while reader.done <= number:
        reader.done += 1
        try:
            run(BLOCKS[page][reader.done - 1], reader)
        except pytest.skip.Exception as skip:
            reader.lacks = str(skip)
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_written_is_used(page: Path) -> None:
    """A block that only becomes a file is run by a later one, which names it."""
    found = BLOCKS[page]
    for number, block in enumerate(found):
        if name := block.options.get("file"):
            stem = Path(name).stem
            assert any(stem in later.text for later in found[number + 1 :]), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_checked_by_the_next_block_is(page: Path) -> None:
    """Text and JSON that leave it to hidden Python have that behind them, and it looks at them."""
    found = BLOCKS[page]
    for block, following in zip_longest(found, found[1:]):
        if "checked" in block.options:
            assert following is not None, block.name
            assert following.hidden, block.name
            assert re.search(r"\b(shown|value)\b", following.text), block.name
