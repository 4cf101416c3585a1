"""openai_models: the list, of the provider, less what may not be asked."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import requests
import responses
from werkzeug.test import TestResponse

from chatstream.settings.table import Settings
from chatstream.web import openai_models
from tests.web.chat import KEY
from tests.web.openai import (
    LIST,
    MODELS_URL,
    MakeDrop,
    assert_refused,
)


def test_the_list_is_passed_through(drop: MakeDrop, openai: responses.RequestsMock) -> None:
    """The provider's JSON as it is, asked for with the key."""
    response = drop().models()
    assert (response.status_code, response.data) == (200, LIST)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert openai.calls[0].request.headers["Authorization"] == f"Bearer {KEY}"


def test_a_head_of_the_list(drop: MakeDrop, openai: responses.RequestsMock) -> None:
    """As the GET, without the body."""
    response = drop().models("HEAD")
    assert (response.status_code, response.data) == (200, b"")


def test_models_that_may_not_be_asked_are_not_listed(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """The rest is as the provider has it, in its order and with all that it says of each."""
    models = [{"id": name, "owned_by": "ž", "n": [1.5, None]} for name in ("c", "b", "a", "bb")]
    whole = {"object": "list", "data": models, "has_more": False}
    provider.get(MODELS_URL, json=whole)
    us = drop(MODEL="a", ALLOWED_MODELS="a,b,d")
    response = us.models()
    assert response.json == {**whole, "data": models[1:3]}
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.headers["Cache-Control"] == "no-store"
    head = us.models("HEAD")
    assert (head.status_code, head.data) == (200, b"")


ODD = [
    "[]",
    "7",
    "null",
    "{}",
    '{"data": {"id": 7}}',
    '{"data": [7]}',
    '{"data": [{}]}',
    "{",
    '"data"',
]


@pytest.mark.parametrize("body", [*ODD, "[" * 200_000], ids=lambda text: text[:16])
def test_a_list_that_cannot_be_told_from_what_is_allowed(
    drop: MakeDrop, provider: responses.RequestsMock, body: str
) -> None:
    """Of another form: nothing of it is shown, and it is no fault of ours."""
    provider.get(MODELS_URL, body=body, content_type="application/json")
    us = drop(MODEL="a", ALLOWED_MODELS="a")
    assert_refused(us.models(), 502, "upstream_not_json")
    assert drop().models().text == body


NO_LISTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "key": ({"status": 403}, 502, "upstream_auth"),
    "rate": ({"status": 429, "headers": {"Retry-After": "7"}}, 429, "upstream_rate_limited"),
    "none": ({"status": 404, "json": {"error": {"message": "No."}}}, 400, "upstream_rejected"),
    "failed": ({"status": 503}, 502, "upstream_error"),
    "moved": ({"status": 302, "headers": {"Location": "/"}}, 502, "upstream_not_json"),
    "moved, in JSON": ({"status": 301, "json": {}}, 502, "upstream_not_json"),
    "a page": ({"body": "<h1>"}, 502, "upstream_not_json"),
    "late": ({"body": requests.ReadTimeout("x")}, 504, "upstream_timeout"),
    "down": ({"body": requests.ConnectTimeout("x")}, 502, "upstream_connect"),
}


@pytest.mark.parametrize(("answer", "status", "code"), NO_LISTS.values(), ids=NO_LISTS)
def test_a_list_that_is_not_to_be_had(
    drop: MakeDrop,
    provider: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
    answer: Any,
    status: int,
    code: str,
) -> None:
    """The same words as for an answer; a line in the log where it is no fault of the caller's."""
    caplog.set_level(logging.WARNING, "chatstream")
    provider.get(MODELS_URL, **answer)
    response = drop().models()
    assert_refused(response, status, code)
    assert response.headers.get("Retry-After") == ("7" if status == 429 else None)
    lines = [line.partition(" detail=")[0] for line in caplog.messages]
    assert lines == ([f"The list of models failed: {code}"] if status >= 500 else [])


def test_a_providers_sentence_tells_no_key(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """What it says of a rejected question goes on without it."""
    provider.get(MODELS_URL, status=400, json={"error": {"message": f"{KEY} is wrong"}})
    assert drop().models().json["error"]["message"] == "[key] is wrong"  # type: ignore[index]


def test_a_provider_of_another_kind_has_no_list(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """Where its address is not OpenAI's, nobody is asked, and the sentence says what to set."""
    response = drop(UPSTREAM_URL="https://provider.test/chat").models()
    assert_refused(response, 404, "no_models")
    assert "CHATSTREAM_UPSTREAM_URL" in response.text


def test_lists_do_not_hold_all_threads(
    drop: MakeDrop, openai: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that does not answer holds two; whoever else asks is told to come again."""
    us = drop()
    seen: list[TestResponse] = []

    def slow(settings: Settings) -> bytes:
        seen.append(us.models())  # another one meanwhile
        return LIST

    with monkeypatch.context() as patched:
        patched.setattr("chatstream.upstream.models.models", slow)
        seen.append(us.models())
    refused, *served = seen
    assert_refused(refused, 503, "busy")
    assert refused.headers["Retry-After"] == "1"
    assert [response.data for response in served] == [LIST] * openai_models.ASKING
    assert us.models().data == LIST
