"""fetch: what is asked of the provider beside streams."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Iterator

import pytest
import responses

from chatstream.dialects.openai_chat import sibling
from chatstream.errors import UpstreamError
from chatstream.simulator import Simulator
from chatstream.upstream.fetch import LIMIT, Fetched, at_origin, fetch
from tests.conftest import PATIENCE

MODELS = "http://provider/v1/models"


@pytest.fixture
def provider() -> Iterator[Simulator]:
    simulator = Simulator().start()
    yield simulator
    simulator.close()


def test_what_is_there(provider: Simulator) -> None:
    """Status, type and body are the provider's."""
    url = sibling(provider.url, "/models")
    assert url is not None
    got = fetch(url, key="sk-1")
    assert (got.status, got.content_type) == (200, "application/json")
    assert json.loads(got.body)["data"][0]["id"] == "simulated"


def test_a_refusal_is_an_answer(provider: Simulator) -> None:
    """What a status means is for who asked."""
    assert fetch(at_origin(provider.url, "/requests/none")).status == 404


@responses.activate
@pytest.mark.parametrize(("key", "sent"), [("sk-1", "Bearer sk-1"), ("", None)])
def test_the_key_goes_where_it_is_given(key: str, sent: str | None) -> None:
    """No key, no header; nor one of a .netrc."""
    responses.get(MODELS, json={})
    assert fetch(MODELS, key=key) == Fetched(200, "application/json", b"{}")
    assert responses.calls[0].request.headers["Accept-Encoding"] == "identity"
    assert responses.calls[0].request.headers.get("Authorization") == sent


@responses.activate
def test_a_redirect_is_not_followed() -> None:
    """The key would travel."""
    responses.get(MODELS, status=302, headers={"Location": "http://elsewhere/"})
    assert fetch(MODELS, key="sk-1").status == 302
    assert len(responses.calls) == 1


@responses.activate
def test_too_much_is_an_error() -> None:
    """A list of models has a size."""
    responses.get(MODELS, body=b"x" * (LIMIT + 1))
    with pytest.raises(UpstreamError, match="too long"):
        fetch(MODELS)


def test_nobody_there() -> None:
    """A provider that is down has the same word as for streams."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(UpstreamError) as caught:
            fetch(f"http://127.0.0.1:{sock.getsockname()[1]}/v1/models")
    assert caught.value.code == "upstream_connect"


def test_silence_is_bounded() -> None:
    """A provider that takes the question and says nothing is given up."""
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UpstreamError) as caught:
        fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models", timeout=0.05)
    assert caught.value.code == "upstream_timeout"


def dripping(conversation: socket.socket) -> None:
    """A provider that sends a byte now and then, of a body with a length, until nobody listens."""
    with conversation, contextlib.suppress(OSError):
        conversation.recv(65536)
        conversation.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            conversation.sendall(b" ")
            select.select([conversation], [], [], 0.02)


def test_drops_are_bounded() -> None:
    """No silence is too long, but all of them together are."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: dripping(listener.accept()[0]))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models"
        with pytest.raises(UpstreamError) as caught:
            fetch(url, connect=0.1, timeout=0.1)
        thread.join(PATIENCE)
    assert caught.value.code == "upstream_timeout"


@responses.activate
@pytest.mark.parametrize("headers", [{"Content-Length": "9"}, {"Content-Encoding": "gzip"}])
def test_a_body_that_breaks_is_no_answer(headers: dict[str, str]) -> None:
    """Half of it, or nonsense: the provider was there, so that is not what is said."""
    responses.get(MODELS, body=b"{}", headers=headers, auto_calculate_content_length=False)
    with pytest.raises(UpstreamError) as caught:
        fetch(MODELS)
    assert caught.value.code == "upstream_truncated"
