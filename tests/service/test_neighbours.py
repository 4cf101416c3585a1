"""neighbours: what is asked of the other workers, and what they ask of us."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flask
import pytest
import responses

from chatstream import (
    BusUnavailable,
    Busy,
    Cause,
    ChatStream,
    ConfigError,
    Refused,
    Service,
    StreamIterable,
    Unconfirmed,
)
from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Action, Answer, Claim, Enquiry, Name, Request, Worker
from chatstream.bus.unix.directory import service_directory
from chatstream.errors import conflict, too_many
from chatstream.settings.table import Settings
from tests.conftest import descriptors, eventually
from tests.service.wiring import (
    DONE,
    EVENT,
    PAYLOAD,
    URL,
    Lines,
    MakeService,
    others,
    walked,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


# A stop


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


BROKEN = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (Unconfirmed(), Unconfirmed, []),
        (BusUnavailable(), BusUnavailable, []),
        (BROKEN, BusUnavailable, ["[bus] fake: [Errno 28] No space left on device"]),
    ],
    ids=repr,
)
def test_a_stop_that_cannot_be_confirmed_says_so(
    service: MakeService,
    lines: Lines,
    error: Exception,
    raised: type[Exception],
    said: list[str],
) -> None:
    """Neither True nor False: it is raised. The system's own errors are a line for people, too.

    A stream of this worker needs no bus for its stop: nobody else is asked.
    """
    us = service()
    bus = others(us)
    bus.answer = error
    with pytest.raises(raised) as caught:
        us.abort("s-1", "t-1")
    assert caught.value.__cause__ is (BROKEN if error is BROKEN else None)
    assert lines() == said
    iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1")
    assert us.abort("s-1", "t-1") is True
    assert iterable.stream.cause is Cause.CANCEL
    assert len(bus.asked) == 1
    iterable.close()


# A claim


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


@pytest.mark.parametrize("here", [False, True], ids=["elsewhere", "here"])
def test_a_cancel_that_came_before_its_stream(
    service: MakeService, provider: responses.RequestsMock, lines: Lines, here: bool
) -> None:
    """Whoever remembers it, the stream is born cancelled: no call, an empty body, its line."""
    us = service()
    if here:
        assert us.abort("s-1", "t-1") is False
    else:
        others(us).early = True
    assert walked(us.open(PAYLOAD, session_id="s-1", stream_id="t-1")) == b""
    assert len(provider.calls) == 0
    assert lines()[-1].startswith("[SSE] s-1 aborted by client/cancel cause=cancel phase=new ")


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
    "error",
    [None, conflict("stream"), Unconfirmed(), KeyError("t-1"), KeyboardInterrupt()],
    ids=["live here", "live elsewhere", "unconfirmed", "a fault", "an end"],
)
def test_a_stream_that_is_refused_leaves_no_trace(
    service: MakeService,
    provider: responses.RequestsMock,
    lines: Lines,
    error: BaseException | None,
) -> None:
    """No name, no slot, no line and no descriptor, and no deadline: the next one has all it needs.

    Here, or whatever a claim raises, also where that is a fault of the bus or the end of the
    thread.
    """
    us = service(
        max_streams=2, stream_deadline=60.0, on_conflict="supersede" if error else "reject"
    )
    bus = others(us)
    us.open(PAYLOAD).close()
    live = None if error else us.open(PAYLOAD, session_id="s-1")
    bus.released.clear()
    said, held = lines(), len(us.registry)
    bus.early = error or False
    server, client = socket.socketpair()
    before = descriptors()
    for _ in range(3):
        with pytest.raises(type(error) if error else Refused):
            us.open(PAYLOAD, session_id="s-1", stream_id="t-1", environ={"gunicorn.socket": server})
    server.close()
    client.close()
    eventually(lambda: descriptors() <= before)  # two less for the pair, two for the loop
    assert us.registry.find("", "s-1") is (live.stream if live else None)
    assert us.registry.find("", "s-1", "t-1") is None
    assert (len(us.registry), bus.released, lines()) == (held, [], said)
    bus.early = False
    if live:
        live.close()
    assert walked(us.open(PAYLOAD, session_id="s-1", stream_id="t-1")) == EVENT + DONE


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


def test_a_stream_needs_no_bus(
    service: MakeService, provider: responses.RequestsMock, lines: Lines
) -> None:
    """A bus that fails keeps no stream from starting, with a limit neither, and takes no slot."""
    us = service(max_streams=1, max_streams_per_owner=1)
    bus = others(us)
    bus.early = OSError("broken")

    def fail() -> None:
        raise OSError("broken")

    bus.on_release = fail
    for _ in range(2):
        assert walked(us.open(PAYLOAD, session_id="s-1")) == EVENT + DONE
    assert lines()[0] == "[bus] fake: broken"
    assert lines()[-1].startswith("[SSE] s-1 completed ")


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


# What they ask for


def test_what_another_worker_asks_for(service: MakeService) -> None:
    """A probe looks, a cancel and a supersede stop, each with its cause, and only what is live."""
    us = service()
    others(us)
    for action, cause in ((Action.CANCEL, Cause.CANCEL), (Action.SUPERSEDE, Cause.SUPERSEDED)):
        iterable = us.open(PAYLOAD, session_id="s-1", stream_id="t-1", owner="me")
        for names in (("me", "s-1", None), ("me", None, "t-1"), ("me", "s-1", "t-1")):
            assert us._neighbours.receive(Request(Action.PROBE, *names)) is Answer.LIVE
        for names in (("you", "s-1", None), ("me", "s-2", "t-1"), ("me", "s-1", "t-2")):
            assert us._neighbours.receive(Request(action, *names)) is Answer.ABSENT
        assert not iterable.stream.ended
        assert us._neighbours.receive(Request(action, "me", "s-1", "t-1")) is Answer.STOPPED
        assert iterable.stream.cause is cause
        assert us._neighbours.receive(Request(action, "me", "s-1", "t-1")) is Answer.ABSENT
        assert us._neighbours.receive(Request(Action.PROBE, "me", "s-1", "t-1")) is Answer.ABSENT
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
            assert us._neighbours.receive(early) is answer
            probe = Request(Action.PROBE, *names, before=began - 0.001)
            assert us._neighbours.receive(probe) is Answer.LIVE
        assert not iterable.stream.ended
        late = Request(action, "me", "s-1", before=began)
        assert us._neighbours.receive(late) is Answer.STOPPED
        assert iterable.stream.ended
        assert us._neighbours.receive(Request(action, "me", "s-1", before=0.0)) is Answer.ABSENT
        iterable.close()


@pytest.mark.usefixtures("provider")
def test_what_began_after_the_request_is_not_meant(service: MakeService) -> None:
    """A stop of all that is read late: as for any other request."""
    us = service(max_streams=4)
    old = us.open(PAYLOAD)
    between = time.monotonic()
    new = us.open(PAYLOAD)
    stopped = [*us._neighbours.lives(Enquiry(stop=True, before=between))]
    assert [live.number for live in stopped] == [old.stream.number]
    assert not new.stream.ended
    assert [live.number for live in us._neighbours.lives(Enquiry())] == [new.stream.number]
    old.close()
    new.close()


# What lives


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
    assert [live.number for live in us._neighbours.lives(Enquiry(after=1))] == [2]
    for stream in (one, two):
        stream.close()


@pytest.mark.parametrize("stop", [False, True])
def test_a_listing_shows_how_far_a_stream_is(
    service: MakeService, provider: responses.RequestsMock, stop: bool
) -> None:
    """Its events so far, and its phase: as they were, where it is stopped."""
    provider.replace(responses.POST, URL, body=EVENT, content_type="text/event-stream")
    us = service(max_streams=4)
    stream = us.open(PAYLOAD)
    assert next(stream) == EVENT
    (live,) = us._neighbours.lives(Enquiry(stop=stop))
    assert (live.phase, live.events) == ("sending", 1)
    assert live.seconds >= 0
    assert stream.stream.ended is stop
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
def test_where_the_others_cannot_be_reached(service: MakeService, error: Exception) -> None:
    """What is here is not passed for all there is; what is to be stopped here is."""
    us = service(max_streams=4)
    bus = others(us)
    bus.workers = error
    stream = us.open(PAYLOAD)
    for ask in (us.sessions, us.check_bus, lambda: us.cancel_all("")):
        assert not stream.stream.ended
        with pytest.raises(BusUnavailable):
            ask()
    assert stream.stream.cause is Cause.CANCEL
    bus.workers = []
    us.check_bus()
    stream.close()


# Joining them


SERVICE = """
import sys
from chatstream import Service
from chatstream.service.lifetime import time_to_drain
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


def cancel(us: Service) -> None:
    assert us.abort("s-1", "t-1") is True


def supersede(us: Service) -> None:
    us.open(PAYLOAD, session_id="s-1").close()


def be_refused(us: Service) -> None:
    with pytest.raises(Refused):
        us.open(PAYLOAD, session_id="s-1")
    assert len(us.registry) == 0


@pytest.mark.parametrize(
    ("act", "on_conflict", "cause"),
    [
        (cancel, "supersede", Cause.CANCEL),
        (supersede, "supersede", Cause.SUPERSEDED),
        (be_refused, "reject", None),
    ],
)
def test_what_reaches_another_process(
    service: MakeService,
    worker: subprocess.Popen[str],
    tmp_path: Path,
    act: Callable[[Service], None],
    on_conflict: str,
    cause: Cause | None,
) -> None:
    """A worker that has had no stream yet has joined with its first cancel, and its first stream.

    One session, one stream, whichever workers the two requests came to.
    """
    act(service(bus=f"unix://{tmp_path}", on_conflict=on_conflict))
    assert worker.communicate("\n", timeout=10)[0].strip() == str(cause)


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


def away(tmp_path: Path) -> Path:
    """What keeps a bus from starting: it is where the user's directory should be."""
    in_the_way = service_directory(tmp_path, "service", "0").parent
    in_the_way.touch()
    return in_the_way


def test_a_bus_that_cannot_start(
    service: MakeService, provider: responses.RequestsMock, tmp_path: Path, lines: Lines
) -> None:
    """One line for people. Streams run and can be stopped; of another's nothing can be said."""
    us = service(bus=f"unix://{tmp_path}")
    in_the_way = away(tmp_path)
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
    monkeypatch.setattr("chatstream.bus.unix.membership._REJOIN", 0.02)
    us = service(bus=f"unix://{tmp_path}")
    in_the_way = away(tmp_path)
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
    in_the_way = away(tmp_path)
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
    assert us._neighbours.bus is starts[-1]


# Two apps of a process


NAMES = """
import flask
from chatstream import ChatStream
for import_name, prefix in (("a", "/x"), ("a", "/x"), ("b", "/x"), ("a", "/y")):
    app = flask.Flask(import_name)
    app.config["CHATSTREAM_URL_PREFIX"] = prefix
    ChatStream(app)
    print(app.extensions["chatstream"].name)
"""


def test_each_app_has_a_name_of_its_own_in_all_workers() -> None:
    """Also where they look the same; made of what each worker has alike, whatever its hashes."""
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
    names = runs[0]
    assert all(re.fullmatch("[0-9a-f]{8}[0-9]", name) for name in names)
    assert names[0][:8] == names[1][:8]
    assert len({name[:8] for name in names}) == 3
    assert [name[8:] for name in names] == ["1", "2", "1", "1"]


@pytest.mark.parametrize("bus", ["unix:///nowhere/at/all", "unix:///" + "x" * 100])
def test_a_bus_that_cannot_be_stops_the_start(bus: str) -> None:
    """ConfigError at init_app, and nothing is mounted."""
    app = flask.Flask("host")
    app.config["CHATSTREAM_BUS"] = bus
    with pytest.raises(ConfigError, match=r"^CHATSTREAM_BUS: "):
        ChatStream(app)
    assert "chatstream" not in app.blueprints
    assert "chatstream" not in app.extensions
