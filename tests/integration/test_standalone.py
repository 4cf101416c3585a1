"""The standalone service in gunicorn: open, and said to be; or closed, by tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.processes import Provider, Server
from tests.web.test_standalone import WARNING

BODY = {"messages": [{"role": "user", "content": "hi"}], "simulate": {"tokens": 2, "rate": 0}}
JSON = {"Content_Type": "application/json"}


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.close()


def serve(log: Path, provider: Provider, **environ: str) -> Server:
    return Server(log, app="wsgi:app", CHATSTREAM_UPSTREAM_URL=provider.url, **environ)


def asked(server: Server, **headers: str) -> tuple[int, bytes]:
    return server.ask("POST", "/api/chat/stream", json.dumps(BODY).encode(), **JSON, **headers)


def test_an_open_service(provider: Provider, tmp_path: Path) -> None:
    """Anybody's question is answered, and its log says what that means, once for all workers."""
    more = {"CHATSTREAM_TOKNES": "tok-1", "WEB_CONCURRENCY": "3"}
    server = serve(tmp_path / "log", provider, **more)
    try:
        status, body = asked(server)
        assert (status, body[-14:]) == (200, b"data: [DONE]\n\n")
        eventually(lambda: server.log().count("Booting worker") == 3, "all workers")
        assert server.log().count(WARNING) == 1
        assert server.log().count("Did you mean CHATSTREAM_TOKENS?") == 1
    finally:
        server.stop()
    assert server.errors() == []


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_a_closed_service(provider: Provider, tmp_path: Path, worker_class: str) -> None:
    """What holds nothing of anybody is served; all else asks for a token, which is not logged."""
    tokens = {"CHATSTREAM_TOKENS": "ann:tok-1", "CHATSTREAM_ADMIN_TOKENS": "tok-2"}
    more = {"CHATSTREAM_WORKER_CLASS": worker_class, "CHATSTREAM_METER": "1"}
    server = serve(tmp_path / "log", provider, **tokens, **more)
    try:
        for path in ("/", "/api/chat/page.js", "/api/chat/chatstream.js", "/api/chat/openapi.json"):
            assert server.get(path)[0] == 200
        for path in ("/v1/models", "/api/chat/meter/s"):
            assert server.get(path)[0] == 401
            assert server.ask("GET", path, Authorization="Bearer tok-1")[0] == 200
        for token, status in (("tok-1", 200), ("tok-2", 200), ("tok-3", 401), ("", 401)):
            assert asked(server, Authorization=f"Bearer {token}")[0] == status
            cancel = server.ask("POST", "/api/chat/cancel/s", Authorization=f"Bearer {token}")
            assert cancel[0] == (404 if status == 200 else 401)
        assert asked(server)[0] == 401
        assert WARNING not in server.log()
        assert "tok-" not in server.log()
    finally:
        server.stop()
    assert server.errors() == []


def test_tokens_that_are_none_end_the_start(tmp_path: Path) -> None:
    """With a sentence, in which nothing of them is."""
    with pytest.raises(RuntimeError, match="CHATSTREAM_TOKENS must be tokens") as caught:
        Server(tmp_path / "log", app="wsgi:app", CHATSTREAM_TOKENS="a:b:tok-1")
    assert "tok-1" not in str(caught.value)
