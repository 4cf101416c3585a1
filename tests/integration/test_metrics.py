"""Figures: sums over all workers, by whichever is asked, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import eventually
from tests.integration.conftest import Fleet, serving_fleet
from tests.integration.processes import OURS, ROOT, Provider, Server, is_running

Rigs = Callable[..., Fleet]

TWO = {"WEB_CONCURRENCY": "2", "CHATSTREAM_METRICS": "/metrics"}

numbers = itertools.count(1)


class Scrape:
    """What a worker shows."""

    def __init__(self, text: str) -> None:
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of what has these labels."""
        name, wanted = f"chatstream_{name}", frozenset(labels.items())
        return sum(
            value for (n, has), value in self._samples.items() if n == name and wanted <= has
        )

    def has(self, name: str, **labels: str) -> bool:
        """Whether it is shown at all."""
        name, wanted = f"chatstream_{name}", frozenset(labels.items())
        return any(n == name and wanted <= has for n, has in self._samples)

    def labels(self, name: str) -> set[str]:
        """The labels of a figure's samples; none if there is no such figure."""
        return {key for n, has in self._samples if n == name for key, _ in has}

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self._samples}


def scrape(server: Server) -> Scrape:
    """By whichever worker takes the connection."""
    status, body = server.get("/metrics")
    assert status == 200
    return Scrape(body.decode())


@pytest.fixture
def fleet(rigs: Rigs, worker_class: str) -> Iterator[Fleet]:
    """Two workers that show figures."""
    fleet = rigs("fleet", worker_class, **TWO)
    fleet.ready()
    yield fleet
    fleet.check_leaks()


def named() -> str:
    return f"metrics-{next(numbers)}"


def completed(fleet: Fleet, worker: int) -> None:
    client = fleet.client_of(worker)
    client.post(
        named(), simulate={"tokens": 3, "rate": 1000}, stream_options={"include_usage": True}
    )
    client.head()
    client.body()


def failed(fleet: Fleet, worker: int) -> None:
    client = fleet.client_of(worker)
    client.post(named(), simulate={"status": 500})
    assert client.head()[0] == 502


def left(fleet: Fleet, worker: int) -> None:
    client = fleet.client_of(worker)
    client.post(
        named(), simulate={"tokens": 1, "silent_after": 1, "rate": 1000, "silent_for": None}
    )
    client.head()
    client.close()


def cancelled(fleet: Fleet, worker: int) -> None:
    """By the other worker."""
    session = named()
    client = fleet.client_of(worker)
    client.post(session, simulate={"tokens": 2, "silent_after": 1, "rate": 1000})
    client.head()
    assert fleet.cancel(session, at=fleet.worker(worker))[0] == 200


def live(fleet: Fleet, worker: int, count: int) -> None:
    for _ in range(count):
        client = fleet.client_of(worker)
        client.post(named(), simulate={"tokens": 2, "silent_after": 1, "rate": 1000})
        client.head()


def test_any_worker_shows_the_sums_of_all(fleet: Fleet) -> None:
    """Streams of every ending, in each of two workers: both of these show the same sums."""
    before = scrape(fleet.server)
    for worker in fleet.server.workers:
        for scene in (completed, failed, left, cancelled):
            scene(fleet, worker)
    fleet.cancel("nobody")

    def shown() -> Scrape | None:
        now = scrape(fleet.server)
        return now if now("outcomes_total") - before("outcomes_total") == 8 else None

    eventually(shown, "eight outcomes")
    for worker in fleet.server.workers:
        status, _, body = fleet.client_of(worker).ask("GET", "/metrics")
        assert status == 200
        after = Scrape(body.decode())

        def more(name: str, after: Scrape = after, **labels: str) -> float:
            return after(name, **labels) - before(name, **labels)

        assert more("outcomes_total", kind="completed", cause="", code="", phase="body") == 2
        assert more("outcomes_total", kind="failed", code="upstream_error", phase="headers") == 2
        assert more("outcomes_total", kind="aborted", cause="client", phase="body") == 2
        assert more("outcomes_total", kind="aborted", cause="cancel", phase="body") == 2
        assert more("stop_seconds_count") == more("stop_seconds_bucket", le="+Inf") == 4
        assert 0 < more("stop_seconds_sum") < 1
        assert more("headers_seconds_count") == more("first_event_seconds_count") == 6
        assert more("cancels_total", answer="stopped") == 2
        assert more("cancels_total", answer="not_found") == 1
        assert more("cancels_total") == more("cancel_seconds_count") == 3
        assert more("tokens_delivered_total", estimated="false") == 6  # the provider's word
        assert more("tokens_delivered_total", estimated="true") == 4  # of one each, stopped
        assert more("events_delivered_total") >= 2 * (3 + 1 + 1)
        assert more("bytes_delivered_total") > 1000
        assert after("workers") == 2


def test_what_lives_is_shown_while_it_does(fleet: Fleet) -> None:
    """Live streams and their slots, in both workers; when they are over there are none."""
    for worker in fleet.server.workers:
        live(fleet, worker, 2)
    assert scrape(fleet.server)("live_streams") == 4
    assert scrape(fleet.server)("slots_in_use") == 4
    assert scrape(fleet.server)("slots") > 100
    fleet.close_clients()
    eventually(lambda: scrape(fleet.server)("slots_in_use") == 0, "no slot in use")
    assert scrape(fleet.server)("live_streams") == 0


def test_a_killed_workers_streams_are_gone_and_its_sums_stay(
    provider: Provider, log_file: Path, worker_class: str
) -> None:
    """After a SIGKILL the gauges are those of the living; a counter never falls."""
    with serving_fleet(log_file, provider, CHATSTREAM_WORKER_CLASS=worker_class, **TWO) as fleet:
        first, second = fleet.server.workers
        for worker in (first, second):
            completed(fleet, worker)
        live(fleet, first, 3)
        live(fleet, second, 1)
        now = scrape(fleet.server)
        assert (now("live_streams"), now("slots_in_use"), now("workers")) == (4, 4, 2)
        sums = now("outcomes_total"), now("events_delivered_total")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: scrape(fleet.server)("live_streams") == 1, "one live stream")
        eventually(lambda: scrape(fleet.server)("workers") == 2, "a new worker")
        now = scrape(fleet.server)
        assert now("slots_in_use") == 1
        assert (now("outcomes_total"), now("events_delivered_total")) == sums


def test_a_reload_keeps_the_sums(provider: Provider, log_file: Path) -> None:
    """Its workers go on where those before them were; these are no more in the gauges."""
    with serving_fleet(log_file, provider, **TWO) as fleet:
        old = fleet.server.workers
        for worker in old:
            completed(fleet, worker)
        slots = scrape(fleet.server)("slots")
        os.kill(fleet.server.pid, signal.SIGHUP)
        eventually(lambda: not any(map(is_running, old)), "other workers")
        eventually(lambda: scrape(fleet.server)("workers") == 2, "two of them")
        completed(fleet, fleet.worker())
        eventually(lambda: scrape(fleet.server)("outcomes_total") == 3, "three outcomes")
        assert scrape(fleet.server)("slots") == slots
        assert "Traceback" not in fleet.server.log()


def folder_of(server: Server) -> Path:
    """Where a server's figures are."""
    names = eventually(lambda: figures_of(server.workers[0]), "its files")
    (folder,) = {str(Path(name).parent) for name in names}
    return Path(folder)


def figures_of(worker: int) -> list[str]:
    """The files of figures that a worker has open."""
    names = []
    for entry in Path(f"/proc/{worker}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(entry))
    return [name for name in names if name.endswith(".db")]


def test_the_folder_is_the_masters_own(provider: Provider, log_file: Path) -> None:
    """Fresh and private; gone at its end; of one that was killed, at the next start."""
    with serving_fleet(log_file, provider, **TWO) as fleet:
        killed = folder_of(fleet.server)
        assert killed.stat().st_mode & 0o777 == 0o700
        with serving_fleet(log_file.with_name("other.log"), provider, **TWO) as other:
            ended = folder_of(other.server)
            assert ended != killed
            assert killed.exists()  # not swept: it is in use
            completed(other, other.worker())
        assert not ended.exists()
        workers = fleet.server.workers
        os.kill(fleet.server.pid, signal.SIGKILL)
        eventually(lambda: not any(map(is_running, workers)), "no orphans")
    assert killed.exists()
    with serving_fleet(log_file, provider, **TWO) as fleet:
        assert not killed.exists()
        assert scrape(fleet.server)("outcomes_total") == 0


def test_an_upgrade_has_a_folder_of_its_own(provider: Provider, log_file: Path) -> None:
    """USR2: the new master counts anew, also where the old one was reloaded before."""
    pidfile = log_file.with_name("pid")
    # Not -m gunicorn: executed anew, that has the package's own folder in sys.path.
    command = [f"{sysconfig.get_path('scripts')}/gunicorn", *OURS[1:], "--pid", str(pidfile)]
    with serving_fleet(log_file, provider, command=command, **TWO) as fleet:
        old = fleet.server.pid
        completed(fleet, fleet.worker())
        reloaded = fleet.server.workers
        os.kill(old, signal.SIGHUP)
        eventually(lambda: not any(map(is_running, reloaded)), "other workers")
        os.kill(old, signal.SIGUSR2)
        new_pidfile = pidfile.with_name("pid.2")
        new = int(eventually(lambda: new_pidfile.exists() and new_pidfile.read_text(), "a master"))
        try:
            eventually(lambda: fleet.server.log().count("Booting worker") == 6, "its workers")
            fleet.server.terminate()
            eventually(lambda: not is_running(old), "the old one's end")
            assert eventually(lambda: scrape(fleet.server)("workers") == 2, "two workers")
            assert scrape(fleet.server)("outcomes_total") == 0
        finally:
            os.kill(new, signal.SIGTERM)
            eventually(lambda: not is_running(new), "its end")


FOREIGN = """
worker_class = "gthread"
threads = 8
preload_app = {preload}
raw_env = ["CHATSTREAM_METRICS=/metrics"]
from chatstream.workers.draining import post_worker_init
from chatstream.telemetry.metrics import child_exit, on_exit, on_starting, share
share()
"""


@pytest.mark.parametrize("preload", [False, True])
def test_a_configuration_of_ones_own(
    provider: Provider, log_file: Path, tmp_path: Path, preload: bool
) -> None:
    """Two lines in it, and it is as with ours; also where the app is made in the master."""
    config = tmp_path / "foreign.py"
    config.write_text(FOREIGN.format(preload=preload))
    command = ["gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--config", str(config)]
    two = {**TWO, "app": "tests.integration.both:both"}
    with serving_fleet(log_file, provider, command=command, **two) as fleet:
        server = fleet.server
        first, second = eventually(lambda: len(server.workers) == 2 and server.workers, "both")
        for worker in (first, second):
            completed(fleet, worker)
        live(fleet, first, 1)
        eventually(lambda: scrape(server)("outcomes_total") == 2, "both outcomes")
        assert scrape(server)("live_streams") == 1
        assert scrape(server)("workers") == 2  # a master is none
        if not preload:  # there, what slots an app has is known with its first stream
            assert scrape(server)("slots") == 2 * 2 * 4  # of two apps
        os.kill(first, signal.SIGKILL)
        eventually(lambda: scrape(server)("live_streams") == 0, "no live stream")
        assert scrape(server)("outcomes_total") == 2


def test_workers_that_share_nothing_are_told_of(provider: Provider, log_file: Path) -> None:
    """Several, and no folder: each would show its own. The log says so, and what to do."""
    command = [*OURS[:-1], "/dev/null", "--worker-class", "gthread"]
    with serving_fleet(log_file, provider, "--threads", "8", command=command, **TWO) as fleet:
        completed(fleet, fleet.worker())
        eventually(lambda: "PROMETHEUS_MULTIPROC_DIR" in fleet.server.log(), "advice")


def test_off_nothing_is_there(rigs: Rigs) -> None:
    """Without CHATSTREAM_METRICS: no route, no folder, and no library in a worker."""
    fleet = rigs("fleet", "gthread", WEB_CONCURRENCY="4")
    assert fleet.server.get("/metrics")[0] == 404
    for worker in fleet.server.workers:
        assert figures_of(worker) == []
    script = (
        "import sys; from flask import Flask; from chatstream import ChatStream;"
        " ChatStream(Flask('a')); assert not [m for m in sys.modules if 'prometheus' in m]"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=30)
