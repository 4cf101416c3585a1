"""A service, a provider that answers, one that does not yet, and the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import responses

from chatstream import (
    Service,
)
from chatstream.settings.table import Settings
from tests.service.wiring import (
    DONE,
    EVENT,
    KEY,
    URL,
    Gate,
)


@pytest.fixture
def service(nothing_left: None) -> Iterator[Callable[..., Service]]:
    """Makes a Service; settings by name."""
    made: list[Service] = []

    def make(**settings: Any) -> Service:
        defaults: dict[str, Any] = {"upstream_url": URL, "api_key": KEY, "max_streams": 8}
        made.append(Service(Settings(**{**defaults, **settings})))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def provider() -> Iterator[responses.RequestsMock]:
    """A provider that answers with one event and `[DONE]`."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.post(URL, body=EVENT + DONE, content_type="text/event-stream")
        yield mock


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.add_callback("POST", URL, callback=gate, content_type="text/event-stream")
        yield gate
        gate.go_on.set()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The package's log so far, from INFO up."""
    caplog.set_level(logging.INFO, "chatstream")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "chatstream"]
