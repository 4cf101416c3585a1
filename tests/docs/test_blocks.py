"""README and the pages in docs/: every block in them is run, and does what the page says.

One test a block. What a block needs of those before it is there, also when it is run alone.
What a test does that no reader sees stands in tests/docs/pages (see `blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, UNSEEN, parts
from tests.docs.reader import Reader
from tests.docs.runners import run

PARTS = {page: parts(page) for page in PAGES}


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(page, number, id=f"{page.name}:{part.name}")
        for page, found in PARTS.items()
        for number, part in enumerate(found)
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
            for step in PARTS[page][reader.done - 1].steps:
                run(step, reader)
        except pytest.skip.Exception as skip:
            reader.lacks = str(skip)
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_written_is_used(page: Path) -> None:
    """A block that only becomes a file is run by a later one, which names it."""
    steps = [step for part in PARTS[page] for step in part.steps]
    for number, step in enumerate(steps):
        if name := step.options.get("file"):
            stem = Path(name).stem
            assert any(stem in later.text for later in steps[number + 1 :]), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_its_reader_sees(page: Path) -> None:
    """No comments in its text: what is for the tests has its own files."""
    assert "<!--" not in page.read_text()


def test_nothing_is_said_of_no_page() -> None:
    """Each file in tests/docs/pages is of a page."""
    assert {file.name for file in UNSEEN.iterdir()} <= {page.name for page in PAGES}
