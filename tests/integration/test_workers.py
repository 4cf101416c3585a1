"""Many workers on one host: whichever of them a stop reaches, it finds its stream."""

from __future__ import annotations

import contextlib
import grp
import itertools
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatstream.bus.messages import digest
from chatstream.bus.unix.directory import default_base, service_directory
from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Fleet, serving_fleet
from tests.integration.fleets import (
    NOT_FOUND,
    UNCONFIRMED,
    assert_cancel_stops,
    begin,
    hanging,
    is_open,
)
from tests.integration.processes import (
    FOREIGN,
    ROOT,
    Provider,
    Server,
    children,
    fails_to_start,
    is_running,
)
from tests.integration.scenes import SCENES

Rigs = Callable[..., Fleet]


numbers = itertools.count(1)


@pytest.fixture
def session() -> str:
    return f"workers-{next(numbers)}"


@pytest.fixture
def rejecting(rigs: Rigs) -> Iterator[Fleet]:
    """Two workers that refuse a second stream of a session."""
    environ = {"WEB_CONCURRENCY": "2", "CHATSTREAM_ON_CONFLICT": "reject"}
    fleet = rigs("fleet", "gthread", **environ)
    fleet.ready()
    yield fleet
    fleet.check_leaks()


def owner_of(fleet: Fleet, session: str) -> int:
    """The worker that began the session's last stream."""
    line = [line for line in fleet.server.lines_of(session) if " started " in line][-1]
    return int(line.partition("[")[2].partition("]")[0])


APP = digest("tests.integration.app", "/api/chat")[:8] + "1"
"""What the bus calls the app of these tests: it has no other of that name."""


def service_of(server: Server) -> Path:
    """The directory in which the workers of a server meet when none is set."""
    return service_directory(default_base(), str(server.listener), APP)


# Stops


def test_any_worker_stops_any_stream(fleet: Fleet) -> None:
    """Case 28: every cancel is a 200 that means it, whichever worker it reaches."""
    workers = fleet.server.workers
    scenes = itertools.cycle(["silent", "chatty", "headers"])
    placed = []
    for index in range(24):
        session, owner = f"any-{next(numbers)}", workers[index % 4]
        begin(fleet, session, at=owner, scene=next(scenes))
        placed.append((index, session, owner))
    elsewhere = 0
    for index, session, owner in placed:
        assert owner_of(fleet, session) == owner
        chosen = workers[(index + index // 4) % 4] if index % 2 else None
        elsewhere += assert_cancel_stops(fleet, session, at=chosen) != owner
    assert elsewhere >= 6
    for _, session, _ in placed:
        assert "aborted by client/cancel cause=cancel" in fleet.server.ending_of(session)


def test_a_client_that_reads_sees_a_proper_end(fleet: Fleet, session: str) -> None:
    """A stop from elsewhere adds nothing either: no error, no [DONE]."""
    owner = fleet.worker()
    client = begin(fleet, session, at=owner)
    assert_cancel_stops(fleet, session, at=fleet.worker(owner))
    assert client.head()[0] == 200
    body = client.body()
    assert b"error" not in body
    assert b"[DONE]" not in body


def test_unknown_and_foreign_streams_are_a_404_everywhere(fleet: Fleet, session: str) -> None:
    """Case 20: unknown, longer, shorter, another stream's, somebody else's: nobody stops."""
    begin(fleet, session, f"{session}.a", at=fleet.worker(), X_User="alice")
    for worker in fleet.server.workers:
        for wrong in (f"{session}0", session[:-1], "never-heard-of"):
            answer = fleet.cancel(wrong, at=worker, X_User="alice")
            assert answer == (404, NOT_FOUND, worker)
        for stream in (f"{session}.b", f"{session}.", f"{session}.aa"):
            answer = fleet.cancel(session, stream, at=worker, X_User="alice")
            assert answer == (404, NOT_FOUND, worker)
        for stream in (None, f"{session}.a"):
            assert fleet.cancel(session, stream, at=worker) == (404, NOT_FOUND, worker)
    assert is_open(fleet, f"{session}.a")
    assert fleet.cancel(session, f"{session}.a", X_User="alice")[0] == 200


def test_an_unknown_session_is_known_to_be_unknown(fleet: Fleet) -> None:
    """Nobody is asked, so nobody is waited for: also while a worker hangs."""
    with hanging(fleet.worker()) as hung:
        for _ in range(20):
            before = time.monotonic()
            assert fleet.cancel("never-heard-of", at=fleet.worker(hung))[0] == 404
            assert time.monotonic() - before < 0.7


def test_an_early_cancel_is_remembered_for_every_worker(fleet: Fleet, session: str) -> None:
    """Case 19: wherever the stream then starts, it is born aborted; the provider hears nothing."""
    workers = fleet.server.workers
    for index, (cancelling, starting) in enumerate(itertools.product(workers[:2], workers[1:])):
        stream = f"{session}.{index}"
        assert fleet.cancel(session, stream, at=cancelling)[:2] == (404, NOT_FOUND)
        client = fleet.client_of(starting)
        client.post(session, stream, simulate={"id": stream, **SCENES["silent"]})
        assert "aborted by client/cancel cause=cancel" in fleet.server.ending_of(session, stream)
        assert client.head()[0] == 200
        assert client.body() == b""
        assert stream not in fleet.provider.names()
    # Once: the name may be used again.
    begin(fleet, session, stream, at=workers[0])
    assert_cancel_stops(fleet, session, stream, at=workers[1])


def test_an_early_cancel_is_for_its_owner_only(fleet: Fleet, session: str) -> None:
    """Somebody else's cancel of the same names, or another session's, is for another stream."""
    first = fleet.worker()
    fleet.cancel(session, f"{session}.a", at=first, X_User="mallory")
    fleet.cancel(f"{session}.other", f"{session}.a", at=first)
    begin(fleet, session, f"{session}.a", at=fleet.worker(first))
    assert is_open(fleet, f"{session}.a")
    assert_cancel_stops(fleet, session, f"{session}.a")


def test_an_early_cancel_is_not_taken_for_a_late_one(fleet: Fleet, session: str) -> None:
    """Another session has just had a stream of this streamId: that was another stream."""
    first, second = fleet.server.workers[:2]
    stream = f"{session}.a"
    begin(fleet, f"{session}.other", stream, at=first)
    assert_cancel_stops(fleet, f"{session}.other", stream)
    assert "aborted by" in fleet.server.ending_of(f"{session}.other")
    assert fleet.cancel(session, stream, at=second)[0] == 404
    simulate = {"id": session, **SCENES["silent"]}
    fleet.client_of(first).post(session, stream, simulate=simulate).head()
    assert session not in fleet.provider.names()
    assert "aborted by client/cancel cause=cancel" in fleet.server.ending_of(session)


def test_parallel_cancels_stop_once(fleet: Fleet, session: str) -> None:
    """Case 21: one of fifty did it, and only that one says so."""
    begin(fleet, session, scene="chatty")
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: fleet.cancel(session), range(50)))
    assert Counter(status for status, _, _ in answers) == {200: 1, 404: 49}
    assert len({worker for _, _, worker in answers}) > 1
    assert "aborted by client/cancel cause=cancel" in fleet.server.ending_of(session)


def test_a_late_cancel_finds_nothing(fleet: Fleet, session: str) -> None:
    """Case 22: a cancel for stream 1 leaves stream 2 of the session alone, in every worker."""
    first, second = fleet.server.workers[:2]
    old, new = f"{session}.old", f"{session}.new"
    begin(fleet, session, old, at=first)
    begin(fleet, session, new, at=second)
    assert "aborted by superseded" in fleet.server.ending_of(session, old)
    for worker in fleet.server.workers:
        assert fleet.cancel(session, old, at=worker) == (404, NOT_FOUND, worker)
    assert is_open(fleet, new)
    assert_cancel_stops(fleet, session, new, at=first)
    assert fleet.cancel(session, new, at=second)[0] == 404


# The conflict policy


def test_a_newer_stream_supersedes_in_every_worker(fleet: Fleet, session: str) -> None:
    """Case 23: each one ends the one before, silently, and has the session."""
    chain = [*fleet.server.workers, *fleet.server.workers[:2]]
    clients = []
    for index, worker in enumerate(chain):
        clients.append(begin(fleet, session, f"{session}.{index}", at=worker))
        assert not index or not is_open(fleet, f"{session}.{index - 1}")
    last = f"{session}.{len(chain) - 1}"
    for index, client in enumerate(clients[:-1]):
        assert "aborted by superseded" in fleet.server.ending_of(session, f"{session}.{index}")
        client.head()
        body = client.body()
        assert b"error" not in body
        assert b"[DONE]" not in body
    assert is_open(fleet, last)
    assert_cancel_stops(fleet, session, name=last)
    assert "aborted by client/cancel" in fleet.server.ending_of(session, last)


def test_of_streams_that_begin_at_once_one_stays(fleet: Fleet, session: str) -> None:
    """Case 23: twelve at once in four workers; none is orphaned, one is left, a cancel stops it."""
    clients = [fleet.client_of(worker) for worker in fleet.server.workers * 3]

    def post(index: int) -> int:
        stream = f"{session}.{index}"
        clients[index].post(session, stream, simulate={"id": stream, **SCENES["silent"]})
        return clients[index].head()[0]

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(post, range(12))) == {200}
    alive = eventually(lambda: _only_one(fleet, session), "one stream")
    assert_cancel_stops(fleet, session, name=alive)
    for index in range(12):
        stream = f"{session}.{index}"
        by = "client/cancel" if stream == alive else "superseded"
        assert f"aborted by {by}" in fleet.server.ending_of(session, stream)


def _only_one(fleet: Fleet, session: str) -> str | None:
    figures = [f for f in fleet.provider.get("/requests") if f["id"].startswith(f"{session}.")]
    still_open = [figure["id"] for figure in figures if figure["open"]]
    lines = fleet.server.lines_of(session)
    ended = sum(" aborted by superseded " in line for line in lines)
    return still_open[0] if len(still_open) == 1 and ended == 11 else None


def test_a_stream_id_is_live_in_every_worker(fleet: Fleet, session: str) -> None:
    """The same streamId is a 409 while it is live, whatever the session; the live one goes on."""
    stream = f"{session}.a"
    begin(fleet, session, stream, at=fleet.worker())
    for worker in fleet.server.workers:
        for other in (session, f"{session}.other"):
            client = fleet.client_of(worker).post(other, stream)
            assert client.head()[0] == 409
    assert is_open(fleet, stream)
    assert_cancel_stops(fleet, session, stream)
    begin(fleet, f"{session}.other", stream, at=fleet.worker())
    assert_cancel_stops(fleet, f"{session}.other", stream)


def test_a_second_stream_is_rejected_in_every_worker(rejecting: Fleet, session: str) -> None:
    """CHATSTREAM_ON_CONFLICT=reject: 409 from any worker while one is live, and only then."""
    fleet = rejecting
    begin(fleet, session, at=fleet.worker())
    for worker in fleet.server.workers:
        client = fleet.client_of(worker).post(session)
        status, headers = client.head()
        assert status == 409
        assert b'"conflict"' in client.exactly(int(headers["content-length"]))
    assert is_open(fleet, session)
    assert_cancel_stops(fleet, session)
    begin(fleet, session, f"{session}.again", at=fleet.worker(fleet.worker()))
    assert_cancel_stops(fleet, session, name=f"{session}.again")


def test_of_twelve_at_once_eleven_are_rejected(rejecting: Fleet, session: str) -> None:
    """Each is told the truth: one streams, the others are a 409."""
    fleet = rejecting
    clients = [fleet.client_of(worker) for worker in fleet.server.workers * 6]

    def post(client: Client) -> int:
        return client.post(session, simulate=SCENES["silent"]).head()[0]

    with ThreadPoolExecutor(12) as pool:
        assert Counter(pool.map(post, clients)) == {200: 1, 409: 11}
    assert fleet.cancel(session)[0] == 200
    assert "aborted by client/cancel" in fleet.server.ending_of(session)


# Workers that die, hang, or are replaced


def test_a_killed_worker_leaves_nothing(fleet: Fleet, session: str) -> None:
    """Case 33: its sessions are unknown at once, their names free, its socket is swept."""
    directory = service_of(fleet.server)
    owner = fleet.worker()
    others = [worker for worker in fleet.server.workers if worker != owner]
    stream = f"{session}.a"
    begin(fleet, session, stream, at=owner)
    os.kill(owner, signal.SIGKILL)
    eventually(lambda: not is_running(owner), "its end")
    for worker in others:
        assert fleet.cancel(session, at=worker) == (404, NOT_FOUND, worker)
    assert (directory / str(owner)).exists()
    eventually(lambda: len(set(fleet.server.workers) - {owner}) == 4, "a new worker")
    fleet.ready()
    assert not (directory / str(owner)).exists()
    begin(fleet, session, f"{session}.b", at=others[0])
    begin(fleet, f"{session}.other", stream, at=others[1])
    assert_cancel_stops(fleet, session, f"{session}.b")
    assert_cancel_stops(fleet, f"{session}.other", stream)


def test_a_worker_that_hangs_is_unconfirmed(fleet: Fleet, session: str) -> None:
    """504 within a second, not a false 200 or 404; what was asked is done when it can be."""
    owner = fleet.worker()
    client = begin(fleet, session, f"{session}.a", at=owner)
    with hanging(owner):
        for stream in (None, f"{session}.a"):
            before = time.monotonic()
            status, answer, worker = fleet.cancel(session, stream, at=fleet.worker(owner))
            assert (status, answer) == (504, UNCONFIRMED)
            assert time.monotonic() - before < 3
            assert worker != owner
        assert is_open(fleet, f"{session}.a")
    assert fleet.provider.request(f"{session}.a", "closed")["closed_by"] == "client"
    assert "aborted by client/cancel cause=cancel" in fleet.server.ending_of(session)
    client.head()
    assert b"error" not in client.body()


def test_a_worker_that_is_killed_while_it_is_asked(fleet: Fleet, session: str) -> None:
    """It does not hang any more, it has ended: 404, not 504, and its names are free, not a 409."""
    owner, cancelling, asking = fleet.server.workers[:3]
    stream = f"{session}.a"
    begin(fleet, session, stream, at=owner)
    canceller, asker = fleet.client_of(cancelling), fleet.client_of(asking)
    with ThreadPoolExecutor(1) as pool:
        with hanging(owner):
            path = f"/api/chat/cancel/{session}"
            cancelled = pool.submit(lambda: canceller.ask("POST", path)[0])
            asker.post(f"{session}.other", stream, simulate={"id": stream, **SCENES["silent"]})
            eventually(lambda: questions(owner) == 2, "its being asked")
            os.kill(owner, signal.SIGKILL)
        assert (cancelled.result(), asker.head()[0]) == (404, 200)
    eventually(lambda: len(set(fleet.server.workers) - {owner}) == 4, "a new worker")


def questions(worker: int) -> int:
    """How many connections wait at a worker's socket; in the kernel's list they have its name."""
    sockets = Path("/proc/net/unix").read_text()
    return len(re.findall(rf"/{APP}/{worker}$|-{APP}/{worker}$", sockets, re.MULTILINE)) - 1


def test_a_session_of_a_worker_that_hangs_can_be_asked_again(fleet: Fleet, session: str) -> None:
    """The new stream does not wait for long; the old one ends when its worker goes on."""
    owner, other = fleet.server.workers[:2]
    begin(fleet, session, f"{session}.old", at=owner)
    with hanging(owner):
        before = time.monotonic()
        begin(fleet, session, f"{session}.new", at=other)
        assert time.monotonic() - before < 3
        status = fleet.client_of(other).post("another", f"{session}.old").head()[0]
        assert status == 409  # it may be live
        assert is_open(fleet, f"{session}.new")
    assert fleet.provider.request(f"{session}.old", "closed")["closed_by"] == "client"
    assert "aborted by superseded" in fleet.server.ending_of(session, f"{session}.old")
    assert is_open(fleet, f"{session}.new")
    assert_cancel_stops(fleet, session, name=f"{session}.new")
    assert "aborted by client/cancel" in fleet.server.ending_of(session, f"{session}.new")


def test_reload_with_hup(fleet: Fleet, session: str) -> None:
    """An old worker drains; the new ones find the stream that it still has."""
    old = fleet.server.workers
    clients = [begin(fleet, f"{session}.{worker}", at=worker) for worker in old[:2]]
    os.kill(fleet.server.pid, signal.SIGHUP)
    eventually(lambda: len(set(fleet.server.workers) - set(old)) == 4, "new workers")
    new = [worker for worker in fleet.server.workers if worker not in old]
    for worker, client in zip(old[:2], clients, strict=True):
        assert assert_cancel_stops(fleet, f"{session}.{worker}", at=new[0]) == new[0]
        ending = fleet.server.ending_of(f"{session}.{worker}")
        assert "aborted by client/cancel" in ending
        client.head()
        assert b"error" not in client.body()
    fleet.close_clients()
    eventually(lambda: not any(is_running(worker) for worker in old), "their end")


def test_reload_with_usr2(tmp_path: Path, log_file: Path, provider: Provider) -> None:
    """A new master, of another generation: its workers find the old ones' streams."""
    script = str(Path(sysconfig.get_path("scripts")) / "gunicorn")
    command = [script, *FOREIGN[1:], "--pid", str(tmp_path / "pid")]
    options = ["--worker-class", "gthread", "--threads", "8", "--workers", "2"]
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(serving_fleet(log_file, provider, *options, command=command))
        directory = service_of(fleet.server)
        old = fleet.server.workers
        begin(fleet, "drained", at=old[0])
        client = begin(fleet, "stopped", at=old[1])
        os.kill(fleet.server.pid, signal.SIGUSR2)
        master = eventually(lambda: next(iter(set(fleet.server.workers) - set(old)), 0), "another")
        stack.callback(end, master)
        new = eventually(lambda: len(children(master)) == 2 and children(master), "its workers")
        assert assert_cancel_stops(fleet, "stopped", at=new[0]) == new[0]
        client.close()
        fleet.server.terminate()
        eventually(lambda: not is_running(old[1]), "the idle old worker's end")
        assert assert_cancel_stops(fleet, "drained", at=new[1]) == new[1]
        fleet.close_clients()
        fleet.server.stop()
        for session in ("drained", "stopped"):
            assert "aborted by client/cancel" in fleet.server.ending_of(session)
        begin(fleet, "newest", at=new[0])
        assert_cancel_stops(fleet, "newest", at=new[1])
        fleet.close_clients()
        end(master)
        assert not any(is_running(pid) for pid in (*old, *new, master))
        assert not directory.exists()


def end(pid: int) -> None:
    """Ends a master that is not our child, and waits for it. Idempotent."""
    with contextlib.suppress(ProcessLookupError):
        if is_running(pid):
            os.kill(pid, signal.SIGTERM)
    eventually(lambda: not is_running(pid), "its end", 20)


# Services, and configurations that know nothing of chatstream


def test_two_services_of_one_user_do_not_meet(fleet: Fleet, rejecting: Fleet, session: str) -> None:
    """The same session id in two gunicorns: a cancel at one is not for the other's."""
    begin(fleet, session)
    begin(rejecting, session)
    assert_cancel_stops(fleet, session)
    assert fleet.cancel(session)[0] == 404
    assert is_open(rejecting, session)
    assert_cancel_stops(rejecting, session)


def test_two_apps_of_one_process_do_not_meet(log_file: Path, provider: Provider) -> None:
    """Whichever of them has the first stream of a worker: each finds its own, and no other."""
    options = ["--worker-class", "gthread", "--threads", "8", "--workers", "2"]
    both = {"app": "tests.integration.both:both"}
    with serving_fleet(log_file, provider, *options, command=FOREIGN, **both) as fleet:
        first, second = fleet.server.workers
        begin(fleet, "mine", at=first, X_User="")
        answer = fleet.client_of(second).ask("POST", "/other/api/chat/cancel/mine")
        assert answer[0] == 404
        assert is_open(fleet, "mine")
        assert fleet.cancel("mine", at=second, X_User="")[0] == 200
        assert not is_open(fleet, "mine")


def test_two_gunicorns_with_one_directory_are_one_service(
    tmp_path: Path, provider: Provider
) -> None:
    """CHATSTREAM_BUS=unix:///a/directory joins them; when both have gone it is empty again."""
    # Not below tmp_path, whose length is not ours.
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    bus = {"CHATSTREAM_BUS": f"unix://{base}"}
    try:
        with (
            serving_fleet(tmp_path / "a.log", provider, **bus) as a,
            serving_fleet(tmp_path / "b.log", provider, **bus) as b,
        ):
            for here, there, session in ((a, b, "from-a"), (b, a, "from-b")):
                begin(here, session)
                assert_cancel_stops(there, session)
                assert "aborted by client/cancel" in here.server.ending_of(session)
            begin(a, "twice", "twice.1")
            begin(b, "twice", "twice.2")
            assert "aborted by superseded" in a.server.ending_of("twice")
            assert_cancel_stops(a, "twice", name="twice.2")
            inside = service_directory(base, "service", APP)
            sockets = {entry.name for entry in inside.iterdir() if entry.is_socket()}
            assert sockets == {str(a.server.worker), str(b.server.worker)}
            begin(a, "at-the-end")
        (user,) = base.iterdir()
        assert not list(user.iterdir())
        user.rmdir()
    finally:
        shutil.rmtree(base)


@pytest.mark.parametrize(("worker_class", "preload"), [("gthread", []), ("gevent", ["--preload"])])
def test_a_foreign_configuration(
    log_file: Path, provider: Provider, worker_class: str, preload: list[str]
) -> None:
    """Case 36: it knows nothing of chatstream, and a stop crosses workers all the same."""
    options = ["--worker-class", worker_class, "--threads", "8", "--workers", "3", *preload]
    with serving_fleet(log_file, provider, *options, command=FOREIGN) as fleet:
        directory = service_of(fleet.server)
        workers = fleet.server.workers
        for owner, other in itertools.permutations(workers, 2):
            session = f"foreign-{owner}-{other}"
            begin(fleet, session, at=owner)
            assert_cancel_stops(fleet, session, at=other)
            assert "aborted by client/cancel" in fleet.server.ending_of(session)
        assert len(list(Path(f"/proc/{fleet.server.pid}/task").iterdir())) == 1
        fleet.check_leaks()
        sockets = {entry.name for entry in directory.iterdir() if entry.is_socket()}
        assert sockets == {str(worker) for worker in workers}
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (directory, directory.parent)}
        assert modes == {0o700}
        assert {stat.S_IMODE((directory / name).stat().st_mode) for name in sockets} == {0o600}
    assert not directory.exists()


def test_the_bus_belongs_to_the_user_that_gunicorn_became(
    log_file: Path, provider: Provider
) -> None:
    """Started by root, with another --user: the directory is made after that, and is private."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    user, group = pwd.getpwnam("nobody"), grp.getgrnam("nogroup")
    _skip_unless_it_can_run(user.pw_uid, group.gr_gid)
    options = ["--threads", "8", "--workers", "2", "--user", "nobody", "--group", "nogroup"]
    with serving_fleet(
        log_file, provider, *options, "--worker-class", "gthread", command=FOREIGN
    ) as fleet:
        first, second = fleet.server.workers
        begin(fleet, "dropped", at=first)
        assert_cancel_stops(fleet, "dropped", at=second)
        directory = default_base() / f"chatstream-{user.pw_uid}" / str(fleet.server.listener)
        sockets = [entry for entry in directory.iterdir() if entry.is_socket()]
        assert len(sockets) == 2
        assert {entry.stat().st_uid for entry in (directory, *sockets)} == {user.pw_uid}
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in sockets} == {0o600}
    assert not directory.exists()


def _skip_unless_it_can_run(uid: int, gid: int) -> None:
    command = [sys.executable, "-c", "import tests.integration.app, chatstream.upstream.provider"]
    try:
        subprocess.run(
            command, user=uid, group=gid, extra_groups=[], cwd=ROOT, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nobody may not run this Python, or not read these files: {error}")


# Start-up


@pytest.mark.parametrize(
    ("bus", "sentence"),
    [
        ("unix:///tmp/" + "long" * 30, "is too long by"),
        ("unix:///no/such/directory", "'/no/such/directory' is not a directory"),
        ("unix://relative", "CHATSTREAM_BUS must be local, unix, unix:///a/directory"),
    ],
    ids=["overlong", "missing", "relative"],
)
def test_a_place_that_cannot_work_stops_start_up(log_file: Path, bus: str, sentence: str) -> None:
    """With a sentence that names the key, and no traceback."""
    log = fails_to_start(log_file, CHATSTREAM_BUS=bus)
    assert sentence in log
    assert "CHATSTREAM_BUS" in log
    assert "Traceback" not in log
