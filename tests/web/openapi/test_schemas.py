"""openapi.schemas: what has a form has it in the routes, too."""

from __future__ import annotations

from chatstream.stream import stream
from chatstream.web.openapi import schemas


def test_a_name_has_the_form_of_a_name() -> None:
    """The pattern in the document is the one that the routes hold names against."""
    assert f"^{stream.ID.pattern}$" == schemas.PATTERN
