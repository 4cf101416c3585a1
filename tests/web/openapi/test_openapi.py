"""openapi: the document is valid, and has what the routes have, no less and no more."""

from __future__ import annotations

import re

import flask
import openapi_spec_validator
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from chatstream.web import openapi
from chatstream.web.page import files
from chatstream.web.tokens import CHALLENGE
from tests.web.openapi.scenes import (
    CANCEL,
    CANCELS,
    COMPLETED,
    COMPLETIONS,
    DOCUMENT,
    ENDED,
    HEALTH,
    ITS,
    ITSELF,
    LISTED,
    LIVING,
    MODELS,
    PREFIX,
    READY,
    STREAM,
    STREAMS,
    app,
    assert_as_documented,
    served,
    service_of,
)


@pytest.mark.parametrize("root", ["", "/mounted"])
def test_it_is_openapi(root: str) -> None:
    """By the specification's own rules, and its schemas by JSON Schema's."""
    for prefix in (None, "/", "/v1"):
        document = openapi.document(
            "/x/y", max_body=1, root=root, openai_prefix=prefix, health=prefix
        )
        openapi_spec_validator.validate(document)


def test_it_has_the_routes_and_no_others() -> None:
    """Each path is a route of the app's, and each route is in it (`/cancel` alone is a 404).

    The browser's module, a file, is none.
    """
    rules = {rule.rule for rule in app().url_map.iter_rules()} - {"/static/<path:filename>"}
    named = {re.sub(r"<[^>]*>", "{sessionId}", rule) for rule in rules}
    others = {f"{PREFIX}/{name}" for name in ("cancel", *files.MODULE)}
    assert named - others == set(DOCUMENT["paths"])


# Where the service asks for a token

TOKENS = {"TOKENS": "ann:t-1"}
CLOSED = openapi.document(
    PREFIX, max_body=500, openai_prefix="/v1", health="/", challenge=CHALLENGE
)


def test_a_token_that_is_asked_for_is_in_it() -> None:
    """By the specification's rules; not where there is none, or an app's `identify`."""
    openapi_spec_validator.validate(CLOSED)
    assert served(app(**TOKENS).test_client()) == CLOSED
    assert (
        served(app().test_client()) == served(app(identify=lambda: "x").test_client()) == DOCUMENT
    )
    assert not {"security", "securitySchemes"} & {*DOCUMENT, *DOCUMENT["components"]}
    assert CLOSED["components"]["securitySchemes"] == {
        "token": {"type": "http", "scheme": "bearer"}
    }


def test_which_routes_ask_for_a_token() -> None:
    """Those, and no others, refuse who has none; with the header that the document has."""
    client = app(**TOKENS).test_client()
    asking = set()
    for path, operations in CLOSED["paths"].items():
        for method, operation in operations.items():
            response = client.open(path.format(sessionId="s-1"), method=method.upper())
            if operation.get("security", CLOSED["security"]):
                asking.add((path, method))
                assert response.status_code == 401
                assert_as_documented(operation, response)
                assert response.headers["WWW-Authenticate"] == CHALLENGE
            else:
                assert response.status_code in (200, 204)
    posts = (STREAM, f"{PREFIX}/cancel/{{sessionId}}", f"{PREFIX}/cancel-all", COMPLETIONS)
    reads = {(path, way) for path in (f"{PREFIX}/sessions", MODELS) for way in ("get", "head")}
    assert asking == {(path, "post") for path in posts} | reads


# It is served


def test_it_is_served_under_the_prefix() -> None:
    """It knows where the routes are and how long a body may be."""
    client = app(URL_PREFIX="/ai", MAX_BODY=77, OPENAI_PREFIX="off", HEALTH="off").test_client()
    document = served(client, "/ai/openapi.json")
    assert document == openapi.document("/ai", max_body=77)
    names = ("stream", "cancel/{sessionId}", "openapi.json", "sessions", "cancel-all")
    assert list(document["paths"]) == [f"/ai/{name}" for name in names]
    assert "77" in document["paths"]["/ai/stream"]["post"]["requestBody"]["description"]


def test_it_knows_where_its_app_is_mounted() -> None:
    """Behind a dispatcher the paths stay, and the server's address says what stands before."""
    both = Client(DispatcherMiddleware(flask.Flask("front"), {"/one": app()}))
    assert served(both, f"/one{ITSELF}")["servers"] == [{"url": "/one"}]
    assert served(app().test_client())["servers"] == [{"url": "/"}]


def test_it_asks_for_no_name_and_tells_none() -> None:
    """`identify` is not called, and nothing of the settings but the bound of a body is told."""
    named: list[None] = []
    host = app(identify=lambda: named.append(None), MODEL="house-model", API_KEY="sk-secret")
    text = host.test_client().get(ITSELF).text
    assert named == []
    assert not re.search("house-model|sk-secret|provider.test", text)


def test_it_opens_nothing() -> None:
    """Reading it starts nothing that is a stream's."""
    host = app()
    served(host.test_client())
    assert service_of(host)._started == 0


# Its methods

PATHS = {
    STREAM: STREAMS,
    CANCEL: CANCELS,
    ITSELF: ITS,
    COMPLETIONS: COMPLETED,
    MODELS: LISTED,
    f"{PREFIX}/sessions": LIVING,
    f"{PREFIX}/cancel-all": ENDED,
    "/healthz": HEALTH,
    "/readyz": READY,
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_as_documented(path: str, method: str) -> None:
    """A method that the document has is served; any other is the 405, with what is allowed."""
    operations = PATHS[path]
    response = app().test_client().open(path, method=method)
    if method.lower() in operations:
        assert response.status_code != 405
        assert_as_documented(operations[method.lower()], response)
    else:
        assert response.status_code == 405
        assert set(response.headers["Allow"].split(", ")) == {name.upper() for name in operations}
        if method != "HEAD":
            assert_as_documented(next(iter(operations.values())), response)
