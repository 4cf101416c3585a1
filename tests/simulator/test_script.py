"""script: when an answer sends what, over real sockets."""

from __future__ import annotations

import time

import pytest

from chatstream.simulator import Simulator
from tests.conftest import eventually
from tests.simulator.client import CHAT, Answer, Client, post, raw_socket, read_all, read_until


@pytest.mark.parametrize("tokens", [1, 64, 65, 66, 700])
def test_what_is_made_at_once_is_the_same(
    client: Client, desk: Client, name: str, tokens: int
) -> None:
    """As fast as the client takes it: not a word more, less or in another place."""
    answer = client.chat(id=name, tokens=tokens, rate=0, reasoning=2)
    slow = client.chat(tokens=tokens, rate=100_000, reasoning=2)
    contents = [event["choices"] for event in answer.events()[:-1]]
    assert contents == [event["choices"] for event in slow.events()[:-1]]
    assert len(contents) == tokens + 1
    assert desk.figure(name)["delivered"] == tokens


def test_a_token_tells_when_it_was_sent(client: Client) -> None:
    """With `stamp`: the instants lie between question and answer, and apart as the rate says."""
    before = time.monotonic_ns()
    text = client.chat(tokens=4, rate=100, stamp=True).text()
    after = time.monotonic_ns()
    assert len(text) == 4 * 21
    instants = [int(stamp) for stamp in text.split("@")[1:]]
    assert [before, *instants, after] == sorted([before, *instants, after])
    assert instants[-1] - before >= 3 / 100 * 1e9


def test_every_event_is_a_chunk_of_its_own(provider: Simulator) -> None:
    """HTTP's chunks and SSE's events coincide, and the body ends with the terminal chunk."""
    with raw_socket(provider, post({"stream": True, "simulate": {"tokens": 5, "rate": 0}})) as sock:
        body = read_until(sock, b"\r\n0\r\n\r\n").partition(b"\r\n\r\n")[2]
    chunks = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]
    assert len(chunks) == 5 + 2 + 1
    assert chunks.pop() == b""
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"}\n\n") for chunk in chunks[:-1])


def test_tokens_come_at_their_rate(client: Client, desk: Client, name: str) -> None:
    """Never early, and the end at tokens/rate."""
    client.chat(id=name, tokens=50, rate=500)
    figure = desk.figure(name)
    assert figure["closed_ns"] - figure["started_ns"] >= 50 / 500 * 1e9


def test_generation_goes_on_in_silence(client: Client, desk: Client, name: str) -> None:
    """Two tokens are delivered, the clock runs through all."""
    client.begin(id=name, tokens=30, rate=1000, silent_after=2)
    eventually(lambda: desk.figure(name)["generated"] == 30, "all generated")
    figure = desk.figure(name)
    assert (figure["delivered"], figure["finished"], figure["open"]) == (2, False, True)


def test_silence_from_the_start(client: Client, desk: Client, name: str) -> None:
    """Headers come, tokens do not."""
    client.begin(id=name, silent_after=0, rate=1000)
    assert client.getresponse().status == 200
    figure = desk.figure(name, "delivered", timeout=0.03)
    assert (figure["delivered"], figure["first_token_ns"]) == (0, None)


@pytest.mark.parametrize("stream", [True, False])
def test_after_a_silence_the_backlog_comes(
    client: Client, desk: Client, name: str, stream: bool
) -> None:
    """Nothing is lost."""
    answer = client.chat(stream, id=name, tokens=20, rate=1000, silent_after=5, silent_for=0.1)
    text = answer.text() if stream else answer.json()["choices"][0]["message"]["content"]
    assert len(text.split()) == 20
    figure = desk.figure(name)
    assert figure["closed_ns"] - figure["started_ns"] >= (0.004 + 0.1) * 1e9
    assert (figure["delivered"], figure["finished"]) == (20, True)


def test_headers_may_be_late(client: Client, desk: Client, name: str) -> None:
    """The model thinks meanwhile, so its tokens are there when they come."""
    client.begin(id=name, tokens=100, rate=1000, headers_after=0.05)
    figure = desk.figure(name, "headers")
    assert figure["headers_ns"] - figure["started_ns"] >= 0.05e9
    assert figure["generated"] >= 50
    client.getresponse().read()
    figure = desk.figure(name, "closed")
    assert (figure["delivered"], figure["finished"]) == (100, True)


def test_refusal(client: Client, desk: Client, name: str) -> None:
    """Status, OpenAI's error and Retry-After; the connection stays."""
    answer = client.chat(id=name, status=429, retry_after=7, message="slow down")
    assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
    assert answer.json()["error"]["message"] == "slow down"
    figure = desk.figure(name, "closed")
    assert (figure["closed_by"], figure["generated"], figure["finished"]) == ("status", 0, False)
    assert client.chat(tokens=1, rate=0).status == 200


def test_refusal_with_somebody_elses_page(client: Client) -> None:
    """As a proxy in between would answer."""
    answer = client.chat(status=599, raw="<h1>Bad</h1>", content_type="text/html")
    assert answer == Answer(599, answer.headers, b"<h1>Bad</h1>")
    assert answer.headers["Content-Type"] == "text/html"


def test_header_overrides(client: Client) -> None:
    """For providers that redirect, compress or set cookies."""
    answer = client.chat(
        status=302, location="http://x/", set_cookie="a=b", content_encoding="gzip"
    )
    assert answer.headers["Location"] == "http://x/"
    assert answer.headers["Set-Cookie"] == "a=b"
    assert answer.headers["Content-Encoding"] == "gzip"


@pytest.mark.parametrize("stream", [True, False])
def test_reset_before_any_byte(client: Client, desk: Client, name: str, stream: bool) -> None:
    """RST instead of headers."""
    client.begin(stream, id=name, reset_after=0)
    with pytest.raises(ConnectionResetError):
        client.getresponse()
    figure = desk.figure(name, "closed")
    assert (figure["closed_by"], figure["headers_ns"]) == ("reset_after", None)


def test_reset_in_mid_answer(client: Client, desk: Client, name: str) -> None:
    """RST instead of the fourth token."""
    client.begin(id=name, reset_after=3, rate=100)
    response = client.getresponse()
    with pytest.raises(ConnectionResetError):
        response.read()
    figure = desk.figure(name, "closed")
    assert (figure["delivered"], figure["generated"]) == (3, 3)
    assert (figure["closed_by"], figure["finished"]) == ("reset_after", False)


def test_truncation(client: Client, desk: Client, name: str) -> None:
    """A clean end of the body, but not of the answer."""
    events = client.chat(id=name, truncate_after=3, rate=1000).events()
    assert len(events) == 3
    assert events[-1]["choices"][0]["finish_reason"] is None
    figure = desk.figure(name, "closed")
    assert (figure["delivered"], figure["generated"]) == (3, 3)
    assert (figure["closed_by"], figure["finished"]) == ("truncate_after", False)


@pytest.mark.parametrize(("stream", "comment"), [(True, b": keep-alive\n\n"), (False, b"\n")])
def test_a_queue(client: Client, desk: Client, name: str, stream: bool, comment: bytes) -> None:
    """Comments first; no token is made before the queue is through."""
    queue = {"queue": 0.1, "queue_interval": 0.025}
    answer = client.chat(stream, id=name, tokens=2, rate=1000, **queue)
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert answer.body.startswith(comment * 4)
    assert answer.body[4 * len(comment) :][:1] in (b"d", b"{")
    figure = desk.figure(name)
    assert figure["first_token_ns"] - figure["started_ns"] >= 0.1e9
    assert figure["headers_ns"] - figure["started_ns"] < 0.1e9


def test_nothing_is_made_in_the_queue(client: Client, desk: Client, name: str) -> None:
    """The clock starts behind it."""
    client.begin(id=name, queue=60, rate=1000)
    assert desk.figure(name, "headers")["generated"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_body_that_ends_with_the_connection(client: Client, stream: bool) -> None:
    """Neither chunks nor a length."""
    answer = client.chat(stream, tokens=3, rate=0, chunked=False)
    assert answer.headers["Connection"] == "close"
    assert not {"Transfer-Encoding", "Content-Length"} & set(answer.headers)
    assert len(answer.events()) == 5 if stream else answer.json()["usage"]


def test_http_1_0(provider: Simulator) -> None:
    """Knows no chunks."""
    request = post({"stream": True, "simulate": {"tokens": 1, "rate": 0}}, CHAT, "HTTP/1.0")
    with raw_socket(provider, request) as sock:
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_body_held_open(client: Client, desk: Client, name: str) -> None:
    """The answer is whole with [DONE]; a client that leaves then has missed nothing."""
    client.begin(id=name, tokens=2, rate=0, hold_open=60)
    response = client.getresponse()
    while b"[DONE]" not in response.readline():
        pass
    figure = eventually(lambda: (f := desk.figure(name))["finished"] and f, "finished")
    assert (figure["open"], figure["generated"]) == (True, 2)
    client.leave()
    response.close()
    figure = desk.figure(name, "closed")
    assert (figure["finished"], figure["closed_by"]) == (True, "client")


def test_a_body_held_open_ends(client: Client, desk: Client, name: str) -> None:
    """And the connection serves on."""
    client.chat(id=name, tokens=2, rate=0, hold_open=0.05)
    figure = desk.figure(name)
    assert figure["closed_ns"] - figure["started_ns"] >= 0.05e9
    assert figure["closed_by"] == "finished"
    assert client.chat(tokens=1, rate=0).status == 200


def test_raw(client: Client, desk: Client, name: str) -> None:
    """The body is what was asked for, byte by byte if need be."""
    assert client.chat(raw="data: ö\n\n", rate=0).body == "data: ö\n\n".encode()
    assert client.chat(raw="a\udcffb", rate=0).body == b"a\xffb"
    assert client.chat(raw="").body == b""
    assert client.chat(False, raw="{", content_type="x/y", rate=0).headers["Content-Type"] == "x/y"
    assert client.chat(id=name, raw="data: ö\n\n", split=1, rate=0).body == "data: ö\n\n".encode()
    figure = desk.figure(name)
    assert (figure["tokens"], figure["delivered"], figure["finished"]) == (10, 10, True)


def test_split_pieces_are_written_one_by_one(provider: Simulator) -> None:
    """Also when all are due at once."""
    body = {"stream": True, "simulate": {"raw": "abcdef", "split": 2, "rate": 0}}
    with raw_socket(provider, post(body)) as sock:
        assert read_until(sock, b"0\r\n\r\n").endswith(
            b"\r\n\r\n2\r\nab\r\n2\r\ncd\r\n2\r\nef\r\n0\r\n\r\n"
        )
