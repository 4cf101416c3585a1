"""exchange: a request and its response, walked and detached: hooks, endings, connections.

The worker is a real one, in a thread instead of a process.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, request
from gunicorn.config import Config
from gunicorn.glogging import Logger

from chatstream import ChatStream
from chatstream.service.service import Service
from chatstream.simulator import Simulator
from chatstream.stream.sides import Detachable, Exchange
from chatstream.workers import draining, server
from chatstream.workers.gthread import ThreadWorker
from tests.conftest import eventually
from tests.integration.client import Client

WSGI = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Log(Logger):  # type: ignore[misc]
    """What is logged, noted."""

    def __init__(self, cfg: Config, seen: list[tuple[str, Any]]) -> None:
        super().__init__(cfg)
        self._seen = seen

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        self._seen.append(("access", (resp.status, resp.sent)))

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        self._seen.append(("exception", msg % args if args else msg))

    def error(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        self._seen.append(("exception", msg))


class Pool(ThreadPoolExecutor):
    """Threads, of which it is known how many are at work."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._lock = threading.Lock()
        self.at_work = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(self._counted, fn, *args, **kwargs)

    def _counted(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self.at_work += 1
        try:
            return fn(*args, **kwargs)
        finally:
            with self._lock:
                self.at_work -= 1


class Worker(ThreadWorker):  # type: ignore[misc]
    """One in a thread. What it has done to each request is in `seen`."""

    def __init__(self, app: WSGI, **settings: Any) -> None:
        self.seen: list[tuple[str, Any]] = []
        cfg = Config()
        hooks = {
            "pre_request": lambda worker, req: self.seen.append(("pre_request", req.path)),
            "post_request": lambda worker, req, environ, resp: self.seen.append(
                ("post_request", req.path)
            ),
        }
        for key, value in {"threads": 8, "graceful_timeout": 5, **hooks, **settings}.items():
            cfg.set(key, value)
        self.listener = socket.create_server(("127.0.0.1", 0))
        super().__init__(0, os.getppid(), [self.listener], None, 30, cfg, Log(cfg, self.seen))
        self.wsgi = app
        self.port: int = self.listener.getsockname()[1]
        self._thread = threading.Thread(target=self.run)

    def start(self) -> None:
        self.tpool = Pool(self.cfg.threads)
        self.poller = selectors.DefaultSelector()
        self.method_queue.init()
        self._thread.start()

    def stop(self) -> None:
        if self.alive:
            self.alive = False
            self.method_queue.defer(lambda: None)
        self._thread.join(20)
        assert self.nr_conns == 0
        self.tmp.close()

    def done(self) -> list[str]:
        """What was done so far, in its order."""
        return [name for name, _ in self.seen]


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulator]:
    with contextlib.closing(Simulator().start()) as simulator:
        yield simulator


class Site:
    """An app with chatstream in a worker, and clients of it."""

    def __init__(self, worker: Worker, service: Service | None) -> None:
        self.worker = worker
        self.service = service
        self.clients: list[Client] = []

    def client(self) -> Client:
        self.clients.append(Client(self.worker.port))
        return self.clients[-1]

    def stream(self, session: str = "s", **simulate: Any) -> Client:
        """A client that has asked for a stream."""
        return self.client().post(session, simulate=simulate)


@pytest.fixture
def site(
    nothing_left: None, provider: Simulator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Site]]:
    """Makes a site; of `app`, or of one with chatstream in it and `wrap` around it."""
    made: list[Site] = []

    def make(
        app: WSGI | None = None,
        *,
        detach: bool = True,
        wrap: Callable[[WSGI], WSGI] = lambda app: app,
        extend: Callable[[Flask], object] = lambda app: None,
        chat: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Site:
        service: Service | None = None
        if app is None:
            flask = Flask("site")
            flask.config["CHATSTREAM_UPSTREAM_URL"] = provider.url
            flask.config["CHATSTREAM_DETACH"] = detach
            flask.config["CHATSTREAM_BUS"] = "local"
            flask.config.update(chat or {})
            ChatStream(flask)
            service = flask.extensions["chatstream"]
            extend(flask)
            app = wrap(flask.wsgi_app)
        worker = Worker(app, **settings)
        monkeypatch.setattr(server, "gunicorn_worker", lambda: worker)
        monkeypatch.setattr(draining, "services", lambda: [service] if service else [])
        worker.start()
        made.append(Site(worker, service))
        return made[-1]

    yield make
    for one in made:
        for client in one.clients:
            client.close()
        one.worker.stop()
        if one.service is not None:
            one.service.stop()


MakeSite = Callable[..., Site]

both = pytest.mark.parametrize("detach", [True, False], ids=["detached", "walked"])


# Whether it is detached at all


def test_a_detached_stream_holds_no_thread(site: MakeSite) -> None:
    """With a few threads there are many more streams, all of which get their events."""
    there = site(threads=5)
    clients = [there.stream(f"s-{n}", rate=100, tokens=3, silent_after=2) for n in range(20)]
    for client in clients:
        client.until(b'"content"')
    assert there.service is not None
    assert len(there.service.registry.live()) == 20
    eventually(lambda: there.worker.tpool.at_work == 0, "idle threads")
    for n, client in enumerate(clients):
        assert there.service.abort(f"s-{n}")
        client.head()
        client.body()


def test_a_walked_stream_holds_its_thread(site: MakeSite) -> None:
    """As ever: that is what the above is measured by."""
    there = site(detach=False, threads=8)
    clients = [there.stream(f"s-{n}", silent_after=1, rate=100) for n in range(3)]
    for client in clients:
        client.until(b'"content"')
    assert there.worker.tpool.at_work == 3


class Wrapper:
    """What a middleware puts around a response to see its end."""

    def __init__(self, wrapped: Any, ends: list[str]) -> None:
        self._wrapped = wrapped
        self._ends = ends

    def __iter__(self) -> Iterator[bytes]:
        for data in self._wrapped:
            self._ends.append("data")
            yield data

    def close(self) -> None:
        self._wrapped.close()
        self._ends.append("close")


class Proxy(Wrapper):
    """One that passes itself off as what it wraps: isinstance says so, and it has its methods."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


@pytest.mark.parametrize("kind", [Wrapper, Proxy])
def test_a_middleware_that_wraps_the_iterable_sees_it_all(
    site: MakeSite, caplog: pytest.LogCaptureFixture, kind: type[Wrapper]
) -> None:
    """Each piece and the end, as without detaching; one line says what that costs."""
    ends: list[str] = []

    def wrap(app: WSGI) -> WSGI:
        return lambda environ, start_response: kind(app(environ, start_response), ends)  # type: ignore[return-value]

    there = site(wrap=wrap)
    for n in range(2):
        client = there.stream(f"s-{n}", tokens=3, rate=100)
        client.head()
        assert client.body().endswith(b"data: [DONE]\n\n")
        eventually(lambda n=n: ends.count("close") == n + 1, "its close")  # type: ignore[misc]
    assert ends.count("data") >= 6
    lines = [line for line in caplog.messages if "middleware" in line]
    assert len(lines) == 1
    assert "4 at a time" in lines[0]


def test_a_walk_beyond_the_threads_is_busy(site: MakeSite) -> None:
    """A middleware makes streams keep threads; those for cancels they do not get."""
    there = site(wrap=lambda app: lambda e, s: Wrapper(app(e, s), []), threads=6)  # type: ignore[arg-type,return-value]
    begun = [there.stream(f"s-{n}", silent_after=1, rate=100) for n in range(2)]
    for client in begun:
        client.until(b'"content"')
    refused = [there.stream(f"t-{n}") for n in range(6)]
    for client in refused:
        status, headers = client.head()
        assert status == 503
        assert headers["retry-after"] == "1"
        assert b'"busy"' in client.exactly(int(headers["content-length"]))
    assert there.client().ask("POST", "/api/chat/cancel/s-1")[0] == 200
    begun[1].head()
    begun[1].body()
    eventually(lambda: there.service and len(there.service.registry) == 1, "its slot")
    next_one = there.stream("u", tokens=1, rate=100)
    assert next_one.head()[0] == 200


class Reluctant(Detachable):
    """An answer that could be detached, and is not."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.closed = 0

    def detach(self, exchange: Exchange) -> bool:
        assert exchange.sock.gettimeout() == 0
        if self._error is not None:
            raise self._error
        return False

    def __iter__(self) -> Iterator[bytes]:
        yield b"x" * 1_000_000  # more than a socket that does not wait takes
        yield b"end"

    def close(self) -> None:
        self.closed += 1


def test_what_need_not_be_detached_is_walked(site: MakeSite) -> None:
    """As if it had not been asked: the whole of it, from a socket that waits for the client."""
    answer = Reluctant()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return answer

    client = site(app).client()
    client.sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    client.head()
    assert client.body() == b"x" * 1_000_000 + b"end"
    eventually(lambda: answer.closed == 1)


def test_a_detach_that_fails(site: MakeSite) -> None:
    """It is the app's fault as any before its headers: 500, logged; and it is closed."""
    answer = Reluctant(ZeroDivisionError())

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return answer

    there = site(app)
    client = there.client()
    client.sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.head()[0] == 500
    eventually(lambda: "post_request" in there.worker.done())
    assert answer.closed == 1


# The hooks


def noting(ends: list[str]) -> Callable[[Flask], object]:
    """Has an app note when its responses end."""

    def extend(app: Flask) -> None:
        @app.after_request
        def note(response: Response) -> Response:
            response.call_on_close(lambda: ends.append("close"))
            return response

    return extend


@both
@pytest.mark.parametrize("way", ["completed", "cancel", "close", "reset", "refused"])
def test_hooks_run_once_and_at_the_true_end(site: MakeSite, detach: bool, way: str) -> None:
    """pre_request at the beginning; the access log, `close` and post_request when all is sent."""
    ends: list[str] = []
    there = site(detach=detach, extend=noting(ends))
    worker, service = there.worker, there.service
    assert service is not None
    simulate = {
        "completed": {"rate": 20, "tokens": 6},
        "refused": {"status": 429, "headers_after": 0.2},
    }.get(way, {"rate": 20, "tokens": 5000})
    client = there.stream("s", **simulate)
    if way != "refused":
        client.until(b'"content"')
    else:
        eventually(lambda: service.registry.find("", "s"), "the stream")
    assert (worker.done(), ends) == (["pre_request"], [])
    if way == "cancel":
        assert service.abort("s")
    if way in ("close", "reset"):
        getattr(client, way)()
    elif way == "refused":
        assert client.head()[0] == 429
    else:
        client.head()
        body = client.body()
    eventually(lambda: "post_request" in worker.done(), "post_request")
    assert worker.done() == ["pre_request", "access", "post_request"]
    assert ends == ["close"]
    status, sent = worker.seen[1][1]
    assert status.startswith("429" if way == "refused" else "200")
    if way in ("completed", "cancel"):
        assert sent == len(body)
    assert len(service.registry) == 0


def test_ends_at_the_same_time(site: MakeSite) -> None:
    """Each in the context of its own request: one that is entered cannot be entered again."""
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who")
    together = threading.Barrier(4, timeout=10)
    seen: list[tuple[str, str]] = []

    def close(name: str) -> None:
        together.wait()
        seen.append((name, who.get()))

    def extend(app: Flask) -> None:
        @app.after_request
        def note(response: Response) -> Response:
            who.set(request.headers["X-Who"])
            response.call_on_close(partial(close, request.headers["X-Who"]))
            return response

    there = site(extend=extend)
    clients = [
        there.client().post(name, headers={"X-Who": name}, simulate={"tokens": 1, "rate": 100})
        for name in "abcd"
    ]
    for client in clients:
        client.head()
        client.body()
    eventually(lambda: there.worker.done().count("post_request") == 4)
    assert sorted(seen) == [(name, name) for name in "abcd"]
    assert "exception" not in there.worker.done()


@both
def test_a_hook_that_fails(site: MakeSite, detach: bool) -> None:
    """It is logged, and that is all: the connection goes on."""

    def broken(worker: Any, req: Any, environ: Any, resp: Any) -> None:
        raise ZeroDivisionError

    there = site(detach=detach, post_request=broken)
    client = there.client()
    for n in range(2):
        client.post(f"s-{n}", simulate={"tokens": 1, "rate": 100})
        assert client.head()[0] == 200
        client.body()
    eventually(lambda: there.worker.done().count("exception") == 2)
    assert there.worker.seen[-1] == ("exception", "Exception in post_request hook")


@both
def test_a_close_that_fails(site: MakeSite, detach: bool) -> None:
    """The app's own `call_on_close`: logged; the slot is free, the client has its answer."""

    def extend(app: Flask) -> None:
        @app.after_request
        def broken(response: Response) -> Response:
            response.call_on_close(lambda: 1 / 0)
            return response

    there = site(detach=detach, extend=extend)
    client = there.stream("s", tokens=1, rate=100)
    client.head()
    assert client.body().endswith(b"data: [DONE]\n\n")
    eventually(lambda: "post_request" in there.worker.done())
    assert there.worker.done().count("exception") == 1
    assert there.service is not None
    assert len(there.service.registry) == 0


# Other answers than streams


def plain(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """As its path says."""
    path = environ["PATH_INFO"]
    if path == "/before":
        raise ZeroDivisionError
    if path == "/file":
        file = open(__file__, "rb")  # noqa: SIM115 - it is the server's to close
        length = str(os.path.getsize(__file__))
        start_response("200 OK", [("Content-Length", length)])
        return environ["wsgi.file_wrapper"](file)  # type: ignore[no-any-return]
    start_response("200 OK", [("Content-Type", "text/plain")])
    if path == "/after":
        return _breaking_off()
    if path == "/exit":
        return _breaking_off(SystemExit)
    return [b"plain"]


def _breaking_off(error: type[BaseException] = ZeroDivisionError) -> Iterator[bytes]:
    yield b"some"
    raise error


def asked(client: Client, path: str) -> Client:
    client.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    return client


def test_a_file(site: MakeSite) -> None:
    """The server's own wrapper sends it, and closes it."""
    client = asked(site(plain).client(), "/file")
    _, headers = client.head()
    assert client.exactly(int(headers["content-length"])) == Path(__file__).read_bytes()
    asked(client, "/").head()
    assert client.body() == b"plain", "the connection goes on"


def test_an_app_that_fails_before_its_headers(site: MakeSite) -> None:
    """500, and the hooks as with any answer."""
    there = site(plain)
    assert asked(there.client(), "/before").head()[0] == 500
    eventually(lambda: "post_request" in there.worker.done())
    assert there.worker.done().count("exception") == 1


@pytest.mark.parametrize("path", ["/after", "/exit"])
def test_an_app_that_fails_after_its_headers(site: MakeSite, path: str) -> None:
    """The client sees that it broke off: no end of the chunks, and the connection closes."""
    there = site(plain)
    client = asked(there.client(), path)
    assert client.head()[0] == 200
    assert client.to_the_end() == b"4\r\nsome\r\n"
    eventually(lambda: "post_request" in there.worker.done())
    assert there.worker.done() == ["pre_request", "access", "exception", "post_request"]


# The connection


@both
def test_it_serves_the_next_request(site: MakeSite, detach: bool) -> None:
    """A stream, another page, a refusal, a stream: over one connection, each with its end."""
    there = site(detach=detach)
    client = there.client()
    for n in range(2):
        client.post(f"s-{n}", simulate={"tokens": 3, "rate": 100})
        _, headers = client.head()
        assert headers["connection"] == "keep-alive"
        assert client.body().endswith(b"data: [DONE]\n\n")
        assert client.ask("GET", "/nowhere")[0] == 404
        client.post(f"t-{n}", simulate={"status": 500})
        status, headers = client.head()
        assert status == 502
        client.exactly(int(headers["content-length"]))
    assert there.worker.nr_conns == 1


@both
@pytest.mark.parametrize("together", [True, False])
def test_a_request_that_comes_during_the_stream(
    site: MakeSite, detach: bool, together: bool
) -> None:
    """It waits for the stream's end, and is answered then: what came with the first one, too."""
    there = site(detach=detach)
    client = there.client()
    get = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    get = get.replace(b"/openapi", b"/api/chat/openapi")
    chat = {
        "messages": [{"role": "user", "content": "hello"}],
        "sessionId": "s",
        "simulate": {"rate": 30, "tokens": 6},
    }
    data = json.dumps(chat).encode()
    head = b"POST /api/chat/stream HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    post = head + b"Content-Length: %d\r\n\r\n" % len(data) + data
    client.sock.sendall(post + get if together else post)
    assert client.head()[0] == 200
    client.until(b'"content"')
    if not together:
        client.sock.sendall(get)
    # `body` keeps what comes after the chunks' end out of its sight: by hand, then.
    client.until(b"0\r\n\r\nHTTP/1.1 200 OK")
    rest = client.exactly(len(client._buffer)).partition(b"0\r\n\r\n")
    assert rest[0].rstrip().endswith(b"data: [DONE]")


@both
@pytest.mark.parametrize("how", ["HTTP/1.0", "no keepalive"])
def test_the_end_of_the_connection_is_the_bodys(site: MakeSite, detach: bool, how: str) -> None:
    """nginx's default towards us; and a worker that keeps no connection."""
    there = site(detach=detach, **({"keepalive": 0} if how == "no keepalive" else {}))
    client = there.client()
    http = "1.0" if how == "HTTP/1.0" else "1.1"
    client.post("s", http=http, simulate={"tokens": 3, "rate": 100})
    _, headers = client.head()
    assert headers["connection"] == "close"
    if http == "1.0":
        assert "transfer-encoding" not in headers
        assert client.to_the_end().endswith(b"data: [DONE]\n\n")
    else:
        assert client.body().endswith(b"data: [DONE]\n\n")
        assert client.to_the_end() == b""
    client.close()
    eventually(lambda: there.worker.nr_conns == 0, "the connection's end")


@both
def test_max_requests(site: MakeSite, detach: bool) -> None:
    """Streams are requests: the last one is whole, and its connection is not kept."""
    there = site(detach=detach, max_requests=3, max_requests_jitter=0)
    client = there.client()
    seen = []
    for n in range(3):
        client.post(f"s-{n}", simulate={"tokens": 10, "rate": 50})
        _, headers = client.head()
        seen.append(headers["connection"])
        assert client.body().endswith(b"data: [DONE]\n\n")
    assert seen == ["keep-alive", "keep-alive", "close"]
    assert not there.worker.alive
    assert client.to_the_end() == b""


@both
def test_connections_are_counted_while_they_stream(site: MakeSite, detach: bool) -> None:
    """`worker_connections` bounds them, whoever moves what is on them."""
    there = site(detach=detach, threads=12, chat={"CHATSTREAM_MAX_STREAMS": 8})
    worker = there.worker
    clients = [there.stream(f"s-{n}", silent_after=1, rate=100) for n in range(4)]
    for client in clients:
        client.until(b'"content"')
    assert worker.nr_conns == 4
    worker.worker_connections = 4
    eventually(lambda: not worker._accepting, "the end of accepting")
    clients[0].close()
    eventually(lambda: worker._accepting, "room again")
    assert worker.nr_conns == 3


@both
def test_a_start_response_that_fails(site: MakeSite, detach: bool) -> None:
    """A middleware's: 500, logged once; its slot is free, the worker and other streams go on."""

    def wrap(app: WSGI) -> WSGI:
        def wrapped(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            def broken(*args: Any) -> Any:
                raise ZeroDivisionError

            return app(environ, broken if environ.get("HTTP_X_BREAK") else start_response)

        return wrapped

    there = site(detach=detach, wrap=wrap)
    assert there.service is not None
    other = there.stream("other", silent_after=1, rate=100)
    other.until(b'"content"')
    client = there.client()
    client.post("s", headers={"X-Break": "1"}, simulate={"tokens": 5, "rate": 100})
    assert client.head()[0] == 500
    eventually(lambda: there.worker.done().count("post_request") == 1, "its end")
    assert there.worker.done().count("exception") == 1
    eventually(lambda: len(there.service.registry) == 1, "its slot")  # type: ignore[union-attr]
    assert there.service.abort("other")
    other.head()
    other.body()


def test_a_worker_that_is_told_of_the_end_drains_what_is_detached(site: MakeSite) -> None:
    """It waits for streams that hold no thread as for those that do."""
    there = site(chat={"CHATSTREAM_DRAIN": 0.5})
    clients = [there.stream(f"s-{n}", silent_after=1, rate=100) for n in range(3)]
    for client in clients:
        client.until(b'"content"')
    there.worker.alive = False
    there.worker.method_queue.defer(lambda: None)
    for client in clients:
        client.head()
        assert b'"shutting_down"' in client.body()
        assert client.to_the_end() == b""
