"""service: the wiring. A stream's whole way through one process, its slot, and its log lines."""

from __future__ import annotations

import logging
import re
import resource
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask
import pytest
import requests
import responses

from chatstream import (
    Busy,
    Cause,
    ChatStream,
    Service,
)
from chatstream.errors import RequestTimeout
from chatstream.settings.table import Settings
from chatstream.simulator import Simulator
from chatstream.sockets import native
from chatstream.stream.forms import EventStream, WholeStream
from chatstream.upstream.body import MockedBody
from chatstream.workers import server, slots
from chatstream.workers.slots import Slots
from tests.conftest import descriptors, eventually
from tests.service.test_lookout import StuckClient
from tests.service.wiring import (
    DONE,
    EVENT,
    KEY,
    PAYLOAD,
    URL,
    Gate,
    Lines,
    MakeService,
    told,
    walked,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


# In an app


def test_nothing_starts_before_the_first_stream() -> None:
    """No thread and no descriptor at init, nor for a cancel: a server may fork afterwards."""
    fds, threads = descriptors(), threading.active_count()
    app = flask.Flask("host")
    ChatStream(app)
    app.test_client().post("/api/chat/cancel/x?streamId=y")
    assert (descriptors(), threading.active_count()) == (fds, threads)


def test_a_body_that_did_not_come_is_no_fault_of_the_apps(caplog: pytest.LogCaptureFixture) -> None:
    """Our workers raise RequestTimeout where the app reads: a 408 without a traceback."""
    app = flask.Flask("uploads")
    ChatStream(app)

    @app.post("/upload")
    def upload() -> str:
        raise RequestTimeout

    assert app.test_client().post("/upload").status_code == 408
    assert caplog.records == []


# A stream


def test_a_stream_from_python(service: MakeService, provider: responses.RequestsMock) -> None:
    """`open` gives the iterable; the provider is called at its first `next`, with the payload."""
    iterable = service().open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
    stream = iterable.stream
    assert (stream.session_id, stream.stream_id, stream.owner) == ("s-1", "t-1", "me")
    assert len(provider.calls) == 0
    assert walked(iterable) == EVENT + DONE
    assert provider.calls[0].request.body == PAYLOAD


def test_a_request_is_not_kept_while_its_answer_comes(service: MakeService) -> None:
    """A chat's history may be long, and its stream too: what was sent is let go of."""
    payload = b'{"stream": true, "messages": [{"role": "user", "content": "%b"}]}' % (b"x" * 10_000)
    alone = sys.getrefcount(payload)
    with Simulator() as provider:
        iterable = service(upstream_url=provider.url).open(payload)
        next(iterable)
        eventually(lambda: sys.getrefcount(payload) == alone, "nobody else who has it")
        iterable.close()


def test_abort_finds_live_streams_only(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """True for a live stream, once; False for unknown, finished and another's."""
    us = service()
    iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
    assert us.abort("s-1") is False
    assert us.abort("s-1", "t-2", owner="me") is False
    assert us.abort("s-1", "t-1", owner="me") is True
    assert us.abort("s-1", "t-1", owner="me") is False
    assert iterable.stream.cause is Cause.CANCEL
    assert walked(iterable) == b""


def test_200_means_stopped(service: MakeService) -> None:
    """When `abort` returns True the provider's connection has been shut down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        us = service(upstream_url=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        iterable = us.open(PAYLOAD, session_id="s-1")
        walker = threading.Thread(target=walked, args=(iterable,))
        walker.start()
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(5)
            assert PAYLOAD in theirs.recv(65536) or PAYLOAD in theirs.recv(65536)
            assert us.abort("s-1") is True
            theirs.setblocking(False)
            assert theirs.recv(1) == b""
        walker.join(5)
        assert not walker.is_alive()
    eventually(lambda: len(us.registry) == 0)


@pytest.mark.parametrize("name", ["gunicorn.socket", "werkzeug.socket"])
def test_a_client_that_leaves_is_noticed_by_its_socket(
    service: MakeService, gate: Gate, lines: Lines, name: str
) -> None:
    """Case 13: gone while the provider has not answered: no byte is needed to notice."""
    us = service()
    server, client = socket.socketpair()
    iterable = us.open(PAYLOAD, session_id="s-1", environ={name: server})
    done = threading.Event()
    walker = threading.Thread(target=lambda: (walked(iterable), done.set()))
    walker.start()
    assert gate.asked.wait(5)
    client.close()
    assert done.wait(5)
    walker.join(5)
    assert iterable.stream.cause is Cause.CLIENT
    assert lines()[-1].startswith("[SSE] s-1 aborted by client/cancel cause=client phase=")
    server.close()


def test_a_client_that_left_before_the_first_next(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """Case 14: its hang-up is noticed without a `next`, and the provider is never called."""
    server, client = socket.socketpair()
    iterable = service().open(PAYLOAD, environ={"gunicorn.socket": server})
    client.close()
    eventually(lambda: iterable.stream.cause is Cause.CLIENT)
    assert walked(iterable) == b""
    assert len(provider.calls) == 0
    server.close()


def test_a_new_stream_supersedes_the_sessions_old_one(
    service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """The old one ends silently with its own cause, and does not take the new one's name."""
    us = service()
    old = us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    new = us.open(PAYLOAD, session_id="s-1", stream_id="t-2")
    assert old.stream.cause is Cause.SUPERSEDED
    assert walked(old) == b""
    assert lines()[-1].startswith("[SSE] s-1 aborted by superseded cause=superseded ")
    assert us.abort("s-1") is True
    assert new.stream.cause is Cause.CANCEL
    new.close()


def test_a_cancel_between_a_streams_end_and_its_close_is_late(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """It finds nothing, and is not kept for the next stream of the same names."""
    us = service()
    iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    assert b"".join(iterable) == EVENT + DONE
    assert us.abort("s-1", "t-1") is False
    iterable.close()
    assert us.abort("s-1", "t-1") is False
    assert walked(us.open(PAYLOAD, session_id="s-1", stream_id="t-1")) == EVENT + DONE


@pytest.mark.parametrize(
    ("settings", "code", "line"),
    [
        ({"stream_deadline": 0.1}, "deadline", "aborted by deadline cause=deadline"),
        ({"upstream_headers_timeout": 0.1}, "upstream_timeout", "failed: upstream_timeout"),
    ],
)
def test_a_time_that_is_over_before_the_headers(
    service: MakeService, gate: Gate, lines: Lines, settings: dict[str, float], code: str, line: str
) -> None:
    """CHATSTREAM_STREAM_DEADLINE, CHATSTREAM_UPSTREAM_HEADERS_TIMEOUT: a 504, and its line."""
    assert told(service(**settings).open(PAYLOAD, session_id="s-1")) == (code, 504)
    assert lines()[-1].startswith(f"[SSE] s-1 {line} phase=")


def test_a_deadline_ends_with_its_stream(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """A stream that ended in time is not touched by its deadline, and leaves no timer."""
    us = service(stream_deadline=60)
    for _ in range(200):
        assert walked(us.open(PAYLOAD)) == EVENT + DONE
    assert len(us._loop._timers) < 150


def test_an_answer_that_comes_after_the_end_is_closed(
    service: MakeService, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider answers, the stream has ended: who called it closes what came."""
    closed = threading.Event()
    monkeypatch.setattr(MockedBody, "close", lambda body: closed.set())
    us = service(ping_interval=0.02)
    iterable = us.open(PAYLOAD)
    next(iterable)
    iterable.close()
    gate.go_on.set()
    assert closed.wait(5)


def test_out_of_threads(
    service: MakeService,
    provider: responses.RequestsMock,
    monkeypatch: pytest.MonkeyPatch,
    lines: Lines,
) -> None:
    """No thread for the call is `busy`, a 503; slot and stream are given back."""
    us = service(max_streams=1)

    def exhausted(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", exhausted)
        iterable = us.open(PAYLOAD)
        assert list(iterable) == []
        assert isinstance(iterable.refusal, Busy)
        iterable.close()
    assert " failed: busy " in lines()[-1]
    assert walked(us.open(PAYLOAD)) == EVENT + DONE


@pytest.mark.parametrize("whole", [False, True])
def test_a_provider_that_quotes_our_key(service: MakeService, whole: bool) -> None:
    """Its error reaches the client without it, in events and in one piece."""
    error = f'{{"error": {{"message": "bad key {KEY}"}}}}'
    body, kind = (
        (error, "application/json") if whole else (f"data: {error}\n\n", "text/event-stream")
    )
    with responses.RequestsMock() as mock:
        mock.post(URL, body=body, content_type=kind)
        iterable = service().open(PAYLOAD, form=WholeStream if whole else EventStream)
        said = b"".join(iterable) or iterable.stream.last_words()
        iterable.close()
    assert b"bad key [key]" in said
    assert KEY.encode() not in said


# Clients that do not take what they are sent: see test_lookout


def test_clients_of_streams_that_have_ended_are_looked_at_too(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """A whole answer that nobody takes must not hold its thread."""
    us = service(send_timeout=60)
    iterable = us.open(PAYLOAD)
    assert next(iterable) == EVENT + DONE
    client = iterable.stream.client = StuckClient(stalled=True)
    us._lookout.begin(us.settings.send_timeout)
    assert client.shut
    assert client.asked == [60]
    iterable.close()


def test_clients_are_looked_at_from_the_first_one_on(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """One clock for all of them; after `stop` it begins anew."""
    us = service()
    looks: list[int] = []
    us._lookout._look = lambda: looks.append(1)  # type: ignore[method-assign]
    assert walked(us.open(PAYLOAD)) == EVENT + DONE
    assert looks == []
    for expected in (1, 2):
        for _ in range(3):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                walked(us.open(PAYLOAD, environ={"gunicorn.socket": ours}))
        assert len(looks) == expected
        us.stop()


# Slots


def test_a_slot_is_held_until_the_call_has_ended(service: MakeService, gate: Gate) -> None:
    """A stream that is over holds its slot while its call still holds a thread."""
    us = service(max_streams=1, ping_interval=0.02)
    iterable = us.open(PAYLOAD)
    assert next(iterable) == b": ping\n\n"
    iterable.close()
    with pytest.raises(Busy):
        us.open(PAYLOAD)
    gate.go_on.set()
    eventually(lambda: len(us.registry) == 0)
    us.open(PAYLOAD).close()


@pytest.mark.parametrize("end", ["walked", "closed at once", "cancelled", "failed"])
def test_a_slot_comes_back_whatever_the_end(
    service: MakeService, provider: responses.RequestsMock, end: str
) -> None:
    """Ten streams one after the other in a worker of one slot."""
    us = service(max_streams=1)
    if end == "failed":
        provider.reset()
        provider.post(URL, status=500)
    for _ in range(10):
        iterable = us.open(PAYLOAD, session_id="s-1")
        if end == "cancelled":
            assert us.abort("s-1") is True
        if end != "closed at once":
            list(iterable)
        iterable.close()
        eventually(lambda: len(us.registry) == 0)


def test_slots_where_nothing_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """Without CHATSTREAM_MAX_STREAMS there are three slots, and the log says so, once."""
    us = Service(Settings(upstream_url=URL))
    streams = [us.open(PAYLOAD) for _ in range(3)]
    with pytest.raises(Busy):
        us.open(PAYLOAD)
    for stream in streams:
        stream.close()
    said = [r.getMessage() for r in caplog.records if "CHATSTREAM_MAX_STREAMS" in r.getMessage()]
    assert len(said) == 1
    assert "3 streams at a time" in said[0]
    us.stop()


class FakeWorker:
    """A gunicorn worker, as far as slots go by it."""

    def __init__(
        self, *, detaches: bool | None, threads: int = 16, connections: int = 1000
    ) -> None:
        self.cfg = SimpleNamespace(threads=threads, worker_connections=connections)
        if detaches is not None:
            self.detaches = detaches


@pytest.mark.parametrize(
    ("detaches", "greenlets", "settings", "expected"),
    [
        (True, False, {}, Slots(968, 12)),
        (True, False, {"max_streams": 20}, Slots(20, 12)),
        (True, False, {"detach": False}, Slots(12, 12)),
        (False, False, {}, Slots(12, 12)),  # HTTP/2, say
        (None, False, {}, Slots(12, 12)),  # gunicorn's own gthread
        (None, True, {}, Slots(968, 968)),
    ],
)
def test_slots_of_a_worker(
    monkeypatch: pytest.MonkeyPatch,
    detaches: bool | None,
    greenlets: bool,
    settings: Any,
    expected: Slots,
) -> None:
    """Where the loop moves the streams, threads bound only those that keep one; see test_slots."""
    monkeypatch.setattr(server, "gunicorn_worker", lambda: FakeWorker(detaches=detaches))
    monkeypatch.setattr(native, "patched", lambda: greenlets)
    monkeypatch.setattr(slots, "limit", lambda: 100_000)
    us = Service(Settings(**{"upstream_url": URL, "max_streams": None, **settings}))
    assert us.registry.slots == expected


def test_a_worker_that_is_known_only_after_the_fork(
    provider: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With preload_app the app is made in the master: the slots are the worker's, at its first."""
    us = Service(Settings(upstream_url=URL))
    assert us.registry.slots == Slots(3, 3)
    monkeypatch.setattr(server, "gunicorn_worker", lambda: FakeWorker(detaches=True))
    monkeypatch.setattr(slots, "limit", lambda: 100_000)
    walked(us.open(PAYLOAD))
    assert us.registry.slots == Slots(968, 12)
    us.stop()


@pytest.mark.parametrize(
    ("watched", "settings"),
    [(True, {}), (False, {"stream_deadline": 5.0}), (True, {"stream_deadline": 5.0})],
    ids=["a client to watch", "a deadline", "both"],
)
def test_out_of_descriptors(
    service: MakeService, provider: responses.RequestsMock, watched: bool, settings: Any
) -> None:
    """EMFILE at any point of `open` is Busy, leaves no slot taken, and passes with the shortage."""
    us = service(max_streams=1, **settings)
    server, client = socket.socketpair()
    environ = {"gunicorn.socket": server} if watched else {}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(Busy):
            us.open(PAYLOAD, environ=environ)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    left = len(us.registry)
    answer = walked(us.open(PAYLOAD, environ=environ)) if left == 0 else b""
    server.close()
    client.close()
    assert (left, answer) == (0, EVENT + DONE)


# Streams that are walked where they need not be


@pytest.fixture
def one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that would let go of streams, with five threads: four of them are for cancels."""
    worker = FakeWorker(detaches=True, threads=5)
    monkeypatch.setattr(server, "gunicorn_worker", lambda: worker)
    monkeypatch.setattr(slots, "limit", lambda: 100_000)


def test_a_walk_beyond_the_threads_is_busy(
    one_walk: None, service: MakeService, gate: Gate
) -> None:
    """There are slots, but the thread that it would keep is a cancel's. The first one's goes on."""
    us = service(ping_interval=0.02, max_streams=None)
    first, second = us.open(PAYLOAD, session_id="s-1"), us.open(PAYLOAD, session_id="s-2")
    assert next(first) == b": ping\n\n"
    assert next(second, b"") == b""
    assert second.refusal is not None
    assert (second.refusal.code, second.refusal.status) == ("busy", 503)
    second.close()
    assert us.abort("s-1") is True
    first.close()
    gate.go_on.set()
    eventually(lambda: len(us.registry) == 0)
    third = us.open(PAYLOAD)
    assert next(third) in (EVENT + DONE, b": ping\n\n"), "its thread is free again"
    third.close()


def test_one_line_says_that_streams_are_walked(
    one_walk: None, service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """However many are: what it is about, and what it costs."""
    us = service(max_streams=None)
    for _ in range(3):
        assert walked(us.open(PAYLOAD)) == EVENT + DONE
    [line] = [line for line in lines() if "middleware" in line]
    assert "1 at a time" in line
    assert "CHATSTREAM_THREADS" in line


@pytest.mark.parametrize("detaches", [False, None])
def test_no_line_where_all_streams_are(
    service: MakeService,
    provider: responses.RequestsMock,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    detaches: bool | None,
) -> None:
    """Another server than ours walks them all, and nothing is to be said of it."""
    worker = FakeWorker(detaches=detaches)
    monkeypatch.setattr(server, "gunicorn_worker", lambda: worker)
    assert walked(service().open(PAYLOAD)) == EVENT + DONE
    assert not [line for line in lines() if "middleware" in line]


def test_detach_is_a_setting(service: MakeService, provider: responses.RequestsMock) -> None:
    """CHATSTREAM_DETACH=0: the server is told to walk."""
    for detach in (True, False):
        us = service(detach=detach)
        iterable = us.open(PAYLOAD)
        assert (iterable._loop is not None) is detach
        walked(iterable)


# The log


TERMINAL = re.compile(r"\[SSE\] \S+ (completed|aborted|failed)")
LINE = (
    r"\[SSE\] s-1 {} phase=\w+ stream=t-1 events=\d bytes=\d+ duration=\d+\.\d{{3}}s"
    r'( detail="[^"]+")?'
)


@pytest.mark.parametrize(
    ("answer", "level", "end"),
    [
        ({"body": EVENT + DONE}, "INFO", "completed"),
        (
            {"body": EVENT, "headers": {"Content-Length": "999"}},
            "WARNING",
            "failed: upstream_truncated",
        ),
        ({"body": EVENT}, "WARNING", "failed: upstream_truncated"),
        ({"body": b'data: {"error":"x"}\n\n'}, "WARNING", "failed: upstream_error"),
        ({"status": 401, "body": f"bad key {KEY}"}, "WARNING", "failed: upstream_auth"),
        (
            {"body": RuntimeError(f"in our own code, {KEY}")},
            "WARNING",
            "failed: upstream_error",
        ),
        (
            {"body": requests.ConnectTimeout(OSError(111, "Connection refused"))},
            "WARNING",
            "failed: upstream_connect",
        ),
    ],
)
def test_a_streams_lines(
    service: MakeService,
    provider: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
    answer: dict[str, Any],
    level: str,
    end: str,
) -> None:
    """Case 38: one where it starts, one where it ends, whatever its end and however often closed.

    How that one looks: see test_announcer.
    """
    caplog.set_level(logging.INFO, "chatstream")
    provider.reset()
    provider.post(URL, content_type="text/event-stream", **answer)
    iterable = service().open(PAYLOAD, session_id="s-1", stream_id="t-1")
    list(iterable)
    iterable.close()
    iterable.close()
    assert caplog.records[0].getMessage() == "[SSE] s-1 started stream=t-1"
    [last] = [record for record in caplog.records if TERMINAL.match(record.getMessage())]
    assert last.levelname == level
    assert re.fullmatch(LINE.format(end), last.getMessage())


def test_the_key_is_never_logged(
    service: MakeService, provider: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at DEBUG, not by a provider that repeats it, not in what people wrote."""
    caplog.set_level(logging.DEBUG)
    us = service()
    walked(us.open(PAYLOAD))
    for status in (400, 401, 500):
        provider.reset()
        provider.post(URL, status=status, json={"error": {"message": f"bad key {KEY}"}})
        walked(us.open(PAYLOAD))
    assert KEY not in caplog.text
    assert '"hi"' not in caplog.text


def test_a_stop_that_is_seen_as_an_error_is_no_failure(
    service: MakeService, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 16: whatever the call raises after a stop, nothing above INFO is logged."""
    caplog.set_level(logging.INFO, "chatstream")
    us = service(ping_interval=0.02)
    iterable = us.open(PAYLOAD, session_id="s-1")
    next(iterable)
    us.abort("s-1")
    gate.go_on.set()
    walked(iterable)
    eventually(lambda: len(us.registry) == 0)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert re.fullmatch(
        r"\[SSE\] s-1 aborted by client/cancel cause=cancel phase=\w+ stream=\w{32} events=0"
        r" bytes=\d+ duration=\d+\.\d{3}s stop_ms=\d+\.\d{3}",
        caplog.records[-1].getMessage(),
    )


@pytest.mark.parametrize("bus", [None, "local", "unix"])
def test_the_log_says_what_would_surprise(
    service: MakeService, lines: Lines, tmp_path: Path, bus: str | None
) -> None:
    """Once, at the first stream, of the bus that was joined: see test_advice for what."""
    us = service(bus=f"unix://{tmp_path}" if bus == "unix" else bus)
    for _ in range(2):
        environ = {"SERVER_SOFTWARE": "gunicorn/27.0.1", "wsgi.multiprocess": True}
        us.open(PAYLOAD, environ=environ).close()
    assert sum("sync worker" in line for line in lines()) == 1
    assert sum("the bus is local" in line for line in lines()) == (bus != "unix")
