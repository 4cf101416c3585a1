"""lifetime: how the streams of a process begin, drain, end, and begin again."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import flask
import pytest
import responses

from chatstream import (
    Cause,
    ChatStream,
    Refused,
    StreamError,
)
from chatstream.bus.unix.directory import service_directory
from chatstream.service.lifetime import time_to_drain
from chatstream.settings.table import Settings
from chatstream.workers import draining, server
from tests.service.wiring import (
    DONE,
    EVENT,
    KEY,
    PAYLOAD,
    URL,
    Gate,
    Lines,
    MakeService,
    all_at_once,
    others,
    run_alone,
    told,
    walked,
)
from tests.upstream.peer import WHOLE, Provider, always_says

pytestmark = pytest.mark.usefixtures("nothing_left")


# The start


def test_many_firsts_at_once(
    service: MakeService, provider: responses.RequestsMock, tmp_path: Path
) -> None:
    """A worker's first streams and cancels come together: it has started once, and joined once."""
    us = service(bus=f"unix://{tmp_path}", max_streams=16)
    found: list[object] = []

    def stream() -> None:
        iterable = us.open(PAYLOAD)
        found.append(us._upstream)
        walked(iterable)

    def cancel() -> None:
        us.abort("s-1")
        found.append(us._neighbours.bus)

    all_at_once(*[stream, cancel] * 8)
    assert len(provider.calls) == 8
    assert (len(found), len(set(found))) == (16, 2)


FORKED = """
import os, signal
from chatstream import Service
from chatstream.service.lifetime import time_to_drain
from chatstream.settings.table import Settings
service = Service(Settings(max_streams=4))
with service._lifetime.making():
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
from chatstream.service.lifetime import time_to_drain
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
    assert told(iterable) == ("shutting_down", 503)
    assert len(provider.calls) == 0


def test_stop_closes_the_idle_connections(service: MakeService) -> None:
    """A connection that waits for its next stream is closed with the service."""
    there = Provider(always_says(WHOLE))
    us = service(upstream_url=there.url)
    assert walked(us.open(PAYLOAD)) == EVENT + DONE
    assert not there.closed.wait(0.05)
    us.stop()
    assert there.closed.wait(5)
    there.stop()


LEAVES = """
import os, sys
from chatstream import Service
from chatstream.service.lifetime import time_to_drain
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
    assert told(iterable) == ("shutting_down", 503)
    assert time.monotonic() - began >= (0 if at_once else drain)
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
    assert told(us.open(PAYLOAD)) == ("shutting_down", 503)
    assert len(provider.calls) == 0


@pytest.mark.parametrize(("graceful", "seconds"), [(None, 25.0), (30, 25.0), (20, 17.0), (2, 0.0)])
def test_a_drain_is_within_graceful_timeout(
    monkeypatch: pytest.MonkeyPatch, graceful: int | None, seconds: float
) -> None:
    """Else gunicorn would kill the worker, and no stream had an ending."""
    worker = SimpleNamespace(cfg=SimpleNamespace(graceful_timeout=graceful))
    monkeypatch.setattr(server, "gunicorn_worker", lambda: worker if graceful else None)
    assert time_to_drain(25.0) == seconds


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
