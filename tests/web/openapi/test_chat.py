"""openapi.chat: the chat's own routes do what it says."""

from __future__ import annotations

import contextlib
from typing import Any

import flask
import pytest
import responses

from chatstream.errors import BusUnavailable, Unconfirmed
from chatstream.simulator import Simulator
from chatstream.stream.outcome import Cause
from tests.web.openapi.scenes import (
    CANCEL,
    CANCELS,
    CHAT,
    REFUSALS,
    STREAM,
    STREAMS,
    Play,
    Scene,
    assert_as_documented,
    beside_another,
    posted,
    reasons,
    stopped,
    unsure,
)


def test_there_is_a_scene_for_each_refusal() -> None:
    """Every refusal in the document is brought about below, two of them by tests of their own."""
    others = {(405, "method_not_allowed"), (502, "upstream_idle")}
    assert set(REFUSALS) == reasons(STREAMS["post"]) - others


@pytest.mark.parametrize(("refusal", "scene"), REFUSALS.items(), ids=map(str, REFUSALS))
def test_each_refusal_is_as_documented(play: Play, refusal: tuple[int, str], scene: Scene) -> None:
    """Each has the status, the headers and the JSON that the document gives for it."""
    response = play(scene, STREAM)
    assert (response.status_code, response.json["reason"]) == refusal  # type: ignore[index]
    assert_as_documented(STREAMS["post"], response)


@pytest.mark.parametrize(
    ("scene", "body"),
    [(posted(), b"data: [DONE]\n\n"), (stopped(Cause.CANCEL), b"")],
    ids=["whole", "stopped"],
)
def test_an_answer_is_as_documented(play: Play, scene: Scene, body: bytes) -> None:
    """Its four headers, and an event stream; also where a stop came first."""
    response = play(scene, STREAM)
    assert (response.status_code, response.data) == (200, body)
    assert_as_documented(STREAMS["post"], response)


def test_silence_is_as_documented(play: Play) -> None:
    """Headers, and then nothing for too long: as no byte was sent, the status can still say so."""
    settings = {"UPSTREAM_IDLE_TIMEOUT": "0.05", "PING_INTERVAL": "60"}
    with contextlib.closing(Simulator().start()) as simulator:

        def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
            provider.add_passthru(simulator.url)
            body = {**CHAT, "simulate": {"silent_after": 0}}
            return posted(body, UPSTREAM_URL=simulator.url, **settings)(provider)

        response = play(scene, STREAM)
        assert (response.status_code, response.json["reason"]) == (502, "upstream_idle")  # type: ignore[index]
        assert_as_documented(STREAMS["post"], response)


CANCELLED: dict[tuple[int, str | None], Scene] = {
    (200, None): beside_another("u"),
    (401, "unauthenticated"): posted(identify=lambda: None),
    (404, "not_found"): posted(),
    (503, "bus_unavailable"): unsure(BusUnavailable()),
    (504, "unconfirmed"): unsure(Unconfirmed()),
}


def test_there_is_a_scene_for_each_answer_to_a_cancel() -> None:
    """Every status of the cancel route in the document is brought about below."""
    statuses = {str(status) for status, _ in CANCELLED}
    assert statuses == set(CANCELS["post"]["responses"]) - {"405"}


@pytest.mark.parametrize(("answer", "scene"), CANCELLED.items(), ids=map(str, CANCELLED))
def test_each_answer_to_a_cancel_is_as_documented(
    play: Play, answer: tuple[int, str | None], scene: Scene
) -> None:
    """Each has the status, the headers and the JSON that the document gives for it."""
    response = play(scene, CANCEL)
    assert (response.status_code, response.json.get("reason")) == answer  # type: ignore[union-attr]
    assert_as_documented(CANCELS["post"], response)
