"""fetch: what is asked of the provider beside streams."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import responses

from chatstream.config import Settings
from chatstream.errors import UpstreamError
from chatstream.fetch import LIMIT, Fetched, at_origin, fetch, models, sibling
from chatstream.simulator import Simulator

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


@contextlib.contextmanager
def saying(*pieces: bytes, every: float = 0) -> Iterator[str]:
    """A provider that says this to whoever asks, a piece `every` so many seconds, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):  # the client has left
                sock.recv(65536)
                for piece in pieces:
                    sock.sendall(piece)
                    time.sleep(every)  # its pace

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models"
        thread.join()


HEADS = {
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "with a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n", b"x"),
    "with neither": (b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
}


@pytest.mark.parametrize(("head", "piece"), HEADS.values(), ids=HEADS)
def test_a_trickle_is_bounded(head: bytes, piece: bytes) -> None:
    """A byte now and then puts no timeout off, whatever ends the body."""
    began = time.monotonic()
    with saying(head, *[piece] * 400, every=0.02) as url, pytest.raises(UpstreamError) as caught:
        fetch(url, connect=0.1, timeout=0.1)
    assert caught.value.code == "upstream_timeout"
    assert time.monotonic() - began < 4  # all of it takes eight seconds


def test_an_answer_that_breaks_off() -> None:
    """A list that is not whole is none."""
    head, piece = HEADS["with a length"]
    with saying(head + piece) as url, pytest.raises(UpstreamError) as caught:
        fetch(url)
    assert caught.value.code == "upstream_unreachable"


def test_silence_inside_an_answer_is_bounded() -> None:
    """As before it."""
    head, piece = HEADS["with a length"]
    with saying(head, piece, every=0.3) as url, pytest.raises(UpstreamError) as caught:
        fetch(url, timeout=0.05)
    assert caught.value.code == "upstream_timeout"


def test_the_list_of_models(provider: Simulator) -> None:
    """Beside the chat's address, with its key; the rest of it is in test_openai."""
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
