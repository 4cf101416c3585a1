"""openapi.watching: the routes for who watches do what it says."""

from __future__ import annotations

from typing import Any

import flask
import pytest
import responses

from chatstream.errors import BusUnavailable, Unconfirmed
from tests.web.openapi.scenes import (
    ENDED,
    LIVING,
    PREFIX,
    READY,
    Play,
    Scene,
    assert_as_documented,
    beside_another,
    posted,
    reasons,
    service_of,
    unsure,
)


def of_another(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = posted()(provider)
    return host, {**request, "query_string": "owner=another"}


WATCHED: dict[tuple[str, int, str | None], Scene] = {
    ("sessions", 200, None): beside_another("u"),
    ("sessions", 401, "unauthenticated"): posted(identify=lambda: None),
    ("sessions", 403, "forbidden"): of_another,
    ("sessions", 503, "bus_unavailable"): unsure(BusUnavailable()),
    ("cancel-all", 200, None): beside_another("u"),
    ("cancel-all", 401, "unauthenticated"): posted(identify=lambda: None),
    ("cancel-all", 403, "forbidden"): of_another,
    ("cancel-all", 503, "bus_unavailable"): unsure(BusUnavailable()),
    ("cancel-all", 504, "unconfirmed"): unsure(Unconfirmed()),
}


def test_there_is_a_scene_for_each_answer_to_who_watches() -> None:
    """Every status of these two routes in the document is brought about below."""
    for name, operation in (("sessions", LIVING["get"]), ("cancel-all", ENDED["post"])):
        statuses = {str(status) for route, status, _ in WATCHED if route == name}
        assert statuses == set(operation["responses"]) - {"405"}


@pytest.mark.parametrize(("answer", "scene"), WATCHED.items(), ids=map(str, WATCHED))
def test_each_answer_to_who_watches_is_as_documented(
    play: Play, answer: tuple[str, int, str | None], scene: Scene
) -> None:
    """Each has the status, the headers and the JSON that the document gives for it."""
    name, *expected = answer
    method, operation = ("get", LIVING) if name == "sessions" else ("post", ENDED)
    response = play(scene, f"{PREFIX}/{name}", method)
    assert [response.status_code, response.json.get("reason")] == expected  # type: ignore[union-attr]
    assert_as_documented(operation[method], response)


def draining(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = posted()(provider)
    service_of(host).drain()
    return host, request


READINESS: dict[tuple[int, str | None], Scene] = {
    (200, None): posted(),
    (503, "bus_unavailable"): unsure(BusUnavailable()),
    (503, "shutting_down"): draining,
}


def test_there_is_a_scene_for_each_readiness() -> None:
    """Every reason for which a process is not ready is brought about below."""
    refused = {answer for answer in READINESS if answer[1]}
    assert refused == reasons(READY["get"]) - {(405, "method_not_allowed")}


@pytest.mark.parametrize("method", ["get", "head"])
@pytest.mark.parametrize(("answer", "scene"), READINESS.items(), ids=map(str, READINESS))
def test_each_readiness_is_as_documented(
    play: Play, answer: tuple[int, str | None], scene: Scene, method: str
) -> None:
    """Also without a body, which is how most balancers ask."""
    response = play(scene, "/readyz", method)
    assert response.status_code == answer[0]
    if method == "get":
        assert response.json.get("reason") == answer[1]  # type: ignore[union-attr]
    assert_as_documented(READY[method], response)
