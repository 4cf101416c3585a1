"""Fixtures for the tests of what the routes say of themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import responses
from werkzeug.test import TestResponse

from tests.web.openapi.scenes import Play, Scene, service_of


@pytest.fixture
def play() -> Iterator[Play]:
    """Plays a scene on one of the routes; then everything is given back."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as provider:
        hosts = []

        def played(scene: Scene, path: str, method: str = "post") -> TestResponse:
            host, request = scene(provider)
            hosts.append(host)
            return host.test_client().open(path, method=method.upper(), buffered=True, **request)

        yield played
        for host in hosts:
            service_of(host).stop()
