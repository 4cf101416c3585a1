"""Peers that vanish without a FIN, for real: a link in the middle goes down, and all wait at once.

The server is in one network namespace, who vanishes in another, and a router between them.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Rig
from tests.integration.namespaces import FAR, NEAR, Road, require_namespaces
from tests.integration.processes import Provider, Server, ends
from tests.integration.servers import SERVERS, run

pytestmark = pytest.mark.timeout(150)  # the first test waits for all

WITHIN = 45.0
"""Seconds from the cut to the end of a stream whose peer it took."""

NOT_YET = 26.0
"""Seconds after the cut at which a client that is there and does not read has not vanished."""

TOKENS: dict[str, object] = {"rate": 20, "tokens": 5000}
SILENT = {**TOKENS, "silent_after": 2}
FULL: dict[str, object] = {"rate": 500, "tokens": 100_000, "pad": 16384}


@dataclass
class Case:
    """One stream, and what is known of it when all is over."""

    rig: Rig
    session: str
    client: Client
    begun: float  # an instant, as all that follow
    provider_saw: float | None = None
    body: bytes = b""
    lines_then: tuple[str, ...] = ()  # of the log, NOT_YET after the cut

    @property
    def ending(self) -> str:
        lines = [line for line in self.rig.server.lines_of(self.session) if ends(line)]
        assert len(lines) == 1, lines
        return lines[0]

    @property
    def ended(self) -> float:
        (duration,) = re.findall(r" duration=([0-9.]+)", self.ending)
        return self.begun + float(duration)

    def has_ended(self) -> bool:
        return any(ends(line) for line in self.rig.server.lines_of(self.session))


class Story:
    """The servers, the streams, the cut, and the wait. Told from within the near namespace."""

    def __init__(self, road: Road, folder: Path, stack: contextlib.ExitStack) -> None:
        self._road, self._folder, self._stack = road, folder, stack
        self.rigs: list[Rig] = []
        self.others: list[Rig] = []
        self.cases: dict[tuple[str, str], Case] = {}
        self.cut = 0.0
        self.heard = -1
        """Packets to the near side after the cut."""
        with road.far.entered():
            self.far_provider = self._provider(host="0.0.0.0")  # it is asked by its loopback
        for kind in ("gthread", "gevent"):
            self._begin(kind)
        for name in SERVERS:
            self._begin_any(name)
        # Last: a client that takes no bytes and is not cut off in time has stalled.
        for kind, rig in zip(("gthread", "gevent"), self.rigs[::3], strict=True):
            self._from_far(rig, kind, "full", FULL, receive_buffer=4096)
            self._stream(rig, kind, "there but full", FULL, rig.client(receive_buffer=4096))

    def _provider(self, **options: str) -> Provider:
        provider = Provider(**options)
        self._stack.callback(provider.close)
        return provider

    def _begin(self, kind: str) -> None:
        """Every stream of a worker class, in the middle of its scene."""
        rig = self._rig(kind, self._provider())
        self._from_far(rig, kind, "silent", SILENT)
        self._from_far(rig, kind, "chatty", TOKENS)
        rig = self._rig(kind, self._provider(), CHATSTREAM_PING_INTERVAL="600")
        self._from_far(rig, kind, "never pinged", SILENT)
        url = f"http://{FAR}:{self.far_provider.port}/v1/chat/completions"
        rig = self._rig(kind, None, CHATSTREAM_UPSTREAM_URL=url)
        self._stream(rig, kind, "provider in the body", SILENT, rig.client(timeout=60))
        self._stream(
            rig, kind, "provider before the headers", {"headers_after": 600}, rig.client(timeout=60)
        )

    def _begin_any(self, name: str) -> None:
        """One silent stream of a server of that name, whose client is far."""
        provider, log = self._provider(), self._folder / f"{name}.log"
        anywhere = "0.0.0.0"  # it is asked by its loopback
        rig = self._stack.enter_context(run(SERVERS[name], log, provider, host=anywhere))
        self.others.append(rig)
        self._stream_from_far(rig, rig.server.port, name, "any", SILENT)

    def _rig(self, kind: str, provider: Provider | None, **environ: str) -> Rig:
        if provider is not None:
            environ["CHATSTREAM_UPSTREAM_URL"] = provider.url
        log = self._folder / f"{kind}-{len(self.rigs)}.log"
        server = Server(log, "--bind", f"{NEAR}:0", CHATSTREAM_WORKER_CLASS=kind, **environ)
        self._stack.callback(server.stop)
        self.rigs.append(Rig(server, provider))
        self._stack.callback(self.rigs[-1].close_clients)
        if provider is not None:
            self.rigs[-1].warm_up(answers=True)
        return self.rigs[-1]

    def _from_far(
        self, rig: Rig, kind: str, name: str, simulate: dict[str, object], **options: int
    ) -> None:
        """A stream whose client is going to vanish."""
        (port,) = re.findall(rf"http://{NEAR}:(\d+)", rig.server.log())
        self._stream_from_far(rig, int(port), kind, name, simulate, **options)

    def _stream_from_far(
        self,
        rig: Rig,
        port: int,
        kind: str,
        name: str,
        simulate: dict[str, object],
        **options: int,
    ) -> None:
        with self._road.far.entered():
            client = Client(port, host=NEAR, **options)
        rig.clients.append(client)
        self._stream(rig, kind, name, simulate, client)

    def _stream(
        self, rig: Rig, kind: str, name: str, simulate: dict[str, object], client: Client
    ) -> None:
        session = f"{kind}-{name.replace(' ', '-')}"
        self.cases[kind, name] = Case(rig, session, client, time.monotonic())
        client.post(session, simulate={"id": session, **simulate})
        if simulate is FULL:
            eventually(lambda: self._is_full(rig, client), "a full send queue")
        elif "headers_after" in simulate:
            with self._road.far.entered():
                self.far_provider.request(session)
        else:
            client.until(b"data: ")
            client.until(b"data: ")

    @staticmethod
    def _is_full(rig: Rig, client: Client) -> bool:
        def queue() -> bytes:
            return rig.server.get(f"/debug/send-queue/{client.port}")[1]

        first = queue()
        return int(first) > 0 and all(queue() == first for _ in range(20))

    def play(self) -> None:
        self._road.cut()
        self.cut, sent = time.monotonic(), self._road.router.packets_sent()
        eventually(self._is_later, "its time", NOT_YET + 1)
        for (_, name), case in self.cases.items():
            case.lines_then = tuple(case.rig.server.lines_of(case.session))
            if name == "there but full":
                case.client.close()
        # One that does not end in time fails its own test, and not all of them here.
        eventually(self._is_over, "the end", WITHIN + 10 - NOT_YET)
        self.heard = self._road.router.packets_sent() - sent
        for (_, name), case in self.cases.items():
            if not case.has_ended():
                continue
            if name.startswith("provider"):
                case.client.head()
                case.body = case.client.body()
            else:
                figure = case.rig.provider.request(case.session, "closed")
                case.provider_saw = figure["closed_ns"] / 1e9

    def _is_over(self) -> bool:
        late = time.monotonic() > self.cut + WITHIN + 5
        return late or all(case.has_ended() for case in self.cases.values())

    def _is_later(self) -> bool:
        return time.monotonic() > self.cut + NOT_YET


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """All that vanishes, and the wait for it."""
    require_namespaces()
    with contextlib.ExitStack() as stack:
        road = Road()
        stack.callback(road.close)
        stack.enter_context(road.near.entered())
        story = Story(road, tmp_path_factory.mktemp("vanished"), stack)
        story.play()
        yield story


@pytest.fixture(params=["gthread", "gevent"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", ["silent", "chatty", "full", "never pinged"])
def test_a_client_that_vanished(story: Story, kind: str, name: str) -> None:
    """The provider sees the close within 45 s, with every setting as it comes."""
    case = story.cases[kind, name]
    assert "aborted by client/cancel cause=client" in case.ending
    assert case.provider_saw is not None
    print(f"\n{kind}, {name}: {case.provider_saw - story.cut:.1f} s after the cut")
    assert 0 < case.provider_saw - story.cut < WITHIN
    assert 0 < case.ended - story.cut < WITHIN


@pytest.mark.parametrize("name", SERVERS)
def test_a_client_of_any_server_that_vanished(story: Story, name: str) -> None:
    """As it is, where a server shows the client's connection; no ping says so, there is none."""
    assert SERVERS[name].cell("a client vanishes") == "within 45 s"
    case = story.cases[name, "any"]
    assert "aborted by client/cancel cause=client" in case.ending
    assert case.provider_saw is not None
    print(f"\n{name}: {case.provider_saw - story.cut:.1f} s after the cut")
    assert 0 < case.provider_saw - story.cut < WITHIN


def test_a_client_that_is_there_and_does_not_read_has_not_vanished(story: Story, kind: str) -> None:
    """What it acknowledges is a sign of life, though the kernel's own timeout passes over it."""
    case = story.cases[kind, "there but full"]
    assert [line for line in case.lines_then if ends(line)] == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("provider in the body", "upstream_truncated"),
        ("provider before the headers", "upstream_unreachable"),
    ],
)
def test_a_provider_that_vanished(story: Story, kind: str, name: str, code: str) -> None:
    """Its stream fails within 45 s, long before a timeout of ours, and the client is told."""
    case = story.cases[kind, name]
    print(f"\n{kind}, {name}: {case.ended - story.cut:.1f} s after the cut")
    assert f" failed: {code} " in case.ending
    assert 0 < case.ended - story.cut < WITHIN
    assert case.body.count(b"event: error\n") == 1
    assert f'"code": "{code}"'.encode() in case.body


def test_nobody_said_goodbye(story: Story) -> None:
    """After the cut nothing came to the servers: no FIN, no RST, no ICMP."""
    assert story.heard == 0


def test_nothing_is_left(story: Story) -> None:
    """Slots, threads and descriptors are back, and the logs have no traceback."""
    for rig in story.rigs:
        assert rig.server.errors() == []
        if rig.provider is not None:
            rig.check_leaks()
        else:
            facts = rig.server.debug()
            assert [facts[name] for name in ("slots", "live", "calls")] == [0, 0, []]
    for rig in story.others:
        assert rig.server.errors() == []
        assert rig.server.debug()["slots"] == 0
