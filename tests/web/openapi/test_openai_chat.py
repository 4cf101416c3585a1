"""openapi.openai: OpenAI's routes do what it says."""

from __future__ import annotations

import json
from typing import Any

import flask
import pytest
import requests
import responses

from chatstream.stream.outcome import Cause
from tests.web.openapi.scenes import (
    CHAT,
    COMPLETED,
    COMPLETIONS,
    LISTED,
    MODELS,
    MODELS_URL,
    REFUSALS,
    Play,
    Scene,
    answered,
    app,
    assert_as_documented,
    beside_another,
    posted,
    reasons,
    stopped,
)

WHOLE = '{"choices": []}'


def in_one_piece(**answer: Any) -> Scene:
    """A good request to OpenAI's route, to which the provider answers so."""
    return answered(**{"content_type": "application/json", **answer})


def listed(**answer: Any) -> Scene:
    """A provider that has such a list of models."""

    def scene(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        provider.get(MODELS_URL, **answer)
        return app(), {}

    return scene


def named_badly(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = posted()(provider)
    return host, {**request, "headers": {"X-Stream-Id": "a b"}}


def named_as_another(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
    host, request = beside_another("t")(provider)
    return host, {**request, "headers": {"X-Session-Id": "s-1", "X-Stream-Id": "t"}}


IN_OPENAIS_WORDS: dict[tuple[int, str], Scene] = {
    **REFUSALS,
    (400, "bad_id"): named_badly,
    (400, "bad_stream"): posted({**CHAT, "stream": "yes"}),
    (409, "conflict"): named_as_another,
    (502, "upstream_not_json"): answered(body=b"data: x\n\n"),
    (502, "upstream_truncated"): in_one_piece(body="{"),
    (502, "answer_too_large"): in_one_piece(body="x" * (16 * 1024 * 1024 + 1)),
    (502, "upstream_not_stream"): answered(status=200, json={}),
}


def test_there_is_a_scene_for_each_refusal_in_openais_words() -> None:
    """As for the chat's own route."""
    others = {(405, "method_not_allowed"), (502, "upstream_idle")}
    assert set(IN_OPENAIS_WORDS) == reasons(COMPLETED["post"]) - others


@pytest.mark.parametrize(
    ("refusal", "scene"), IN_OPENAIS_WORDS.items(), ids=map(str, IN_OPENAIS_WORDS)
)
def test_each_refusal_in_openais_words_is_as_documented(
    play: Play, refusal: tuple[int, str], scene: Scene
) -> None:
    """The same status and code, in another shape; those of events where a stream is wanted."""
    if refusal[1] in ("upstream_not_stream", "event_too_large"):
        scene = streaming(scene)
    response = play(scene, COMPLETIONS)
    assert (response.status_code, response.json["error"]["code"]) == refusal  # type: ignore[index]
    assert_as_documented(COMPLETED["post"], response)


def streaming(scene: Scene) -> Scene:
    """The same, with `stream: true`."""

    def streamed(provider: responses.RequestsMock) -> tuple[flask.Flask, dict[str, Any]]:
        host, request = scene(provider)
        return host, {**request, "data": json.dumps({**CHAT, "stream": True}).encode()}

    return streamed


@pytest.mark.parametrize(
    ("scene", "status"),
    [
        (in_one_piece(body=WHOLE), 200),
        (streaming(answered(body=b"data: [DONE]\n\n")), 200),
        (stopped(Cause.CANCEL), 200),
        (in_one_piece(body='{"error": "overloaded"}'), 502),
    ],
    ids=["whole", "events", "stopped", "the provider's own error"],
)
def test_an_answer_of_openais_route_is_as_documented(play: Play, scene: Scene, status: int) -> None:
    """Of events or in one piece, or what there is in its place."""
    response = play(scene, COMPLETIONS)
    assert response.status_code == status
    assert_as_documented(COMPLETED["post"], response)


LISTS: dict[tuple[int, str | None], Scene] = {
    (200, None): listed(json={"data": []}),
    (400, "upstream_rejected"): listed(status=404),
    (401, "unauthenticated"): posted(identify=lambda: None),
    (404, "no_models"): posted(UPSTREAM_URL="https://provider.test/chat"),
    (429, "upstream_rate_limited"): listed(status=429),
    (502, "upstream_connect"): listed(body=requests.ConnectTimeout("x")),
    (502, "upstream_unreachable"): listed(body=requests.ConnectionError("x")),
    (502, "upstream_error"): listed(status=500),
    (502, "upstream_auth"): listed(status=401),
    (502, "upstream_not_json"): listed(body="<h1>"),
    (504, "upstream_timeout"): listed(body=requests.ReadTimeout("x")),
}


def test_there_is_a_scene_for_each_list() -> None:
    """Every answer in the document is brought about below, but for one of test_openai's."""
    others = {(405, "method_not_allowed"), (503, "busy")}
    assert {answer for answer in LISTS if answer[1]} == reasons(LISTED["get"]) - others


@pytest.mark.parametrize("method", ["get", "head"])
@pytest.mark.parametrize(("answer", "scene"), LISTS.items(), ids=map(str, LISTS))
def test_each_list_is_as_documented(
    play: Play, answer: tuple[int, str | None], scene: Scene, method: str
) -> None:
    """Also without a body."""
    response = play(scene, MODELS, method)
    assert response.status_code == answer[0]
    if method == "get" and answer[1]:
        assert response.json["error"]["code"] == answer[1]  # type: ignore[index]
    assert_as_documented(LISTED[method], response)
