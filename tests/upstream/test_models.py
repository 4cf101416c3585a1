"""models: the provider's list of them."""

from __future__ import annotations

import json

import pytest
import responses

from chatstream.dialects.openai_chat import sibling
from chatstream.settings.table import Settings
from chatstream.simulator import Simulator
from chatstream.upstream.models import models


@responses.activate
def test_a_type_is_written_in_any_case() -> None:
    """RFC 9110, section 8.3.1."""
    responses.get(
        "http://provider/v1/models", body="{}", content_type="Application/JSON; charset=utf-8"
    )
    assert models(Settings(upstream_url="http://provider/v1/chat/completions")) == b"{}"


def test_the_list_of_models() -> None:
    """Beside the chat's address, with its key; the rest of it is in test_openai."""
    with Simulator() as provider:
        listed = models(Settings(upstream_url=provider.url, api_key="sk-1"))
    assert json.loads(listed)["data"][0]["id"] == "simulated"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://api.deepseek.com/chat/completions", "https://api.deepseek.com/models"),
        ("http://h:1/v1/chat/completions?x=1", "http://h:1/v1/models"),
        ("http://h:1/deployments/chat", None),
        ("http://h:1/chat/completions/", None),
    ],
)
def test_the_models_are_beside_the_chat(url: str, found: str | None) -> None:
    """OpenAI's routes share what comes before them."""
    assert sibling(url, "/models") == found
