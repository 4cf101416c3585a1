"""service: the wiring. A stream's whole way through one process, its slot, and its log lines."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask
import pytest
import requests
import responses

from chatstream import (
    BusUnavailable,
    Busy,
    Cause,
    ChatStream,
    ConfigError,
    Refused,
    Service,
    StreamError,
    StreamIterable,
    Unconfirmed,
)
from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Action, Answer, Claim, Enquiry, Name, Page, Request, Worker
from chatstream.bus.unix.directory import service_directory
from chatstream.errors import RequestTimeout, conflict, too_many
from chatstream.settings.table import Settings
from chatstream.simulator import Simulator
from chatstream.sockets import native
from chatstream.stream.forms import EventStream, WholeStream
from chatstream.upstream.body import MockedBody
from chatstream.workers import draining, server, slots
from chatstream.workers.slots import Slots
from tests.conftest import descriptors, eventually
from tests.service.test_lookout import StuckClient

URL = "https://provider.test/v1/chat"
KEY = "sk-very-secret"
PAYLOAD = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def service(nothing_left: None) -> Iterator[Callable[..., Service]]:
    """Makes a Service; settings by name."""
    made: list[Service] = []

    def make(**settings: Any) -> Service:
        defaults: dict[str, Any] = {"upstream_url": URL, "api_key": KEY, "max_streams": 8}
        made.append(Service(Settings(**{**defaults, **settings})))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def provider() -> Iterator[responses.RequestsMock]:
    """A provider that answers with one event and `[DONE]`."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.post(URL, body=EVENT + DONE, content_type="text/event-stream")
        yield mock


class OtherWorkers(Bus):
    """A bus to workers that are what a test says they are."""

    name = "fake"

    def __init__(self, service: Service) -> None:
        super().__init__(service._receive, service._lives)
        self.workers: list[Worker] | Exception = []
        self.answer: bool | Exception = False  # to a cancel of what is not here
        self.asked: list[Request] = []
        self.early: bool | BaseException = False  # to a claim
        self.on_claim: Callable[[], object] = lambda: None
        self.claims: list[tuple[Claim, bool]] = []
        self.limits: list[int | None] = []
        self.on_release: Callable[[], object] = lambda: None
        self.released: list[Claim] = []
        self.closed = 0

    def start(self) -> None:
        raise AssertionError("it was put in place")

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        self.claims.append((claim, reject))
        self.limits.append(limit)
        self.on_claim()
        if isinstance(self.early, BaseException):
            raise self.early
        return self.early

    def check(self) -> None:
        self._others()

    def release(self, claim: Claim) -> None:
        self.released.append(claim)
        self.on_release()

    def _cancel_elsewhere(self, request: Request) -> bool:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def _here(self) -> Worker:
        return Worker("here", os.getpid(), "host")

    def _others(self) -> list[Worker]:
        if isinstance(self.workers, Exception):
            raise self.workers
        return self.workers

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        return dict.fromkeys(enquiries)

    def close(self) -> None:
        self.closed += 1


def others(service: Service) -> OtherWorkers:
    """Puts a bus in place, as if this process had joined it."""
    bus = OtherWorkers(service)
    service._bus, service._joined = bus, os.getpid()
    return bus


class Gate:
    """A provider that has the request and does not answer before it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.answers = 0

    def __call__(self, request: Any) -> tuple[int, dict[str, str], bytes]:
        self.asked.set()
        assert self.go_on.wait(10)
        self.answers += 1
        return 200, {}, EVENT + DONE


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.add_callback("POST", URL, callback=gate, content_type="text/event-stream")
        yield gate
        gate.go_on.set()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The package's log so far, from INFO up."""
    caplog.set_level(logging.INFO, "chatstream")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "chatstream"]


MakeService = Callable[..., Service]
Lines = Callable[[], list[str]]


def walked(iterable: StreamIterable) -> bytes:
    """What a server would send, to the end, and closed."""
    try:
        return b"".join(iterable)
    finally:
        iterable.close()


def code_of(event: bytes) -> str:
    assert event.startswith(b"event: error\ndata: ")
    return event.decode().rpartition('"code": "')[2].partition('"')[0]


# In an app


def test_nothing_starts_before_the_first_stream() -> None:
    """No thread and no descriptor at init, nor for a cancel: a server may fork afterwards."""
    fds, threads = descriptors(), threading.active_count()
    app = flask.Flask("host")
    ChatStream(app)
    app.test_client().post("/api/chat/cancel/x?streamId=y")
    assert (descriptors(), threading.active_count()) == (fds, threads)


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


def test_the_next_request_of_the_connection_is_not_hit(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """A kept-alive connection whose stream is over may close: the next stream is not stopped."""
    us = service()
    server, client = socket.socketpair()
    assert walked(us.open(PAYLOAD, environ={"gunicorn.socket": server})) == EVENT + DONE
    following = us.open(PAYLOAD)
    client.close()
    watched = threading.Event()
    us._loop.call_later(0.05, watched.set)
    assert watched.wait(5)
    assert walked(following) == EVENT + DONE
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


def test_a_conflict_leaves_no_trace(service: MakeService, lines: Lines) -> None:
    """A refused stream takes no slot, no line in the log, and lets its client's socket go."""
    us = service(on_conflict="reject")
    first = us.open(PAYLOAD, session_id="s-1")
    before = descriptors()
    server, client = socket.socketpair()
    with pytest.raises(Refused):
        us.open(PAYLOAD, session_id="s-1", environ={"gunicorn.socket": server})
    server.close()
    client.close()
    assert len(us.registry) == 1
    assert len([line for line in lines() if " started " in line]) == 1
    first.close()
    eventually(lambda: descriptors() <= before + 2)  # the loop's own two


def test_a_cancelled_name_is_born_aborted(
    service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """An early cancel: an empty body, no call, and the line of a cancel."""
    us = service()
    assert us.abort("s-1", "t-1") is False
    assert walked(us.open(PAYLOAD, session_id="s-1", stream_id="t-1")) == b""
    assert len(provider.calls) == 0
    assert lines()[-1].startswith("[SSE] s-1 aborted by client/cancel cause=cancel phase=new ")


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


def test_a_deadline_before_the_headers(service: MakeService, gate: Gate, lines: Lines) -> None:
    """CHATSTREAM_STREAM_DEADLINE with nothing sent yet: a 504, code `deadline`."""
    us = service(stream_deadline=0.1)
    iterable = us.open(PAYLOAD, session_id="s-1")
    assert list(iterable) == []
    assert iterable.refusal is not None
    assert (iterable.refusal.code, iterable.refusal.status) == ("deadline", 504)
    iterable.close()
    assert lines()[-1].startswith("[SSE] s-1 aborted by deadline cause=deadline phase=")


def test_a_deadline_after_a_ping(service: MakeService, gate: Gate) -> None:
    """The same once the response has begun: an error event, and the end."""
    iterable = service(stream_deadline=0.2, ping_interval=0.05).open(PAYLOAD)
    *pings, last = iterable
    assert set(pings) == {b": ping\n\n"}
    assert code_of(last) == "deadline"
    iterable.close()


def test_a_deadline_ends_with_its_stream(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """A stream that ended in time is not touched by its deadline, and leaves no timer."""
    us = service(stream_deadline=60)
    for _ in range(200):
        assert walked(us.open(PAYLOAD)) == EVENT + DONE
    assert len(us._loop._timers) < 150


def test_headers_that_do_not_come(service: MakeService, gate: Gate, lines: Lines) -> None:
    """CHATSTREAM_UPSTREAM_HEADERS_TIMEOUT: a 504 `upstream_timeout`, and a WARNING."""
    iterable = service(upstream_headers_timeout=0.1).open(PAYLOAD, session_id="s-1")
    assert list(iterable) == []
    assert iterable.refusal is not None
    assert (iterable.refusal.code, iterable.refusal.status) == ("upstream_timeout", 504)
    iterable.close()
    assert lines()[-1].startswith("[SSE] s-1 failed: upstream_timeout phase=")


def test_the_call_is_made_once_however_long_it_takes(service: MakeService, gate: Gate) -> None:
    """Pings go out while the provider thinks; it is asked once."""
    iterable = service(ping_interval=0.02).open(PAYLOAD)
    assert [next(iterable) for _ in range(5)] == [b": ping\n\n"] * 5
    gate.go_on.set()
    assert walked(iterable).removeprefix(b": ping\n\n").endswith(EVENT + DONE)
    assert gate.answers == 1


# Other workers


def test_a_stop_reaches_another_worker(service: MakeService) -> None:
    """What is not here is asked for elsewhere, by its names, and that answer is the answer."""
    us = service()
    bus = others(us)
    bus.answer = True
    assert us.abort("s-1", "t-1", owner="me") is True
    assert us.abort("s-1") is True
    bus.answer = False
    assert us.abort("s-2") is False
    assert [request.action for request in bus.asked] == [Action.CANCEL] * 3
    names = [(request.owner, request.session_id, request.stream_id) for request in bus.asked]
    assert names == [("me", "s-1", "t-1"), ("", "s-1", None), ("", "s-2", None)]


@pytest.mark.parametrize("error", [Unconfirmed, BusUnavailable])
def test_a_stop_that_cannot_be_confirmed_says_so(
    service: MakeService, error: type[Exception], lines: Lines
) -> None:
    """Neither True nor False: it is raised, and the log has no part in it."""
    us = service()
    others(us).answer = error()
    with pytest.raises(error):
        us.abort("s-1")
    assert lines() == []


@pytest.mark.parametrize("error", [Unconfirmed(), BusUnavailable(), OSError("broken")])
def test_ones_own_stream_is_stopped_whatever_the_bus_is(
    service: MakeService, error: Exception
) -> None:
    """A stream of this worker needs no bus for its stop: nobody else is asked."""
    us = service()
    bus = others(us)
    iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    bus.answer = error
    assert us.abort("s-1", "t-1") is True
    assert iterable.stream.cause is Cause.CANCEL
    assert bus.asked == []
    iterable.close()


def test_a_bus_that_fails_is_unavailable(service: MakeService, lines: Lines) -> None:
    """The system's error is BusUnavailable to the caller, and a line for people."""
    us = service()
    broken = OSError(28, "No space left on device")
    others(us).answer = broken
    with pytest.raises(BusUnavailable) as caught:
        us.abort("s-1", "t-1")
    assert caught.value.__cause__ is broken
    assert lines() == ["[bus] fake: [Errno 28] No space left on device"]


@pytest.mark.parametrize("on_conflict", ["supersede", "reject"])
def test_a_stream_is_claimed_and_released(
    service: MakeService, provider: responses.RequestsMock, on_conflict: str
) -> None:
    """By its names and its number, once each; when it is claimed or released, the registry knows.

    So whoever asks for it by what the bus says finds it, or finds that it has been.
    """
    us = service(on_conflict=on_conflict)
    bus = others(us)
    found: list[bool] = []
    bus.on_claim = bus.on_release = lambda: found.append(us.registry.find("me", "s-1") is not None)
    iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
    claim = Claim(Name("me", "s-1", "t-1"), iterable.stream.number)
    assert bus.claims == [(claim, on_conflict == "reject")]
    assert walked(iterable) == EVENT + DONE
    iterable.close()
    assert bus.released == [claim]
    assert found == [True, False]


def test_a_cancel_that_another_worker_remembers(
    service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """A claim that says so makes the stream be born cancelled: no call, an empty body."""
    us = service()
    others(us).early = True
    assert walked(us.open(PAYLOAD, session_id="s-1")) == b""
    assert len(provider.calls) == 0
    assert lines()[-1].startswith("[SSE] s-1 aborted by client/cancel cause=cancel phase=new ")


def test_the_older_stream_is_superseded_before_the_newer_one_is_claimed(
    service: MakeService,
) -> None:
    """The claim may have to wait for a worker that hangs; what is here need not go on for that."""
    us = service()
    bus = others(us)
    old = us.open(PAYLOAD, session_id="s-1")
    causes: list[Cause | None] = []
    bus.on_claim = lambda: causes.append(old.stream.cause)
    new = us.open(PAYLOAD, session_id="s-1")
    assert causes == [Cause.SUPERSEDED]
    assert not new.stream.ended
    old.close()
    new.close()


@pytest.mark.parametrize(
    "error", [conflict("stream"), Unconfirmed(), KeyError("t-1"), KeyboardInterrupt()], ids=repr
)
def test_a_stream_that_is_refused_elsewhere_leaves_no_trace(
    service: MakeService, lines: Lines, error: BaseException
) -> None:
    """No name, no slot, no line and no descriptor.

    Whatever a claim raises, also where that is a fault of the bus or the end of the thread.
    """
    us = service()
    bus = others(us)
    us.open(PAYLOAD).close()
    bus.released.clear()
    said = lines()
    bus.early = error
    server, client = socket.socketpair()
    before = descriptors()
    with pytest.raises(type(error)):
        us.open(PAYLOAD, session_id="s-1", stream_id="t-1", environ={"gunicorn.socket": server})
    server.close()
    client.close()
    eventually(lambda: descriptors() <= before)  # two less for the pair, two for the loop
    assert us.registry.find("", "s-1") is None
    assert us.registry.find("", "s-1", "t-1") is None
    assert (len(us.registry), bus.released) == (0, [])
    assert lines() == said


def test_a_refused_stream_has_superseded_the_sessions_older_one(service: MakeService) -> None:
    """A session has one stream, and its caller has asked for the newer one."""
    us = service()
    bus = others(us)
    old = us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    bus.early = conflict("stream")
    with pytest.raises(Refused):
        us.open(PAYLOAD, session_id="s-1", stream_id="t-2")
    assert old.stream.cause is Cause.SUPERSEDED
    assert us.abort("s-1") is False
    old.close()
    assert len(us.registry) == 0


def test_a_refused_stream_whose_session_a_third_one_took(service: MakeService) -> None:
    """What came meanwhile keeps the session, and goes on."""
    us = service()
    bus = others(us)
    first = us.open(PAYLOAD, session_id="s-1")
    third: list[StreamIterable] = []

    def meanwhile() -> None:
        bus.on_claim = lambda: None
        third.append(us.open(PAYLOAD, session_id="s-1"))
        bus.early = conflict("stream")

    bus.on_claim = meanwhile
    with pytest.raises(Refused):
        us.open(PAYLOAD, session_id="s-1")
    assert us.registry.find("", "s-1") is third[0].stream
    assert not third[0].stream.ended
    assert first.stream.cause is Cause.SUPERSEDED
    first.close()
    third[0].close()
    assert len(us.registry) == 0


def test_a_claim_that_fails_takes_no_slot(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """Nor the watch of its client, nor its deadline: the next stream has all that it needs."""
    us = service(max_streams=1, stream_deadline=60.0)
    bus = others(us)
    bus.early = KeyError("s-1")
    for _ in range(3):
        with pytest.raises(KeyError):
            us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
        assert len(us.registry) == 0
    bus.early = False
    assert walked(us.open(PAYLOAD, session_id="s-1", stream_id="t-1")) == EVENT + DONE


def test_a_stream_needs_no_bus(
    service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """A bus that fails keeps no stream from starting, and no slot from being given back."""
    us = service(max_streams=1)
    bus = others(us)
    bus.early = OSError("broken")

    def fail() -> None:
        raise OSError("broken")

    bus.on_release = fail
    for _ in range(2):
        assert walked(us.open(PAYLOAD, session_id="s-1")) == EVENT + DONE
    assert lines()[0] == "[bus] fake: broken"
    assert lines()[-1].startswith("[SSE] s-1 completed ")


def test_what_another_worker_asks_for(service: MakeService) -> None:
    """A probe looks, a cancel and a supersede stop, each with its cause, and only what is live."""
    us = service()
    others(us)
    for action, cause in ((Action.CANCEL, Cause.CANCEL), (Action.SUPERSEDE, Cause.SUPERSEDED)):
        iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
        for names in (("me", "s-1", None), ("me", None, "t-1"), ("me", "s-1", "t-1")):
            assert us._receive(Request(Action.PROBE, *names)) is Answer.LIVE
        for names in (("you", "s-1", None), ("me", "s-2", "t-1"), ("me", "s-1", "t-2")):
            assert us._receive(Request(action, *names)) is Answer.ABSENT
        assert not iterable.stream.ended
        assert us._receive(Request(action, "me", "s-1", "t-1")) is Answer.STOPPED
        assert iterable.stream.cause is cause
        assert us._receive(Request(action, "me", "s-1", "t-1")) is Answer.ABSENT
        assert us._receive(Request(Action.PROBE, "me", "s-1", "t-1")) is Answer.ABSENT
        iterable.close()


def test_what_is_asked_for_in_vain_hits_no_newer_stream(service: MakeService) -> None:
    """A request that is read late is not for the session's next stream."""
    us = service()
    others(us)
    for action in (Action.CANCEL, Action.SUPERSEDE):
        iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
        began = iterable.stream.started
        for names in (("me", "s-1", None), ("me", None, "t-1"), ("me", "s-1", "t-1")):
            early = Request(action, *names, before=began - 0.001)
            answer = Answer.ABSENT if action is Action.CANCEL else Answer.LIVE
            assert us._receive(early) is answer
            probe = Request(Action.PROBE, *names, before=began - 0.001)
            assert us._receive(probe) is Answer.LIVE
        assert not iterable.stream.ended
        late = Request(action, "me", "s-1", before=began)
        assert us._receive(late) is Answer.STOPPED
        assert iterable.stream.ended
        assert us._receive(Request(action, "me", "s-1", before=0.0)) is Answer.ABSENT
        iterable.close()


# Two apps of a process


def test_two_apps_of_a_process_have_two_names() -> None:
    """Also where they look the same: each is one app on the bus, in all workers."""
    names = []
    for import_name, prefix in (("a", "/x"), ("a", "/x"), ("b", "/x"), ("a", "/y")):
        app = flask.Flask(import_name)
        app.config["CHATSTREAM_URL_PREFIX"] = prefix
        ChatStream(app)
        names.append(app.extensions["chatstream"].name)
    assert len(set(names)) == 4
    assert names[0][:8] == names[1][:8]
    assert len({name[:8] for name in names}) == 3
    assert all(re.fullmatch("[0-9a-f]{8}[0-9]{1,2}", name) for name in names)


NAMES = """
import flask
from chatstream import ChatStream
for import_name in ("a", "b", "a"):
    app = flask.Flask(import_name)
    ChatStream(app)
    print(app.extensions["chatstream"].name)
"""


def test_an_app_has_one_name_in_all_workers() -> None:
    """Made of what is the same in each of them, whatever seed its hashes have."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", NAMES],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    a, b, second_a = runs[0]
    assert (a[8:], b[8:], second_a[8:]) == ("1", "1", "2")
    assert a[:8] == second_a[:8] != b[:8]


def test_two_apps_of_a_process_do_not_meet_on_the_bus(short_base: Path) -> None:
    """The same names in two apps are two streams, and the end of the one is not the other's."""
    services = []
    for _ in range(2):
        app = flask.Flask("host")
        app.config |= {"CHATSTREAM_BUS": f"unix://{short_base}", "CHATSTREAM_MAX_STREAMS": 4}
        ChatStream(app)
        services.append(app.extensions["chatstream"])
    one, two = services
    first, second = (each.open(PAYLOAD, session_id="s", stream_id="t") for each in services)
    assert len(list(service_directory(short_base, "", "").parent.iterdir())) == 2
    assert not first.stream.ended
    assert one.abort("s", "t") is True
    assert not second.stream.ended
    one.stop()
    assert two.abort("s") is True
    first.close()
    second.close()
    two.stop()
    assert list(service_directory(short_base, "", "").parent.iterdir()) == []


# Joining the other workers

SERVICE = """
import sys
from chatstream import Service
from chatstream.stream.forms import WholeStream
from chatstream.settings.table import Settings
service = Service(Settings(bus=sys.argv[1], upstream_url="http://127.0.0.1:9/", max_streams=4))
iterable = service.open(b"{}", session_id="s-1", stream_id="t-1")
print("open", flush=True)
sys.stdin.readline()
print(iterable.stream.cause, flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another worker of the service in `tmp_path`, with a live stream s-1/t-1."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE, f"unix://{tmp_path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def told(worker: subprocess.Popen[str]) -> str:
    """Has the worker end, and returns what stopped its stream."""
    return worker.communicate("\n", timeout=10)[0].strip()


def test_a_cancel_alone_joins(
    service: MakeService, worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """A worker that has had no stream yet finds another worker's."""
    assert service(bus=f"unix://{tmp_path}").abort("s-1", "t-1") is True
    assert told(worker) == "Cause.CANCEL"


def test_a_stream_supersedes_another_workers(
    service: MakeService, worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """One session, one stream, whichever workers the two requests came to."""
    us = service(bus=f"unix://{tmp_path}")
    us.open(PAYLOAD, session_id="s-1").close()
    assert told(worker) == "Cause.SUPERSEDED"


def test_reject_refuses_for_another_workers_stream(
    service: MakeService, worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """CHATSTREAM_ON_CONFLICT=reject is for the whole service."""
    us = service(bus=f"unix://{tmp_path}", on_conflict="reject")
    with pytest.raises(Refused):
        us.open(PAYLOAD, session_id="s-1")
    assert len(us.registry) == 0
    assert told(worker) == "None"


def test_many_first_cancels_at_once_join_once(service: MakeService, tmp_path: Path) -> None:
    """They come together, with first streams among them, and all use the one bus."""
    us = service(bus=f"unix://{tmp_path}", max_streams=16)
    buses, barrier = [], threading.Barrier(16)

    def first(number: int) -> None:
        barrier.wait(5)
        if number % 2:
            us.open(PAYLOAD).close()
        else:
            us.abort(f"s-{number}")
        buses.append(us._bus)

    threads = [threading.Thread(target=first, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(buses) == 16
    assert len(set(buses)) == 1


def test_stop_leaves(service: MakeService, tmp_path: Path) -> None:
    """After `stop` nothing of the bus is there, and the next stream or cancel joins again."""
    us = service(bus=f"unix://{tmp_path}")
    where = service_directory(tmp_path, "service", "0")
    for join in (lambda: us.abort("s-1"), lambda: us.open(PAYLOAD).close()):
        join()
        assert where.is_dir()
        us.stop()
        us.stop()
        assert not where.exists()


def test_stop_closes_the_bus(service: MakeService) -> None:
    """Once, and a stream that is closed only then is none of its concern."""
    us = service()
    bus = others(us)
    iterable = us.open(PAYLOAD)
    us.stop()
    us.stop()
    assert bus.closed == 1
    iterable.close()
    assert bus.released == []


def run_alone(script: str, *arguments: str) -> None:
    """Runs it in a process of its own, which has to end well and soon."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 0, run.stderr


LEAVES = """
import os, sys
from chatstream import Service
from chatstream.stream.forms import WholeStream
from chatstream.settings.table import Settings
service = Service(Settings(bus=sys.argv[1], upstream_url="http://127.0.0.1:9/", max_streams=4))
iterable = service.open(b"{}", session_id="s-1")
where = sys.argv[1].removeprefix("unix://") + f"/chatstream-{os.geteuid()}"
if os.fork() == 0:
    sys.exit()  # with all of atexit
os.wait()
assert os.listdir(where) == ["service-0"], os.listdir(where)
assert iterable.stream.cause is None
"""


def test_a_process_that_ends_leaves(tmp_path: Path) -> None:
    """Whoever forgets `stop` leaves nothing behind; a child that it forked ends nothing of it."""
    run_alone(LEAVES, f"unix://{tmp_path}")
    assert list(service_directory(tmp_path, "service", "0").parent.iterdir()) == []


def test_a_bus_that_cannot_start(
    service: MakeService, provider: responses.RequestsMock, tmp_path: Path, lines: Lines
) -> None:
    """One line for people. Streams run and can be stopped; of another's nothing can be said."""
    us = service(bus=f"unix://{tmp_path}")
    in_the_way = service_directory(tmp_path, "service", "0").parent
    in_the_way.touch()  # where the user's directory should be
    for _ in range(2):
        assert walked(us.open(PAYLOAD)) == EVENT + DONE
        with pytest.raises(BusUnavailable):
            us.abort("s-1")
        with pytest.raises(BusUnavailable):
            us.abort("s-1", "t-1")
    iterable = us.open(PAYLOAD, session_id="s-1")
    assert us.abort("s-1") is True
    iterable.close()
    (line,) = eventually(lambda: [line for line in lines() if line.startswith("[bus]")])
    assert line.startswith(f"[bus] unix is away: {in_the_way} ")
    assert "answered with 503" in line


def test_a_bus_that_cannot_start_is_tried_again(
    service: MakeService, tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in its way is gone: a cancel that comes after a while joins."""
    monkeypatch.setattr("chatstream.bus.unix.unix_bus._REJOIN", 0.02)
    us = service(bus=f"unix://{tmp_path}")
    in_the_way = service_directory(tmp_path, "service", "0").parent
    in_the_way.touch()
    with pytest.raises(BusUnavailable):
        us.abort("s-1")
    iterable = us.open(PAYLOAD, session_id="s-1")
    in_the_way.unlink()

    def joined() -> bool:
        try:
            return us.abort("s-2") is False
        except BusUnavailable:
            return False

    eventually(joined, "another attempt to join")
    eventually(lambda: lines()[-1] == "[bus] unix is back; 1 streams are registered")
    iterable.close()


def test_a_bus_that_cannot_start_is_tried_again_after_stop(
    service: MakeService, tmp_path: Path
) -> None:
    """At once: what is joined then is a new one."""
    us = service(bus=f"unix://{tmp_path}")
    in_the_way = service_directory(tmp_path, "service", "0").parent
    in_the_way.touch()
    with pytest.raises(BusUnavailable):
        us.abort("s-1")
    in_the_way.unlink()
    us.stop()
    assert us.abort("s-1") is False


def test_without_room_for_a_bus_there_is_none_for_a_stream(
    service: MakeService, provider: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Busy from its start is the caller's to see, takes no slot, and is tried again."""
    us = service(max_streams=1)
    starts: list[Bus] = []

    class Crowded(LocalBus):
        def start(self) -> None:
            starts.append(self)
            if len(starts) <= 2:
                raise Busy("no room")

    monkeypatch.setattr("chatstream.bus.create", lambda settings, receive, *_: Crowded(receive))
    with pytest.raises(Busy, match="no room"):
        us.open(PAYLOAD)
    with pytest.raises(Busy, match="no room"):
        us.abort("s-1")
    assert len(us.registry) == 0
    assert walked(us.open(PAYLOAD)) == EVENT + DONE
    assert us.abort("s-1") is False
    assert len(starts) == 3
    assert us._bus is starts[-1]


def test_a_bus_that_fails_for_another_reason_keeps_no_slot(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """It is a fault of ours, and is raised; the worker can end all the same."""
    us = service()
    bus = others(us)
    bus.on_release = lambda: 1 / 0
    iterable = us.open(PAYLOAD)
    with pytest.raises(ZeroDivisionError):
        walked(iterable)
    assert us.at_rest()


@pytest.mark.usefixtures("provider")
def test_sessions_are_what_lives_here_and_elsewhere(service: MakeService) -> None:
    """Of all owners or of one; what has ended is not among them. Others may be silent."""
    us = service(max_streams=4)
    bus = others(us)
    bus.workers = [Worker("there", 1, "host")]
    one = us.open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
    two = us.open(PAYLOAD, session_id="s-2", stream_id="t-2", owner="you")
    three = us.open(PAYLOAD, session_id="s-3", stream_id="t-3", owner="me")
    walked(three)
    here, there = us.sessions().workers
    assert [live.name for live in here.streams] == [("me", "s-1", "t-1"), ("you", "s-2", "t-2")]
    assert [live.number for live in here.streams] == [1, 2]
    assert (there.worker.id, there.answered) == ("there", False)
    assert [live.name.session_id for live in us.sessions("you").workers[0].streams] == ["s-2"]
    assert [live.number for live in us._lives(Enquiry(after=1))] == [2]
    for stream in (one, two):
        stream.close()


def test_a_listing_shows_how_far_a_stream_is(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """Its events so far, and its phase."""
    provider.replace(responses.POST, URL, body=EVENT, content_type="text/event-stream")
    us = service(max_streams=4)
    others(us)
    stream = us.open(PAYLOAD)
    assert next(stream) == EVENT
    (live,) = us.sessions().workers[0].streams
    assert (live.phase, live.events) == ("sending", 1)
    assert live.seconds >= 0
    stream.close()


@pytest.mark.parametrize("error", [BusUnavailable(), OSError("broken")])
def test_sessions_that_cannot_be_found_out(service: MakeService, error: Exception) -> None:
    """It says so, and does not pass what is here for all there is."""
    us = service(max_streams=4)
    others(us).workers = error
    with pytest.raises(BusUnavailable):
        us.sessions()


@pytest.mark.usefixtures("provider")
def test_a_limit_goes_to_the_bus(service: MakeService) -> None:
    """It counts over all workers; a refusal leaves nothing, and no slot is held."""
    us = service(max_streams=4, max_streams_per_owner=3)
    bus = others(us)
    stream = us.open(PAYLOAD)
    bus.early = too_many(3)
    with pytest.raises(Refused):
        us.open(PAYLOAD)
    assert bus.limits == [3, 3]
    assert len(us.registry) == 1
    us.reconfigure(Settings(max_streams=4))
    bus = others(us)
    us.open(PAYLOAD).close()
    assert bus.limits == [None]
    stream.close()


@pytest.mark.usefixtures("provider")
def test_a_bus_that_breaks_refuses_nobody(service: MakeService) -> None:
    """With a limit neither."""
    us = service(max_streams=4, max_streams_per_owner=1)
    others(us).early = OSError("broken")
    stream = us.open(PAYLOAD)
    assert not stream.stream.ended
    stream.close()


@pytest.mark.usefixtures("provider")
def test_all_of_an_owner_are_stopped(service: MakeService) -> None:
    """What is named has been stopped by this: neither others' streams nor what had ended."""
    us = service(max_streams=5)
    bus = others(us)
    bus.workers = [Worker("there", 1, "host")]
    opened = [
        us.open(PAYLOAD, session_id=f"s-{n}", stream_id=f"t-{n}", owner=owner)
        for n, owner in enumerate(["me", "you", "me", "me"])
    ]
    opened[2].stream.abort(Cause.DEADLINE)
    here, there = us.cancel_all("me").workers
    assert [live.name for live in here.streams] == [("me", "s-0", "t-0"), ("me", "s-3", "t-3")]
    assert (here.answered, there.answered, there.streams) == (True, False, [])
    causes = [each.stream.cause for each in opened]
    assert causes == [Cause.CANCEL, None, Cause.DEADLINE, Cause.CANCEL]
    assert [live.name.owner for live in us.cancel_all(None).workers[0].streams] == ["you"]
    for each in opened:
        each.close()


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("error", [BusUnavailable(), OSError("broken")])
def test_without_the_others_ones_own_are_stopped(service: MakeService, error: Exception) -> None:
    """Before it is said that the others cannot be reached."""
    us = service(max_streams=4)
    bus = others(us)
    bus.workers = error
    stream = us.open(PAYLOAD)
    with pytest.raises(BusUnavailable):
        us.cancel_all("")
    assert stream.stream.cause is Cause.CANCEL
    with pytest.raises(BusUnavailable):
        us.check_bus()
    bus.workers = []
    us.check_bus()
    stream.close()


@pytest.mark.usefixtures("provider")
def test_what_began_after_the_request_is_not_meant(service: MakeService) -> None:
    """A stop of all that is read late: as for any other request."""
    us = service(max_streams=4)
    old = us.open(PAYLOAD)
    between = time.monotonic()
    new = us.open(PAYLOAD)
    stopped = [*us._lives(Enquiry(stop=True, before=between))]
    assert [live.number for live in stopped] == [old.stream.number]
    assert not new.stream.ended
    assert [live.number for live in us._lives(Enquiry())] == [new.stream.number]
    old.close()
    new.close()


def test_what_was_stopped_is_shown_as_it_was(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """Its phase and its events."""
    provider.replace(responses.POST, URL, body=EVENT, content_type="text/event-stream")
    us = service(max_streams=4)
    stream = us.open(PAYLOAD)
    assert next(stream) == EVENT
    (live,) = us._lives(Enquiry(stop=True))
    assert (live.phase, live.events) == ("sending", 1)
    stream.close()


def test_one_process_alone_reaches_all_there_are(service: MakeService) -> None:
    """It is its own bus."""
    service(max_streams=4, bus="local").check_bus()


FORKED = """
import os, signal
from chatstream import Service
from chatstream.stream.forms import WholeStream
from chatstream.settings.table import Settings
service = Service(Settings(max_streams=4))
with service._starting():
    if os.fork() == 0:
        signal.alarm(10)
        assert service.abort("s-1") is False
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_a_fork_in_the_middle_of_a_start() -> None:
    """The lock that another thread held then is not the child's: it waits for nobody."""
    run_alone(FORKED)


COOPERATIVE = """
from chatstream import Service
from chatstream.stream.forms import WholeStream
from chatstream.settings.table import Settings
service = Service(Settings(max_streams=4))  # as an app that was loaded before the workers
from gevent import monkey
monkey.patch_all()
import gevent
from chatstream import bus
from chatstream.bus.local import LocalBus

class Slow(LocalBus):
    def start(self):
        starts.append(gevent.getcurrent())
        gevent.sleep(0.05)

starts = []
bus.create = lambda settings, receive, *_: Slow(receive)
cancels = [gevent.spawn(service.abort, "s-1") for _ in range(2)]
gevent.joinall(cancels, timeout=10)
assert [cancel.value for cancel in cancels] == [False, False], cancels
assert starts == cancels[:1], starts
"""


def test_under_gevent_the_first_ones_wait_for_each_other() -> None:
    """A service that was made before gevent patched: who waits for its start lets others run."""
    pytest.importorskip("gevent")
    run_alone(COOPERATIVE)


@pytest.mark.parametrize("bus", ["unix:///nowhere/at/all", "unix:///" + "x" * 100])
def test_a_bus_that_cannot_be_stops_the_start(bus: str) -> None:
    """ConfigError at init_app, and nothing is mounted."""
    app = flask.Flask("host")
    app.config["CHATSTREAM_BUS"] = bus
    with pytest.raises(ConfigError, match=r"^CHATSTREAM_BUS: "):
        ChatStream(app)
    assert "chatstream" not in app.blueprints
    assert "chatstream" not in app.extensions


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
    ("detaches", "settings", "expected"),
    [
        (True, {}, Slots(968, 12)),
        (True, {"max_streams": 20}, Slots(20, 12)),
        (True, {"max_streams": 4}, Slots(4, 4)),
        (True, {"detach": False}, Slots(12, 12)),
        (True, {"detach": False, "max_streams": 20}, Slots(20, 20)),
        (False, {}, Slots(12, 12)),  # HTTP/2, say
        (None, {}, Slots(12, 12)),  # gunicorn's own gthread
    ],
)
def test_slots_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, detaches: bool | None, settings: Any, expected: Slots
) -> None:
    """Where the loop moves the streams, threads do not bound them: only those that keep one."""
    monkeypatch.setattr(server, "gunicorn_worker", lambda: FakeWorker(detaches=detaches))
    monkeypatch.setattr(slots, "limit", lambda: 100_000)
    us = Service(Settings(**{"upstream_url": URL, "max_streams": None, **settings}))
    assert us.registry.slots == expected


def test_slots_under_gevent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greenlets hold no thread: connections bound them."""
    worker = FakeWorker(detaches=None, threads=1)
    monkeypatch.setattr(server, "gunicorn_worker", lambda: worker)
    monkeypatch.setattr(native, "patched", lambda: True)
    assert Service(Settings(upstream_url=URL)).registry.slots == Slots(968, 968)


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


def test_more_slots_than_descriptors_is_said(
    service: MakeService, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no worker of ours has refused to start: once, with what to do."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    us = service(max_streams=1000)
    for _ in range(2):
        us.start()
    said = [line for line in lines() if "descriptors" in line]
    assert said == [slots.too_many(1000)]


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


def test_a_refused_stream_does_not_use_an_early_cancel_up(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """Without a slot, or with its streamId taken, the cancel stays for the caller's retry."""
    us = service(max_streams=1)
    us.abort("s-1", "t-1")
    other = us.open(PAYLOAD, session_id="s-2", stream_id="t-1")
    with pytest.raises(Refused):
        us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    other.close()
    other = us.open(PAYLOAD)
    with pytest.raises(Busy):
        us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    other.close()
    assert walked(us.open(PAYLOAD, session_id="s-1", stream_id="t-1")) == b""
    assert len(provider.calls) == 0


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


# The log

ID = r"[0-9a-f]{32}"
TERMINAL = re.compile(r"\[SSE\] \S+ (completed|aborted|failed)")


def test_a_completed_streams_lines(
    service: MakeService, provider: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    """One INFO line at the start and one at the end, with the figures."""
    caplog.set_level(logging.INFO, "chatstream")
    walked(service().open(PAYLOAD, session_id="s-1", stream_id="t-1"))
    first, last = caplog.records
    assert [first.levelname, last.levelname] == ["INFO", "INFO"]
    assert first.getMessage() == "[SSE] s-1 started stream=t-1"
    assert re.fullmatch(
        r"\[SSE\] s-1 completed phase=\w+ stream=t-1 events=2"
        rf" bytes={len(EVENT + DONE)} duration=\d+\.\d{{3}}s",
        last.getMessage(),
    )


def test_a_stopped_streams_line(
    service: MakeService, provider: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    """INFO, the literal `aborted by client/cancel`, then key=value with the cause and stop_ms."""
    caplog.set_level(logging.INFO, "chatstream")
    us = service()
    iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    us.abort("s-1")
    iterable.close()
    last = caplog.records[-1]
    assert last.levelname == "INFO"
    assert re.fullmatch(
        r"\[SSE\] s-1 aborted by client/cancel cause=cancel phase=new stream=t-1 events=0"
        r" bytes=0 duration=\d+\.\d{3}s stop_ms=\d+\.\d{3}",
        last.getMessage(),
    )


def test_a_failed_streams_line(
    service: MakeService, provider: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    """WARNING, the code, and what the system said."""
    caplog.set_level(logging.INFO, "chatstream")
    provider.reset()
    provider.post(URL, body=requests.ConnectTimeout(OSError(111, "Connection refused")))
    list(iterable := service().open(PAYLOAD, session_id="s-1"))
    iterable.close()
    last = caplog.records[-1]
    assert last.levelname == "WARNING"
    assert re.match(
        rf"\[SSE\] s-1 failed: upstream_connect phase=\w+ stream={ID} events=0 bytes=0"
        r' duration=\d+\.\d{3}s detail="',
        last.getMessage(),
    )


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ({"body": EVENT + DONE}, "completed "),
        ({"body": EVENT, "headers": {"Content-Length": "999"}}, "failed: upstream_truncated "),
        ({"body": EVENT}, "failed: upstream_truncated "),
        ({"body": b'data: {"error":"x"}\n\n'}, "failed: upstream_error "),
        ({"status": 401, "body": f"bad key {KEY}"}, "failed: upstream_auth "),
        ({"body": RuntimeError(f"in our own code, {KEY}")}, "failed: upstream_error "),
    ],
)
def test_every_stream_has_one_terminal_line(
    service: MakeService,
    provider: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
    answer: dict[str, Any],
    end: str,
) -> None:
    """Case 38: exactly one, whatever the end and however often closed."""
    caplog.set_level(logging.INFO, "chatstream")
    provider.reset()
    provider.post(URL, content_type="text/event-stream", **answer)
    iterable = service().open(PAYLOAD, session_id="s-1")
    list(iterable)
    iterable.close()
    iterable.close()
    terminal = [m for r in caplog.records if TERMINAL.match(m := r.getMessage())]
    assert [line.removeprefix("[SSE] s-1 ")[: len(end)] for line in terminal] == [end]


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
    assert "aborted by client/cancel" in caplog.records[-1].getMessage()


# Stop, and start again


def test_stop_ends_every_stream(service: MakeService, gate: Gate, lines: Lines) -> None:
    """Case 37: cause shutdown, told to the client as a 503, never logged as a user's stop."""
    us = service()
    iterable = us.open(PAYLOAD, session_id="s-1")
    done = threading.Event()
    walker = threading.Thread(target=lambda: (list(iterable), done.set()))
    walker.start()
    assert gate.asked.wait(5)
    us.stop()
    assert done.wait(5)
    walker.join(5)
    assert iterable.refusal is not None
    assert (iterable.refusal.code, iterable.refusal.status) == ("shutting_down", 503)
    iterable.close()
    assert lines()[-1].startswith("[SSE] s-1 aborted by shutdown cause=shutdown ")


def test_a_stopped_service_starts_again(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """After `stop` the next stream works; unused and twice, `stop` does nothing."""
    us = service(stream_deadline=60)
    us.stop()
    for _ in range(3):
        assert walked(us.open(PAYLOAD)) == EVENT + DONE
        us.stop()
        us.stop()


def test_other_settings_from_the_next_stream_on(service: MakeService, gate: Gate) -> None:
    """What lives is aborted; then the new address, slots and policy hold."""
    us = service(max_streams=1)
    old = us.open(PAYLOAD, session_id="s-1")
    us.reconfigure(
        Settings(upstream_url=f"{URL}/new", api_key=KEY, max_streams=2, on_conflict="reject")
    )
    assert old.stream.cause is Cause.SHUTDOWN
    walked(old)
    with responses.RequestsMock() as mock:
        mock.post(f"{URL}/new", body=EVENT + DONE, content_type="text/event-stream")
        new = us.open(PAYLOAD, session_id="s-1")
        with pytest.raises(Refused):
            us.open(PAYLOAD, session_id="s-1")
        other = us.open(PAYLOAD, session_id="s-2")
        assert walked(new) == EVENT + DONE
        other.close()
    assert gate.answers == 0


def test_a_stream_opened_before_stop_and_walked_after_it(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """It was aborted with the others: nobody is called."""
    us = service()
    iterable = us.open(PAYLOAD)
    us.stop()
    list(iterable)
    assert iterable.refusal is not None
    assert iterable.refusal.code == "shutting_down"
    iterable.close()
    assert len(provider.calls) == 0


# The end of its worker


def test_a_drained_stream_may_end_by_itself(
    service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """Until the time is over nothing changes, for new streams either."""
    us = service(drain=60)
    iterable = us.open(PAYLOAD, session_id="s-1")
    us.drain()
    assert not us.at_rest()
    assert walked(iterable) == EVENT + DONE
    assert us.at_rest()
    assert walked(us.open(PAYLOAD)) == EVENT + DONE
    assert sum(" completed " in line for line in lines()) == 2


@pytest.mark.parametrize(("drain", "at_once"), [(0.15, False), (0, False), (60, True)])
def test_what_is_left_of_a_drain_is_aborted(
    service: MakeService, gate: Gate, lines: Lines, drain: float, at_once: bool
) -> None:
    """After CHATSTREAM_DRAIN, once, with its cause; or at once."""
    us = service(drain=drain)
    iterable = us.open(PAYLOAD, session_id="s-1")
    began = time.monotonic()
    us.drain(at_once=at_once)
    us.drain()
    assert list(iterable) == []
    assert time.monotonic() - began >= (0 if at_once else drain)
    assert iterable.refusal is not None
    assert iterable.refusal.code == "shutting_down"
    iterable.close()
    assert lines()[-1].startswith("[SSE] s-1 aborted by shutdown cause=shutdown ")


def test_after_a_drain_streams_are_refused(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """503 and a Retry-After: another worker has room. Until `stop`, after which all begins anew."""
    us = service()
    us.drain(at_once=True)
    with pytest.raises(StreamError) as refused:
        us.open(PAYLOAD)
    assert (refused.value.code, refused.value.status) == ("shutting_down", 503)
    assert refused.value.retry_after == "1"
    assert len(us.registry) == 0
    us.stop()
    assert walked(us.open(PAYLOAD)) == EVENT + DONE


def test_a_stream_that_is_opened_while_the_drain_ends(
    service: MakeService, provider: responses.RequestsMock
) -> None:
    """It was not among those that were aborted, and ends all the same."""
    us = service()
    others(us).on_claim = lambda: us.drain(at_once=True)
    us.registry.live = list  # type: ignore[method-assign]
    iterable = us.open(PAYLOAD)
    assert list(iterable) == []
    assert iterable.refusal is not None
    assert iterable.refusal.code == "shutting_down"
    iterable.close()
    assert len(provider.calls) == 0


class Gunicorn:
    """A gunicorn worker, as far as a service knows one."""

    def __init__(self, graceful_timeout: int) -> None:
        self.cfg = self
        self.graceful_timeout = graceful_timeout
        self.threads, self.worker_connections = 16, 1000


@pytest.mark.parametrize(("graceful", "time"), [(30, 25.0), (20, 17.0), (2, 0.0)])
def test_a_drain_is_within_graceful_timeout(
    service: MakeService, monkeypatch: pytest.MonkeyPatch, graceful: int, time: float
) -> None:
    """Else gunicorn would kill the worker, and no stream had an ending."""
    monkeypatch.setattr("chatstream.workers.server.gunicorn_worker", lambda: Gunicorn(graceful))
    assert service()._time_to_drain() == time


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_that_is_to_end_is_draining(
    service: MakeService, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    """Also before its streams are told: after `max_requests` it takes no more connections."""
    us = service()
    monkeypatch.setattr(server, "gunicorn_worker", lambda: SimpleNamespace(alive=alive))
    assert us.draining() is not alive


def test_an_app_follows_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, and before each request; the worker finds its service."""
    asked: list[str] = []
    monkeypatch.setattr(
        "chatstream.workers.draining.follow_signals", lambda: asked.append("signals")
    )
    monkeypatch.setattr("chatstream.workers.draining.notice_end", lambda: asked.append("end"))
    app = flask.Flask("followed")
    ChatStream(app)
    assert asked == ["signals"]
    assert app.extensions["chatstream"] in draining.services()
    app.test_client().get("/")
    assert asked == ["signals", "end"]


def test_a_body_that_did_not_come_is_no_fault_of_the_apps(caplog: pytest.LogCaptureFixture) -> None:
    """Our workers raise RequestTimeout where the app reads: a 408 without a traceback."""
    app = flask.Flask("uploads")
    ChatStream(app)

    @app.post("/upload")
    def upload() -> str:
        raise RequestTimeout

    assert app.test_client().post("/upload").status_code == 408
    assert caplog.records == []


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


# Many at once, and after the end


def test_many_first_streams_at_once(service: MakeService, provider: responses.RequestsMock) -> None:
    """The first requests of a worker come together: all are served, and it started once."""
    us = service(max_streams=16)
    upstreams, barrier = [], threading.Barrier(16)

    def first() -> None:
        barrier.wait(5)
        iterable = us.open(PAYLOAD)
        upstreams.append(us._upstream)
        walked(iterable)

    threads = [threading.Thread(target=first) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(provider.calls) == 16
    assert len(set(upstreams)) == 1


def test_stop_closes_the_idle_connections(service: MakeService) -> None:
    """A connection that waits for its next stream is closed with the service."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
    closed = threading.Event()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            seen = b""
            while PAYLOAD not in seen:
                seen += sock.recv(65536)
            sock.sendall(head % len(DONE) + DONE)
            if sock.recv(1) == b"":
                closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        us = service(upstream_url=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        server = threading.Thread(target=serve)
        server.start()
        assert walked(us.open(PAYLOAD)) == DONE
        assert not closed.wait(0.05)
        us.stop()
        assert closed.wait(5)
        server.join(5)


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


# Advice


def test_the_log_says_what_would_surprise(service: MakeService, lines: Lines) -> None:
    """Once, at the first stream: see test_advice for what."""
    us = service()
    for _ in range(2):
        us.open(PAYLOAD, environ={"SERVER_SOFTWARE": "gunicorn/27.0.1"}).close()
    assert sum("sync worker" in line for line in lines()) == 1


@pytest.mark.parametrize("bus", [None, "local", "unix"])
def test_many_workers_and_a_bus_of_one(
    service: MakeService, lines: Lines, tmp_path: Path, bus: str | None
) -> None:
    """More than one worker is worth a word only where the bus that was joined knows one."""
    us = service(bus=f"unix://{tmp_path}" if bus == "unix" else bus)
    us.open(PAYLOAD, environ={"wsgi.multiprocess": True}).close()
    assert sum("the bus is local" in line for line in lines()) == (0 if bus == "unix" else 1)


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
