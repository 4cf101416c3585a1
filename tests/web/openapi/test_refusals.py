"""openapi.refusals: its codes are those of the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import chatstream
from chatstream import errors
from chatstream.web.openapi import refusals
from tests.web.openapi.scenes import (
    CANCELS,
    COMPLETED,
    ENDED,
    ITS,
    LISTED,
    LIVING,
    READY,
    STREAMS,
    reasons,
)


def written(package: Path) -> Iterator[tuple[int, str]]:
    """Status and code of each error that is made in the package, as it is written there."""
    for path in package.rglob("*.py"):
        if path.parent.name in ("simulator", "openapi"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield from made_by(node)


def made_by(call: ast.Call) -> Iterator[tuple[int, str]]:
    kind = getattr(errors, ast.unparse(call.func), None)
    if isinstance(kind, type) and issubclass(kind, errors.StreamError):
        words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        yield words.get("status") or kind.status, words.get("code") or kind.code


def test_every_error_of_the_code_is_in_it() -> None:
    """Whoever adds a code, or changes a status, has to say so here; and nothing is made up."""
    made = set(written(Path(chatstream.__file__).parent))
    made |= {(kind.status, kind.code) for kind in (errors.BusUnavailable, errors.Unconfirmed)}
    told = reasons(STREAMS["post"]) | reasons(CANCELS["post"]) | reasons(ITS["get"])
    told |= reasons(COMPLETED["post"]) | reasons(LISTED["get"])
    told |= reasons(LIVING["get"]) | reasons(ENDED["post"]) | reasons(READY["get"])
    assert told - {(404, "not_found")} == made


def test_what_comes_after_the_first_byte() -> None:
    """An error event's code is a code of the provider's or of ours that can come so late."""
    late = {reason for _, reason in reasons(STREAMS["post"]) if reason.startswith("upstream_")}
    late |= {"event_too_large", "busy", "deadline", "shutting_down"}
    assert set(refusals.AFTER) == late
    assert len(refusals.AFTER) == len(late)
