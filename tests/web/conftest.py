"""The apps that these tests ask, and the provider that those ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flask
import pytest
import responses

from tests.web.chat import DONE, EVENT, URL, Chat
from tests.web.desk import Desk
from tests.web.openai import ANSWER, LIST, MODELS_URL, Drop

Kind = TypeVar("Kind", Chat, Drop)


def making(kind: Callable[[flask.Flask, Any], Kind]) -> Iterator[Callable[..., Kind]]:
    """Makes an app: settings by name, `identify`, and `app` for one that has things already."""
    made: list[Kind] = []

    def make(
        app: flask.Flask | None = None, identify: Callable[[], Any] | None = None, **settings: Any
    ) -> Kind:
        app = app or flask.Flask("host")
        app.config.from_mapping({f"CHATSTREAM_{key}": value for key, value in settings.items()})
        made.append(kind(app, identify))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def chat() -> Iterator[Callable[..., Chat]]:
    """Makes an app with the chat's routes."""
    yield from making(Chat)


@pytest.fixture
def drop() -> Iterator[Callable[..., Drop]]:
    """Makes an app with OpenAI's routes."""
    yield from making(Drop)


@pytest.fixture
def desk(nothing_left: None) -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


@pytest.fixture
def provider() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture
def answers(provider: responses.RequestsMock) -> responses.RequestsMock:
    """A provider that answers with one event and `[DONE]`."""
    provider.post(URL, body=EVENT + DONE, content_type="text/event-stream")
    return provider


@pytest.fixture
def openai(provider: responses.RequestsMock) -> responses.RequestsMock:
    """A provider that answers in one piece, and has a list of models."""
    provider.post(URL, body=ANSWER, content_type="application/json")
    provider.get(MODELS_URL, body=LIST, content_type="application/json; charset=utf-8")
    return provider
