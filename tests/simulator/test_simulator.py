"""The built-in provider, over real sockets."""

from __future__ import annotations

import http.client
import json
import os
import resource
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from chatstream.simulator import Simulator
from tests.conftest import PATIENCE, eventually

CHAT = "/v1/chat/completions"
LONG = 100_000  # tokens: more than any test waits for
ROOT = Path(__file__).resolve().parents[2]


class Client(http.client.HTTPConnection):
    """A client that knows the simulator's routes."""

    def __init__(self, provider: Simulator, tls: ssl.SSLContext | None = None) -> None:
        super().__init__("127.0.0.1", provider.port, timeout=PATIENCE)
        self._tls = tls

    def connect(self) -> None:
        super().connect()
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname="localhost")

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One whole exchange."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        self.request(method, path, data, headers)
        with closing(self.getresponse()) as response:
            return Answer(response.status, dict(response.getheaders()), response.read())

    def post(self, body: object) -> Answer:
        return self.ask("POST", CHAT, body)

    def chat(self, stream: bool = True, **simulate: Any) -> Answer:
        return self.post({"model": "m", "stream": stream, "simulate": simulate})

    def begin(self, stream: bool = True, **simulate: Any) -> None:
        """Sends a request, reads nothing."""
        self.request("POST", CHAT, json.dumps({"stream": stream, "simulate": simulate}))

    def figure(self, name: str, wait: str = "", **query: object) -> dict[str, Any]:
        if wait:
            query = {"timeout": PATIENCE, **query, "wait": wait}
        fields = "&".join(f"{key}={value}" for key, value in query.items())
        figure: dict[str, Any] = self.ask("GET", f"/requests/{name}?{fields}").json()
        return figure

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.ask("GET", "/stats").json()
        return stats

    def leave(self) -> None:
        """Sends a FIN. (close() would send a RST where there are bytes unread.)"""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of every event; comments left out."""
        blocks = [block for block in self.body.decode().split("\n\n") if block.startswith("data: ")]
        return [json.loads(data) if data != "[DONE]" else data for data in (b[6:] for b in blocks)]

    def text(self, field: str = "content") -> str:
        choices = [event["choices"] for event in self.events() if "choices" in event]
        return "".join(choice[0]["delta"].get(field, "") for choice in choices if choice)


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator
        with closing(Client(simulator)) as client:
            eventually(lambda: not client.stats()["connections_open"], "all connections gone")
            assert client.stats()["internal_errors"] == 0


@pytest.fixture
def desk(provider: Simulator) -> Iterator[Client]:
    """A connection that asks for figures."""
    with closing(Client(provider)) as client:
        yield client


@pytest.fixture
def client(provider: Simulator) -> Iterator[Client]:
    with closing(Client(provider)) as client:
        yield client


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An id for the test's request."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@contextmanager
def raw_socket(provider: Simulator, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", provider.port), timeout=PATIENCE) as sock:
        sock.sendall(sent)
        yield sock


def post(body: object, path: str = CHAT, version: str = "HTTP/1.1", *lines: str) -> bytes:
    """A request's bytes."""
    data = json.dumps(body).encode()
    head = [f"POST {path} {version}", "Host: x", f"Content-Length: {len(data)}", *lines, "", ""]
    return "\r\n".join(head).encode() + data


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = sock.recv(65_536)
        assert more, f"closed after {data!r}"
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65_536), b""))


# ---- the answer


def test_a_stream_has_the_shape_of_openai(client: Client) -> None:
    """Role first, one word per event, finish_reason, usage, [DONE]."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "model": "gpt-ö"}
    messages = [{"role": "user", "content": "hi"}]
    answer = client.post({**options, "messages": messages, "simulate": {"tokens": 3, "rate": 0}})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    *chunks, finish, usage, done = answer.events()
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "A "},
        {"content": "stop "},
        {"content": "button "},
    ]
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert usage["usage"]["total_tokens"] == 3 + usage["usage"]["prompt_tokens"]
    for event in (*chunks, finish, usage):
        assert event["object"] == "chat.completion.chunk"
        assert (event["id"], event["model"]) == (chunks[0]["id"], "gpt-ö")


def test_the_text_is_prose_that_goes_round(client: Client) -> None:
    """More tokens than the text has words begin it again; it is not all ASCII."""
    words = client.chat(tokens=1000, rate=0).text().split()
    assert len(words) == 1000
    period = words.index("A", words.index("looks."))
    assert words[period:] == words[: 1000 - period]
    assert period > 300
    assert "naïve" in words


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


def test_usage_only_when_asked_for(client: Client) -> None:
    """Without stream_options the events are the tokens, the finish and [DONE]."""
    assert len(client.chat(tokens=2, rate=0).events()) == 2 + 1 + 1


def test_tokens_come_at_their_rate(client: Client, desk: Client, name: str) -> None:
    """Never early, and the end at tokens/rate."""
    client.chat(id=name, tokens=50, rate=500)
    figure = desk.figure(name)
    assert figure["closed_ns"] - figure["started_ns"] >= 50 / 500 * 1e9


def test_a_whole_completion(client: Client, desk: Client, name: str) -> None:
    """Without stream one JSON, after the time that its tokens take."""
    answer = client.chat(stream=False, id=name, tokens=30, rate=300, reasoning=10)
    assert answer.headers["Content-Type"] == "application/json"
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    completion = answer.json()
    assert completion["object"] == "chat.completion"
    assert completion["usage"]["completion_tokens"] == 30
    [choice] = completion["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["message"]["content"].split()) == 20
    assert choice["message"]["reasoning_content"].startswith("A stop button ")
    figure = desk.figure(name)
    assert figure["closed_ns"] - figure["started_ns"] >= 30 / 300 * 1e9
    assert (figure["stream"], figure["delivered"], figure["finished"]) == (False, 30, True)


def test_it_says_what_it_is_given(client: Client) -> None:
    """With `text`: word by word with the space between, over and over, as any JSON text."""
    text = ' # A "title"\n\n- *žluť* 🙂\n'
    assert client.chat(tokens=6, rate=0, text=text).text() == text
    assert client.chat(tokens=9, rate=1000, text=text).text() == text + ' # A "title"\n\n'
    assert client.chat(tokens=2, rate=0, text="").text() == ""
    assert client.chat(False, tokens=6, rate=0, text=text).json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": text,
    }


def test_reasoning_comes_first(client: Client) -> None:
    """The first tokens are reasoning_content; the text is not told twice."""
    answer = client.chat(tokens=5, rate=0, reasoning=2)
    assert answer.text("reasoning_content") == "A stop "
    assert answer.text() == "button is a "


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/chat/completions", "/beta/chat/completions"]
)
def test_chat_paths(client: Client, path: str) -> None:
    """Any base address of an OpenAI client will do."""
    assert client.ask("POST", path, {"simulate": {"tokens": 1, "rate": 0}}).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", "/requests"),
        ("GET", "/"),
        ("POST", "/chat/completions/x"),
        ("X", "*"),
    ],
)
def test_other_routes_are_404(client: Client, method: str, path: str) -> None:
    """In OpenAI's error shape."""
    answer = client.ask(method, path)
    assert answer.status == 404
    assert method in answer.json()["error"]["message"]


def test_head_is_answered_without_spoiling_the_connection(client: Client) -> None:
    """The connection ends, as the JSON would be read as the next answer."""
    answer = client.ask("HEAD", "/")
    assert (answer.status, answer.headers["Connection"]) == (404, "close")


def test_models(client: Client) -> None:
    """A list with one model."""
    models = client.ask("GET", "/v1/models").json()
    assert models["object"] == "list"
    assert [model["object"] for model in models["data"]] == ["model"]


# ---- the figures


def test_the_figures_of_a_finished_request(client: Client, desk: Client, name: str) -> None:
    """Everything is told, except secrets."""
    simulate = {"id": name, "tokens": 4, "rate": 100}
    body = {"stream": True, "model": "m", "messages": []}
    client.ask("POST", CHAT, {**body, "simulate": simulate}, Authorization="Bearer key", X_A="1")
    figure = desk.figure(name, "closed")
    stamps = [figure[key] for key in ("started_ns", "headers_ns", "first_token_ns", "closed_ns")]
    assert stamps == sorted(stamps)
    assert figure["headers"]["authorization"] == "present"
    assert figure["headers"]["x_a"] == "1"
    assert "key" not in json.dumps(figure).replace("keep", "")
    expected = {
        "id": name,
        "attempt": 1,
        "path": CHAT,
        "body": body,
        "stream": True,
        "tokens": 4,
        "generated": 4,
        "delivered": 4,
        "finished": True,
        "open": False,
        "closed_by": "finished",
    }
    assert {key: figure[key] for key in expected} == expected


def test_a_running_request(client: Client, desk: Client, name: str) -> None:
    """It is open, and nothing is said of its end."""
    client.begin(id=name, tokens=LONG)
    figure = desk.figure(name, "delivered")
    assert (figure["open"], figure["finished"]) == (True, False)
    assert (figure["closed_ns"], figure["closed_by"]) == (None, None)
    assert figure["peer"] == client.sock.getsockname()[1]


def test_requests_are_named_by_number(client: Client, desk: Client) -> None:
    """req-N, when they bring no id."""
    client.chat(tokens=1, rate=0)
    assert f"req-{desk.stats()['requests']}" == desk.ask("GET", "/requests").json()[-1]["id"]


def test_connections_are_numbered(provider: Simulator, client: Client, desk: Client) -> None:
    """A reused connection shows, and so does a new one."""
    for number in (1, 2):
        client.chat(id=f"reuse-{number}", tokens=1, rate=0)
    with closing(Client(provider)) as another:
        another.chat(id="reuse-3", tokens=1, rate=0)
    first, second, third = (desk.figure(f"reuse-{number}")["connection"] for number in (1, 2, 3))
    assert first == second < third


def test_the_newest_of_an_id_is_told_and_all_are_listed(
    client: Client, desk: Client, name: str
) -> None:
    """A request that was sent twice cannot hide."""
    client.chat(id=name, tokens=1, rate=0)
    client.chat(id=name, tokens=2, rate=0)
    assert desk.figure(name)["attempt"] == 2
    figures = desk.ask("GET", "/requests").json()
    assert [figure["tokens"] for figure in figures if figure["id"] == name] == [1, 2]


def test_unknown_ids_are_404(desk: Client) -> None:
    """Also when somebody waited for them in vain."""
    for query in ("", "?wait=closed&timeout=0.01"):
        answer = desk.ask("GET", f"/requests/nobody{query}")
        assert answer.status == 404
        assert "nobody" in answer.json()["error"]["message"]


@pytest.mark.parametrize("wait", ["started", "headers", "delivered", "closed"])
def test_one_may_wait_before_the_request_comes(
    provider: Simulator, client: Client, desk: Client, name: str, wait: str
) -> None:
    """The answer comes when the request has come so far."""
    desk.request("GET", f"/requests/{name}?wait={wait}&count=3&timeout={PATIENCE}")
    with closing(Client(provider)) as other:  # asked later, answered first: so the wait is known
        assert other.ask("GET", f"/requests/{name}").status == 404
    client.chat(id=name, tokens=5, rate=0)
    with closing(desk.getresponse()) as response:
        figure = json.loads(response.read())
    reached = {
        "started": True,
        "headers": figure["headers_ns"] is not None,
        "delivered": figure["delivered"] >= 3,
        "closed": not figure["open"],
    }
    assert reached[wait]


def test_a_wait_that_times_out_tells_how_far_it_is(client: Client, desk: Client, name: str) -> None:
    """And one that can come true no more is answered at once."""
    client.begin(id=name, tokens=5, rate=0, silent_after=2)
    assert desk.figure(name, "delivered", count=3, timeout=0.02)["delivered"] == 2
    client.leave()
    assert desk.figure(name, "delivered", count=3)["closed_by"] == "client"


def test_how_many_tokens_were_made_after_an_instant(
    client: Client, desk: Client, name: str
) -> None:
    """From the plan's clock, so also for one that has passed; until the request has ended."""
    client.begin(id=name, tokens=LONG, rate=1000)
    began = desk.figure(name, "delivered", count=40)["started_ns"]
    middle = began + 20_000_000  # ns: the tokens 0 to 20 had been made
    running = desk.figure(name, after=middle)
    assert running["generated_after"] == running["generated"] - 21 > 0
    client.leave()
    figure = desk.figure(name, "closed", after=middle)
    assert figure["generated_after"] == figure["generated"] - 21
    assert desk.figure(name, after=began - 1)["generated_after"] == figure["generated"]
    assert desk.figure(name, after=figure["closed_ns"])["generated_after"] == 0
    assert desk.figure(name, after=time.monotonic_ns())["generated_after"] == 0
    assert "generated_after" not in desk.figure(name)


def test_nothing_is_made_after_the_end(client: Client, desk: Client, name: str) -> None:
    """A whole answer's last token is made when the clock says so, whoever asks later."""
    client.chat(id=name, tokens=10, rate=1000)
    ended = desk.figure(name, "closed")
    assert desk.figure(name, after=ended["closed_ns"])["generated_after"] == 0
    assert desk.figure(name, after=ended["started_ns"])["generated_after"] == 10


@pytest.mark.parametrize(
    "query",
    [
        "wait=later",
        "wait=closed&timeout=x",
        "wait=closed&count=nan",
        "after=-1",
        "after=soon",
        "wait=closed&after=1e9",
    ],
)
def test_bad_waits(desk: Client, query: str) -> None:
    """400, naming the field."""
    answer = desk.ask("GET", f"/requests/a?{query}")
    assert answer.status == 400
    assert answer.json()["error"]["param"] in query


def test_delete_forgets_the_closed(client: Client, desk: Client, name: str) -> None:
    """Running requests stay, the totals too."""
    client.chat(id=name, tokens=1, rate=0)
    client.begin(id=f"{name}-open", tokens=LONG)
    desk.figure(f"{name}-open", "started")
    before = desk.stats()
    assert desk.ask("DELETE", "/requests").json()["forgotten"] >= 1
    assert [figure["id"] for figure in desk.ask("GET", "/requests").json()] == [f"{name}-open"]
    after = desk.stats()
    assert after["requests"] == before["requests"]
    assert after["generated"] >= before["generated"]


def test_stats() -> None:
    """Connections that ask for figures are in none of the counts."""
    with Simulator() as provider, closing(Client(provider)) as desk:
        with closing(Client(provider)) as client:
            client.begin(id="a", tokens=10, rate=0, silent_after=4)
            desk.figure("a", "delivered", count=4)
            stats = desk.stats()
            assert stats.pop("cpu_seconds") > 0
            assert stats.pop("last_connection_closed_ns") is None
            assert stats == {
                "requests": 1,
                "generating": 1,
                "generated": 5,
                "delivered": 4,
                "connections_open": 1,
                "connections_total": 1,
                "handshakes_aborted": 0,
                "internal_errors": 0,
            }
        figure = desk.figure("a", "closed")
        stats = desk.stats()
        assert (stats["generating"], stats["connections_open"]) == (0, 0)
        assert stats["connections_total"] == 1
        assert stats["last_connection_closed_ns"] == figure["closed_ns"]


# ---- the close


def test_a_fin_stops_the_clock(client: Client, desk: Client, name: str) -> None:
    """The stamp lies between the close and the figure's answer; nothing is made after it."""
    client.begin(id=name, tokens=LONG, rate=1000)
    desk.figure(name, "delivered", count=3)
    before = time.monotonic_ns()
    client.leave()
    figure = desk.figure(name, "closed")
    assert before <= figure["closed_ns"] <= time.monotonic_ns()
    assert (figure["closed_by"], figure["finished"], figure["open"]) == ("client", False, False)
    elapsed_ns = figure["closed_ns"] - figure["started_ns"]
    assert figure["generated"] == int(elapsed_ns * 1000 / 1e9) + 1
    assert figure["delivered"] <= figure["generated"]
    assert figure == desk.figure(name)


def test_a_rst_stops_the_clock(client: Client, desk: Client, name: str) -> None:
    """It is told from a FIN."""
    client.begin(id=name, tokens=LONG)
    desk.figure(name, "delivered")
    before = time.monotonic_ns()
    client.reset()
    figure = desk.figure(name, "closed")
    assert before <= figure["closed_ns"] <= time.monotonic_ns()
    assert figure["closed_by"] == "reset"


@pytest.mark.parametrize(
    "scenario",
    [
        {"headers_after": 60},
        {"silent_after": 0},
        {"queue": 60, "queue_interval": 60},
        {"stream": False, "tokens": LONG},
        {"stream": False, "tokens": LONG, "queue": 60},
        {"raw": "x", "rate": 0.01},
        {"status": 500, "headers_after": 60},
        {"tokens": 0, "hold_open": 60},
    ],
    ids=str,
)
def test_a_close_is_seen_in_every_silence(
    client: Client, desk: Client, name: str, scenario: dict[str, Any]
) -> None:
    """No write is needed to notice it."""
    client.begin(id=name, **scenario)
    desk.figure(name, "started")
    client.leave()
    assert desk.figure(name, "closed")["closed_by"] == "client"


def test_a_request_that_comes_with_its_own_close_is_known(
    provider: Simulator, desk: Client, name: str
) -> None:
    """Its client left before anything was made, or all but."""
    with raw_socket(provider, post({"stream": True, "simulate": {"id": name}})) as sock:
        sock.shutdown(socket.SHUT_WR)
        figure = desk.figure(name, "closed")
    assert figure["closed_by"] == "client"
    assert figure["generated"] <= 1
    assert figure["started_ns"] <= figure["closed_ns"]


def test_half_a_request_is_none(provider: Simulator, desk: Client) -> None:
    """A client that goes while it sends leaves no trace but the stamp."""
    requests = desk.stats()["requests"]
    before = time.monotonic_ns()
    with raw_socket(provider, post({})[:-1]):
        pass
    eventually(lambda: (desk.stats()["last_connection_closed_ns"] or 0) >= before, "the close")
    assert desk.stats()["requests"] == requests


def test_many_closes_at_once_are_stamped_together(desk: Client, provider: Simulator) -> None:
    """The stamp is taken before the work that each close means."""
    names = [f"crowd-{number}" for number in range(50)]
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(Client(provider))) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.begin(id=name, tokens=LONG, headers_after=60)
        for name in names:
            desk.figure(name, "started")
        before = time.monotonic_ns()
        for client in clients:
            client.close()
        after = time.monotonic_ns()
    stamps = [desk.figure(name, "closed")["closed_ns"] for name in names]
    assert before <= min(stamps)
    assert max(stamps) - after < PATIENCE * 1e9 / 20


# ---- scenarios


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


def test_an_end_without_done(client: Client) -> None:
    """finish_reason is the last word."""
    events = client.chat(tokens=1, rate=0, no_done=True).events()
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_error_in_mid_answer(client: Client, desk: Client, name: str) -> None:
    """An error event, then a clean end."""
    *tokens, error = client.chat(id=name, error_after=2, rate=1000).events()
    assert len(tokens) == 2
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "overloaded")
    assert desk.figure(name, "closed")["closed_by"] == "error_after"


def test_a_whole_completion_can_go_wrong_too(client: Client) -> None:
    """With the error, or cut short."""
    assert client.chat(False, error_after=1, rate=0).json()["error"]["code"] == "overloaded"
    [choice] = client.chat(False, truncate_after=2, rate=0).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("A stop ", None)


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


def test_pad(client: Client) -> None:
    """Makes tokens heavy."""
    text = client.chat(tokens=3, rate=0, pad=1000).text()
    assert len(text) == len("A stop button ") + 3000


def test_defaults_of_the_server() -> None:
    """A request's own simulate comes first."""
    with (
        Simulator(defaults={"tokens": 3, "rate": 0}) as provider,
        closing(Client(provider)) as client,
    ):
        assert len(client.chat().text().split()) == 3
        assert len(client.chat(tokens=2).text().split()) == 2


def test_defaults_can_be_set_anew() -> None:
    """From the next request on, in the place of the old ones; a wrong one changes nothing."""
    with (
        Simulator(defaults={"tokens": 3, "rate": 0}) as provider,
        closing(Client(provider)) as client,
    ):
        provider.behave({"tokens": 2, "rate": 0, "text": "ho "})
        assert client.chat().text() == "ho ho "
        with pytest.raises(ValueError, match=r"simulate\.tokens"):
            provider.behave({"rate": 1, "tokens": "many"})
        assert client.chat().text() == "ho ho "
        provider.behave({"status": 429})
        assert client.chat().status == 429


@pytest.mark.parametrize("defaults", [{"nonsense": 1}, {"tokens": "many"}, {"rate": float("nan")}])
def test_bad_defaults(defaults: dict[str, Any]) -> None:
    """Fail when the server is made, and leave no socket."""
    with pytest.raises(ValueError, match=rf"simulate\.{next(iter(defaults))}"):
        Simulator(defaults=defaults)


# ---- bad input


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonsense", 1),
        ("tokens", "5"),
        ("tokens", 1.5),
        ("tokens", True),
        ("tokens", -1),
        ("tokens", None),
        ("rate", "fast"),
        ("rate", 1e9),
        ("status", 99),
        ("chunked", 1),
        ("no_done", None),
        ("id", 5),
        ("split", 0),
        ("queue_interval", 0),
        ("content_type", "a\r\nb: c"),
        ("retry_after", True),
        ("raw", "\ud800"),
        ("message", []),
    ],
)
def test_bad_scenarios(client: Client, key: str, value: object) -> None:
    """400, naming the key; the connection stays."""
    answer = client.post({"stream": True, "simulate": {key: value}})
    assert answer.status == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (f"simulate.{key}", "invalid_request_error")
    assert f"simulate.{key} " in error["message"]
    assert client.chat(tokens=1, rate=0).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"\xff",
        b'{"stream": 1}',
        b'{"simulate": 5}',
        b'{"simulate": {"tokens": 1000000, "pad": 1000}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_bad_bodies(client: Client, body: bytes) -> None:
    """400 in OpenAI's shape; the connection stays."""
    answer = client.post(body)
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.chat(tokens=1, rate=0).status == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n : x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
        (b"GET //[ HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_http(provider: Simulator, request_bytes: bytes, status: int) -> None:
    """An answer, then the end of the connection."""
    with raw_socket(provider, request_bytes) as sock:
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b'"error"' in answer


def test_a_request_in_pieces(provider: Simulator) -> None:
    """However small; an empty line before it is borne."""
    with raw_socket(provider) as sock:
        for byte in b"\r\n" + post({"simulate": {"tokens": 1, "rate": 0}}):
            sock.sendall(bytes([byte]))
        assert read_until(sock, b"}}").startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests(provider: Simulator) -> None:
    """Are answered one after the other."""
    requests = [post({"simulate": {"tokens": n, "rate": 1000}}) for n in (3, 1, 2)]
    with raw_socket(provider, b"".join(requests)) as sock:
        answers = b""
        while answers.count(b"usage") < 3:
            answers += sock.recv(65_536)
    order = [answers.index(b'"completion_tokens":%d' % n) for n in (3, 1, 2)]
    assert order == sorted(order)


def test_expect_continue(provider: Simulator) -> None:
    """curl asks before it sends a large body."""
    request = post({"simulate": {"tokens": 1, "rate": 0}}, CHAT, "HTTP/1.1", "Expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    with raw_socket(provider, head + b"\r\n\r\n") as sock:
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_until(sock, b"}}").startswith(b"HTTP/1.1 200 ")


# ---- load


def test_a_slow_reader_stops_nobody(provider: Simulator, desk: Client, name: str) -> None:
    """What it does not take is not made in advance; the clock runs on, others go on."""
    body = {
        "stream": True,
        "simulate": {"id": name, "tokens": 20_000, "rate": 200_000, "pad": 2000},
    }
    with socket.socket() as sock, closing(Client(provider)) as other:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", provider.port))
        sock.sendall(post(body))
        eventually(lambda: desk.figure(name)["generated"] == 20_000, "all generated")
        assert len(other.chat(tokens=50, rate=1000).text().split()) == 50
        figure = desk.figure(name)
        assert figure["delivered"] < 10_000
        assert (figure["open"], figure["finished"]) == (True, False)
        [slow] = [c for c in provider._connections.values() if c.number == figure["connection"]]
        assert len(slow._out) < 65_536 + 4096
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data = data[-7:] + sock.recv(1 << 20)
    figure = desk.figure(name, "closed")
    assert (figure["delivered"], figure["finished"]) == (20_000, True)


def test_two_hundred_streams(provider: Simulator, desk: Client) -> None:
    """All whole, at the same time."""
    streams, tokens = 200, 20
    names = [f"load-{number}" for number in range(streams)]
    with ExitStack() as stack, select.epoll() as poll:
        bodies = {}
        for name in names:
            simulate = {"id": name, "tokens": tokens, "rate": 40}
            sock = stack.enter_context(
                raw_socket(provider, post({"stream": True, "simulate": simulate}))
            )
            poll.register(sock, select.EPOLLIN)
            bodies[sock.fileno()] = (sock, bytearray())
        deadline = time.monotonic() + PATIENCE
        while not all(body.endswith(b"\r\n0\r\n\r\n") for _, body in bodies.values()):
            assert time.monotonic() < deadline
            for fd, _ in poll.poll(PATIENCE):
                sock, body = bodies[fd]
                body += sock.recv(65_536)
        assert {body.count(b"data: ") for _, body in bodies.values()} == {tokens + 2}
        figures = [desk.figure(name) for name in names]
    assert {figure["delivered"] for figure in figures} == {tokens}
    assert max(figure["started_ns"] for figure in figures) < min(
        figure["closed_ns"] for figure in figures
    ), "they did not overlap"


# ---- TLS


class Tls(NamedTuple):
    certfile: str
    context: ssl.SSLContext


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    authority = trustme.CA()
    certfile = tmp_path_factory.mktemp("tls") / "server.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(certfile)
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return Tls(str(certfile), context)


@pytest.fixture
def secure(tls: Tls) -> Iterator[Simulator]:
    with Simulator(certfile=tls.certfile) as simulator:
        yield simulator


def test_tls(secure: Simulator, tls: Tls) -> None:
    """The same answers, over a connection that is used again."""
    assert secure.url == f"https://127.0.0.1:{secure.port}{CHAT}"
    with closing(Client(secure, tls.context)) as client:
        for number in range(2):
            assert len(client.chat(id=f"t{number}", tokens=20, rate=1000).text().split()) == 20
        assert client.figure("t0")["connection"] == client.figure("t1")["connection"]


def test_tls_large_requests_and_slow_readers(secure: Simulator, tls: Tls) -> None:
    """More than one record each way, and more than the kernel takes at once."""
    with (
        closing(Client(secure, tls.context)) as client,
        closing(Client(secure, tls.context)) as desk,
    ):
        body = {"stream": True, "pad": "x" * 300_000}
        simulate = {"id": "big", "tokens": 10_000, "rate": 200_000, "pad": 2000}
        client.request("POST", CHAT, json.dumps({**body, "simulate": simulate}))
        desk.figure("big", "started")
        eventually(lambda: desk.figure("big")["generated"] == 10_000, "all generated")
        assert desk.figure("big")["delivered"] < 10_000
        answer = client.getresponse().read()
        assert answer.count(b"data: ") == 10_002
        assert len(desk.figure("big", "closed")["body"]["pad"]) == 300_000


@pytest.mark.parametrize("abort", [Client.leave, Client.reset])
def test_tls_close_is_seen(secure: Simulator, tls: Tls, abort: Callable[[Client], None]) -> None:
    """At once, without a write."""
    with (
        closing(Client(secure, tls.context)) as desk,
        closing(Client(secure, tls.context)) as client,
    ):
        client.begin(id="a", headers_after=60)
        desk.figure("a", "started")
        before = time.monotonic_ns()
        abort(client)
        figure = desk.figure("a", "closed")
        assert before <= figure["closed_ns"] <= time.monotonic_ns()
        assert figure["closed_by"] == ("client" if abort is Client.leave else "reset")


def test_tls_body_that_ends_with_the_connection(secure: Simulator, tls: Tls) -> None:
    """Ends with TLS's own goodbye, so that it cannot be mistaken for a cut."""
    request = post({"stream": True, "simulate": {"tokens": 1, "rate": 0, "chunked": False}})
    with raw_socket(secure) as plain:
        wrapped = tls.context.wrap_socket(
            plain, server_hostname="localhost", suppress_ragged_eofs=False
        )
        with wrapped:
            wrapped.sendall(request)
            assert read_all(wrapped).endswith(b"data: [DONE]\n\n")


def test_a_handshake_that_the_client_leaves(secure: Simulator, tls: Tls) -> None:
    """Is counted, and does no harm."""
    with closing(Client(secure, tls.context)) as desk:
        for sent in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"):
            with raw_socket(secure, sent):
                pass
        eventually(lambda: desk.stats()["handshakes_aborted"] == 3, "three counted")
        assert (desk.stats()["connections_open"], desk.stats()["internal_errors"]) == (0, 0)


def test_handshake_delay(tls: Tls) -> None:
    """The connection stands, the handshake waits; a client that goes meanwhile is noticed."""
    with Simulator(certfile=tls.certfile, handshake_delay=0.2) as provider:
        begun = time.monotonic()
        with raw_socket(provider):
            assert time.monotonic() - begun < 0.2
        with closing(Client(provider, tls.context)) as client:
            begun = time.monotonic()
            stats = client.stats()
            assert time.monotonic() - begun >= 0.2
        assert stats["handshakes_aborted"] == 1
        assert begun * 1e9 - 0.2e9 < stats["last_connection_closed_ns"] < (begun + 0.2) * 1e9


def test_a_certificate_that_cannot_be_read(tmp_path: Path) -> None:
    """Says what to look at."""
    with pytest.raises(ValueError, match="certfile"):
        Simulator(certfile=str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match="certfile"):
        Simulator(keyfile="key.pem")


# ---- life and death


def test_close_leaves_nothing_behind(tls: Tls) -> None:
    """No thread, no descriptor; clients see the end. More than once does no harm."""
    descriptors, threads = os.listdir("/proc/self/fd"), threading.enumerate()
    provider = Simulator(certfile=tls.certfile, handshake_delay=60).start()
    plain = Simulator().start()
    with raw_socket(provider), closing(Client(plain)) as client, closing(Client(plain)) as desk:
        client.begin(id="a", tokens=LONG)
        desk.figure("a", "delivered")
        for simulator in (provider, plain, plain):
            simulator.close()
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            client.getresponse().read()
    assert threading.enumerate() == threads
    assert os.listdir("/proc/self/fd") == descriptors


def test_close_without_start() -> None:
    """The port is free again."""
    simulator = Simulator()
    simulator.close()
    again = Simulator(port=simulator.port)
    again.close()


def test_serve_forever_in_a_thread_of_ones_own() -> None:
    """close() waits for it."""
    simulator = Simulator()
    thread = threading.Thread(target=simulator.serve_forever)
    thread.start()
    with closing(Client(simulator)) as client:
        assert client.stats()["requests"] == 0
    simulator.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_port_in_use(provider: Simulator) -> None:
    """Is the caller's to handle."""
    with pytest.raises(OSError, match="in use"):
        Simulator(port=provider.port)


def test_ipv6() -> None:
    """The address is written as URLs want it."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        simulator = Simulator("::1")
    except OSError:
        pytest.skip("no IPv6")
    assert simulator.url == f"http://[::1]:{simulator.port}{CHAT}"
    simulator.close()


# ---- the command line


class Command:
    """`python -m chatstream.simulator`, listening."""

    def __init__(self, *options: str, **more: Any) -> None:
        self.process = run("--port", "0", *options, **more)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode()
        self.port = int(self.line.rpartition(":")[2].split("/")[0])

    def end(self, number: int) -> tuple[int, str, str]:
        """Exit code and what was written meanwhile."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out.decode(), err.decode()


def run(*options: str, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chatstream.simulator", *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )


@contextmanager
def command(*options: str, **more: Any) -> Iterator[tuple[Command, Client]]:
    running = Command(*options, **more)
    client = Client(running)  # type: ignore[arg-type]  # it only asks for the port
    try:
        with running.process, closing(client):
            yield running, client
            running.process.kill()
    finally:
        running.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command(number: int) -> None:
    """One line when it listens, one per request; ends in peace, also in mid-stream."""
    with command("--rate", "0", "--tokens", "3", "--set", "pad=5") as (running, client):
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        assert running.line == f"chatstream simulator: listening on {url}\n"
        assert client.chat(id="a").text().count("xxxxx") == 3
        client.begin(silent_after=0)
        client.getresponse()
        code, out, err = running.end(number)
    assert (code, err) == (0, "")
    assert out.startswith("chatstream simulator: a: finished after 0.")
    assert out.endswith(" s, 3 of 3 tokens generated\n")


def test_command_quiet(tls: Tls) -> None:
    """Says nothing of requests. TLS works from here, too."""
    with command("--quiet", "--certfile", tls.certfile) as (running, _):
        with closing(Client(running, tls.context)) as client:  # type: ignore[arg-type]
            assert client.chat(tokens=1, rate=0).status == 200
        assert "listening on https://127.0.0.1:" in running.line
        assert running.end(signal.SIGTERM) == (0, "", "")


def test_command_that_nobody_listens_to() -> None:
    """A full pipe does not stop it."""
    name = "x" * 1000
    with command("--tokens", "0") as (running, client):
        for _ in range(100):
            assert client.chat(id=name).status == 200
        code, out, _ = running.end(signal.SIGTERM)
    assert code == 0
    assert 0 < out.count("\n") < 100


def test_command_out_of_descriptors() -> None:
    """Those that it has are served, the others when there is room again."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))

    with command("--quiet", preexec_fn=limit) as (running, first):
        assert first.stats()["requests"] == 0
        waiting = [
            socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)
            for _ in range(40)
        ]
        assert first.stats()["connections_open"] < 30
        for sock in waiting:
            sock.close()
        with closing(Client(running)) as later:  # type: ignore[arg-type]
            assert later.stats()["connections_total"] == 40
        assert first.stats()["internal_errors"] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--set", "tokens"], "KEY=JSON"),
        (["--set", "nonsense=1"], "simulate.nonsense"),
        (["--rate", "-1"], "simulate.rate"),
        (["--certfile", "/nowhere.pem"], "certfile"),
        (["--port", "99999"], "port"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
    ],
)
def test_command_with_bad_options(options: list[str], expected: str) -> None:
    """A sentence and exit code 2."""
    _, err = (process := run("--port", "0", *options)).communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert expected in err.decode()
    assert "Traceback" not in err.decode()


def test_command_with_a_port_in_use(provider: Simulator) -> None:
    """One clear sentence and exit code 2."""
    out, err = (process := run("--port", str(provider.port))).communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, b"")
    assert err.decode().count("\n") == 1
    assert f"127.0.0.1:{provider.port} is in use" in err.decode()
