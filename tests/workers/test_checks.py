"""checks: what is looked at before the first worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chatstream.workers import checks, slots
from chatstream.workers.checks import check_descriptors, check_gunicorn, supported

CONFIG = {"protocol": "http", "http_protocols": "h1", "proxy_protocol": "off"}


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"proxy_protocol": False}, True),
        ({"proxy_protocol": "auto"}, False),
        ({"proxy_protocol": True}, False),
        ({"protocol": "uwsgi"}, False),
        ({"http_protocols": "h2,h1"}, False),
        ({"http_protocols": ["h2", "h1"]}, False),
    ],
)
def test_the_protocols_that_are_known(changes: dict[str, Any], known: bool) -> None:
    """All others are gunicorn's own to receive."""
    assert supported(SimpleNamespace(**{**CONFIG, **changes})) == known


@pytest.mark.parametrize(("there", "good"), [("27.0.1", True), ("100.0", True), ("26.2.0", False)])
def test_an_older_gunicorn_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: str, good: bool
) -> None:
    """With a sentence, before a worker is made; its own workers serve with any."""
    monkeypatch.setattr(checks, "version", lambda name: there)
    if good:
        check_gunicorn()
        return
    with pytest.raises(SystemExit, match=f"gunicorn 27 or newer, and this is {there}"):
        check_gunicorn()


@pytest.mark.parametrize("wanted", ["1", "100", "", "many", "-5", "1e9"])
def test_enough_descriptors(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """Nothing to say; also of what is no number, which the app refuses with a better sentence."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    monkeypatch.setenv("CHATSTREAM_MAX_STREAMS", wanted)
    check_descriptors()
    monkeypatch.delenv("CHATSTREAM_MAX_STREAMS")  # the slots follow the limit then
    check_descriptors()


def test_too_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn does not start, with a sentence: later, it would be 503s and lost connections."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    monkeypatch.setenv("CHATSTREAM_MAX_STREAMS", "10000")
    with pytest.raises(SystemExit, match=r"needs 50256 descriptors.*may have 1024.*at most 153"):
        check_descriptors()
