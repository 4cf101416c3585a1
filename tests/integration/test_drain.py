"""The end of a worker: new requests go elsewhere, streams finish or are told, and no line lies."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import SHUT_DOWN, Client
from tests.integration.conftest import Rig, serving
from tests.integration.processes import Provider, Server, awaits_events, ends, is_running

DRAIN = 1.2
"""Seconds, for the tests here."""

HOOK = "from chatstream.workers.draining import post_worker_init\n"


@dataclass(frozen=True)
class Setting:
    """How a server is run: our configuration, somebody's, and somebody's with --preload."""

    worker_class: str
    foreign: bool = False
    preload: bool = False
    detach: bool = True

    def command(self, folder: Path) -> tuple[list[str], list[str] | None]:
        """Options, and the command itself where it is not ours."""
        if not self.foreign:
            return [], None
        config = folder / "foreign.conf.py"
        config.write_text(HOOK if self.preload else "")
        options = ["--worker-class", self.worker_class, "--threads", "8"]
        options += ["--preload"] if self.preload else []
        whole = ["gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--config"]
        return options, [*whole, str(config)]


SETTINGS = {
    "ours-gthread": Setting("gthread"),
    "ours-iterable": Setting("gthread", detach=False),
    "ours-gevent": Setting("gevent"),
    "foreign-gthread": Setting("gthread", foreign=True),
    "foreign-gevent": Setting("gevent", foreign=True),
    "preload-gthread": Setting("gthread", foreign=True, preload=True),
    "preload-gevent": Setting("gevent", foreign=True, preload=True),
}


@contextlib.contextmanager
def running(
    name: str, folder: Path, provider: Provider, *options: str, **environ: str
) -> Iterator[Rig]:
    """A server as the setting of that name has it, and what every end of a worker leaves."""
    setting = SETTINGS[name]
    own, command = setting.command(folder)
    environ = {
        "CHATSTREAM_WORKER_CLASS": setting.worker_class,
        "CHATSTREAM_DETACH": str(int(setting.detach)),
        "CHATSTREAM_DRAIN": str(DRAIN),
        "CHATSTREAM_MAX_STREAMS": "6",
        **environ,
    }
    log = folder / "server.log"
    with serving(log, provider, *own, *options, command=command, **environ) as rig:
        yield rig
        server = rig.server
        assert [line for line in server.errors() if "SIGKILL" not in line] == []  # gunicorn's own
        # gunicorn loses a SIGTERM that comes before a worker has its handlers.
        eventually(lambda: server.workers and server.worker, "the next worker")


class Streams:
    """One stream that will be whole in time, and one in each phase of those that will not."""

    LEFT = ("chatty", "silent", "headers")

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.worker = rig.server.worker
        self._short = self._begin("short", rate=20, tokens=12)
        self._chatty = self._begin("chatty", rate=20, tokens=5000)
        self._silent = self._begin("silent", silent_after=1)
        self._headers = rig.client().post(
            "headers", simulate={"id": "headers", "headers_after": 60}
        )
        rig.provider.request("headers")

    def _begin(self, name: str, **simulate: object) -> Client:
        client = self._rig.client().post(name, simulate={"id": name, **simulate})
        client.until(b'"content"')
        client.head()
        return client

    def assert_told(self) -> None:
        """Those that are left get their error, and the provider a closed connection."""
        assert self._chatty.body().endswith(SHUT_DOWN)
        assert self._silent.body().endswith(SHUT_DOWN)
        status, headers = self._headers.head()
        assert status == 503
        assert headers["retry-after"] == "1"
        assert b'"reason": "shutting_down"' in self._headers.exactly(int(headers["content-length"]))
        for name in self.LEFT:
            assert self._rig.provider.request(name, "closed")["closed_by"] == "client"
            assert " aborted by shutdown cause=shutdown " in self._rig.server.ending_of(name)

    def assert_the_short_one_is_whole(self) -> None:
        assert self._short.body().endswith(b"data: [DONE]\n\n")
        assert " completed " in self._rig.server.ending_of("short")


@pytest.mark.parametrize("name", SETTINGS)
def test_sigterm_drains(name: str, tmp_path: Path, provider: Provider) -> None:
    """Case 37: who can finish does; the rest is told when CHATSTREAM_DRAIN is over, not before."""
    with running(name, tmp_path, provider) as rig:
        streams = Streams(rig)
        began = time.monotonic()
        os.kill(streams.worker, signal.SIGTERM)
        streams.assert_the_short_one_is_whole()
        streams.assert_told()
        assert time.monotonic() - began >= DRAIN
        rig.close_clients()
        eventually(lambda: not is_running(streams.worker), "the worker's end")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGQUIT) for name in SETTINGS),
        *((name, signal.SIGINT) for name in ("ours-gthread", "ours-gevent")),
    ],
)
def test_sigquit_and_sigint_end_at_once(
    name: str, number: signal.Signals, tmp_path: Path, provider: Provider
) -> None:
    """Without draining: but each client is told, and each stream has its line."""
    with running(name, tmp_path, provider, CHATSTREAM_DRAIN="3600") as rig:
        streams = Streams(rig)
        # gunicorn's own gthread takes its pool's lock in the handler: it would wait for ever if its
        # main thread were just starting a thread for the last stream.
        eventually(lambda: awaits_events(streams.worker), "a main thread that waits")
        os.kill(streams.worker, number)
        streams.assert_told()
        assert " aborted by shutdown " in rig.server.ending_of("short")
        rig.close_clients()
        eventually(lambda: not is_running(streams.worker), "the worker's end")


@pytest.mark.parametrize("name", ["ours-gthread", "ours-gevent"])
def test_sigquit_with_clients_that_do_not_read(
    name: str, tmp_path: Path, provider: Provider
) -> None:
    """They hold nothing up for long, and their streams have their lines too."""
    with running(name, tmp_path, provider) as rig:
        worker = rig.server.worker
        for number in range(3):
            client = rig.client(receive_buffer=4096)
            flood = {"id": f"stuck-{number}", "rate": 0, "pad": 16384, "tokens": 100_000}
            client.post(f"stuck-{number}", simulate=flood)
            provider.request(f"stuck-{number}", "delivered", count=8)
        os.kill(worker, signal.SIGQUIT)
        for number in range(3):
            assert " aborted by shutdown " in rig.server.ending_of(f"stuck-{number}")
            assert provider.request(f"stuck-{number}", "closed")["closed_by"] == "client"
        eventually(lambda: not is_running(worker), "the worker's end")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ours-gthread", "/hello"),
        ("ours-gevent", "/hello"),
        ("foreign-gthread", "/hello"),
        ("foreign-gevent", "/hello"),
        ("ours-gthread", "/beside"),  # no hook of Flask's sees it
        ("ours-gevent", "/beside"),
    ],
)
def test_max_requests_drains(name: str, path: str, tmp_path: Path, provider: Provider) -> None:
    """gunicorn sends no signal then; what is running is drained all the same."""
    with running(name, tmp_path, provider, "--max-requests", "20") as rig:
        streams = Streams(rig)
        for _ in range(20):
            with contextlib.suppress(OSError):  # the worker has stopped listening
                rig.server.get(path)
            if "Autorestarting worker" in rig.server.log():
                break
        streams.assert_the_short_one_is_whole()
        streams.assert_told()
        rig.close_clients()
        eventually(lambda: not is_running(streams.worker), "the worker's end")


@pytest.mark.parametrize("name", ["ours-gthread", "ours-gevent"])
def test_a_reload(name: str, tmp_path: Path, provider: Provider) -> None:
    """HUP: the next request is a new worker's, while the old one's stream goes on to its end."""
    with running(name, tmp_path, provider, CHATSTREAM_DRAIN="20") as rig:
        old = rig.server.worker
        client = rig.client().post("old", simulate={"rate": 20, "tokens": 60})
        client.until(b'"content"')
        os.kill(rig.server.pid, signal.SIGHUP)
        eventually(lambda: rig.server.workers not in ([], [old]), "a new worker")
        eventually(lambda: rig.server.worker != old, "its answer")
        assert not [line for line in rig.server.lines_of("old") if ends(line)], "too slow to tell"
        assert rig.server.cancel("nobody")[0] == 404
        client.until(b"data: [DONE]")
        assert " completed " in rig.server.ending_of("old")


@pytest.mark.parametrize("name", ["ours-gthread", "ours-gevent"])
def test_a_cancel_reaches_a_draining_worker(name: str, tmp_path: Path, provider: Provider) -> None:
    """Stop AI works in the middle of a deploy, over the new worker."""
    with running(name, tmp_path, provider, CHATSTREAM_DRAIN="20") as rig:
        old = rig.server.worker
        client = rig.client().post("old", simulate={"id": "old", "silent_after": 1})
        client.until(b'"content"')
        os.kill(rig.server.pid, signal.SIGHUP)
        eventually(lambda: rig.server.workers not in ([], [old]), "a new worker")
        eventually(lambda: rig.server.worker != old, "its answer")
        assert rig.server.cancel("old")[0] == 200
        assert rig.provider.request("old", "closed")["closed_by"] == "client"
        assert " aborted by client/cancel cause=cancel " in rig.server.ending_of("old")


@pytest.mark.parametrize("name", ["ours-gthread", "ours-gevent"])
def test_the_drain_is_within_graceful_timeout(
    name: str, tmp_path: Path, provider: Provider
) -> None:
    """A longer one is cut, so that gunicorn has nothing to kill."""
    options = ["--graceful-timeout", "4"]
    with running(name, tmp_path, provider, *options, CHATSTREAM_DRAIN="600") as rig:
        streams = Streams(rig)
        os.kill(streams.worker, signal.SIGTERM)
        streams.assert_told()


EARLY = """
import os, signal
from pathlib import Path
from chatstream.workers.gevent import GeventWorker

class worker_class(GeventWorker):
    def patch(self):
        if not Path(os.environ["EARLY"]).exists():
            Path(os.environ["EARLY"]).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        super().patch()
"""


def test_a_sigterm_while_gevent_patches(tmp_path: Path, provider: Provider) -> None:
    """It is not lost, as it is in gunicorn's own: the worker ends, and another one serves."""
    config = tmp_path / "early.conf.py"
    config.write_text(EARLY)
    command = ["gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--config", str(config)]
    environ = {"EARLY": str(tmp_path / "early"), "CHATSTREAM_UPSTREAM_URL": provider.url}
    server = Server(tmp_path / "server.log", command=command, **environ)
    try:
        eventually(lambda: server.log().count("Booting worker") == 2, "a second worker")
        assert server.log().count("Worker exiting") == 1
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["ours-gthread", "ours-gevent"])
def test_sigkill(name: str, tmp_path: Path, provider: Provider) -> None:
    """Nobody can say anything any more; the kernel closes or resets, and the provider sees it."""
    with running(name, tmp_path, provider) as rig:
        os.kill(Streams(rig).worker, signal.SIGKILL)
        for stream in ("short", *Streams.LEFT):
            # A reset where bytes had come that nobody had read.
            assert rig.provider.request(stream, "closed")["closed_by"] in ("client", "reset")
        assert not [line for line in rig.server.log().splitlines() if ends(line)]
