"""Services of real workers: processes that are started once, and join one service for each test."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatstream import errors
from chatstream.bus.unix.directory import service_directory
from tests.conftest import PATIENCE, eventually

if TYPE_CHECKING:
    from tests.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]


class Pending:
    """A command that a worker is at."""

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker = worker
        self._number = number

    @property
    def ready(self) -> bool:
        """Whether the answer is there."""
        return self._worker.answered(self._number, 0.0)

    @property
    def seconds(self) -> float:
        """What the worker took for it."""
        return float(self._wait()["seconds"])

    def result(self) -> Any:
        """What it returned. Raises what it raised; RuntimeError for what no bus raises."""
        answer = self._wait()
        if "error" in answer:
            raise _error(answer["error"])
        return answer["value"]

    def _wait(self) -> dict[str, Any]:
        assert self._worker.answered(self._number, PATIENCE), "no answer from a worker"
        return self._worker.answers[self._number]


def _error(what: dict[str, Any]) -> Exception:
    if what["class"] == "Refused":
        return errors.Refused(what["message"], code=what["code"], status=what["status"])
    known = {"Unconfirmed": errors.Unconfirmed, "BusUnavailable": errors.BusUnavailable}
    if what["class"] in known:
        return known[what["class"]]()
    return RuntimeError(f"{what['class']}: {what['message']}")


class Worker:
    """A process, see `tests.bus.worker`, and a way to command it."""

    def __init__(self, *, gevent: bool = False) -> None:
        self.answers: dict[int, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._read = b""
        self._sock, theirs = socket.socketpair()
        command = ["gevent.monkey", "--module"] if gevent else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command, "tests.bus.worker"], cwd=ROOT, stdin=theirs.fileno()
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, do: str, at: float = 0.0, **arguments: Any) -> Pending:
        """Has the worker begin a command, at once or at a monotonic instant."""
        number = next(self._numbers)
        command = {"id": number, "do": do, "at": at, "with": arguments}
        self._sock.sendall(json.dumps(command).encode() + b"\n")
        return Pending(self, number)

    def begin_claim(self, session: str, stream: str, owner: str = "", at: float = 0.0) -> Pending:
        return self.begin("claim", at, session=session, stream=stream, owner=owner)

    def begin_cancel(
        self, session: str, stream: str | None = None, owner: str = "", at: float = 0.0
    ) -> Pending:
        return self.begin("cancel", at, session=session, stream=stream, owner=owner)

    def claim(self, session: str, stream: str, owner: str = "") -> bool:
        """Begins a stream. Returns whether a cancel came before it."""
        cancelled: bool = self.begin_claim(session, stream, owner).result()
        return cancelled

    def cancel(self, session: str, stream: str | None = None, owner: str = "") -> bool:
        stopped: bool = self.begin_cancel(session, stream, owner).result()
        return stopped

    def begin_cancel_elsewhere(
        self, session: str, stream: str | None = None, owner: str = ""
    ) -> Pending:
        """A cancel for which nobody looks here first."""
        return self.begin("cancel_elsewhere", session=session, stream=stream, owner=owner)

    def sessions(self, owner: str | None = None) -> dict[int, list[str] | None]:
        """What it finds to live: by each worker's pid the streams' ids, None if it is silent."""
        found = self.begin("sessions", owner=owner).result()
        return {pid: streams if answered else None for pid, answered, streams in found}

    def cancel_all(self, owner: str | None = None) -> dict[int, list[str] | None]:
        """What it has stopped, as `sessions` has what lives."""
        found = self.begin("cancel_all", owner=owner).result()
        return {pid: streams if answered else None for pid, answered, streams in found}

    def complete(self, stream: str) -> None:
        """Ends a stream; its claim stays."""
        self.begin("complete", stream=stream).result()

    def release(self, stream: str) -> None:
        """Ends a stream and gives its claim back."""
        self.begin("release", stream=stream).result()

    def ending(self, stream: str) -> str:
        """A stream's: live, completed, or the cause of its abort."""
        return self.endings()[stream]

    def endings(self) -> dict[str, str]:
        endings: dict[str, str] = self.begin("endings").result()
        return endings

    def log(self) -> list[str]:
        lines: list[str] = self.begin("log").result()
        return lines

    def received(self) -> list[str]:
        """What other workers asked for."""
        actions: list[str] = self.begin("received").result()
        return actions

    # The process

    def open_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def hang(self) -> None:
        """SIGSTOP: everything that the kernel keeps for it stays, and it does nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: self._states() == {"T"}, "a stopped process")

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE)

    def end(self) -> None:
        self.kill()
        self._sock.close()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def _states(self) -> set[str]:
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}

    def answered(self, number: int, patience: float) -> bool:
        """Whether a command's answer is there within `patience` seconds."""
        deadline = time.monotonic() + patience
        while number not in self.answers:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._sock], [], [], left)[0]:
                return False
            data = self._sock.recv(65536)
            assert data, "a worker has ended"
            *lines, self._read = (self._read + data).split(b"\n")
            self.answers |= {answer["id"]: answer for answer in map(json.loads, lines)}
        return True


class Workers:
    """The processes. What a test has killed is replaced when it is needed."""

    def __init__(self) -> None:
        self._idle: dict[bool, list[Worker]] = {True: [], False: []}

    def take(self, count: int, *, gevent: bool = False) -> list[Worker]:
        idle = self._idle[gevent]
        missing = [Worker(gevent=gevent) for _ in range(count - len(idle))]
        taken, self._idle[gevent] = idle[:count] + missing, idle[count:]
        return taken

    def give_back(self, worker: Worker, *, gevent: bool) -> None:
        if worker.running:
            self._idle[gevent].append(worker)
        else:
            worker.end()

    def end(self) -> None:
        for worker in self._idle[True] + self._idle[False]:
            worker.end()


class Service:
    """Workers that find each other: one kind of bus, one directory or prefix."""

    def __init__(self, workers: Workers, kind: str, settings: dict[str, Any]) -> None:
        self._workers = workers
        self._members: list[tuple[Worker, bool]] = []
        self.kind = kind
        self.settings = settings

    @property
    def directory(self) -> Path:
        """Where the workers of a unix service meet."""
        return service_directory(Path(self.settings["bus"].removeprefix("unix://")), "service", "0")

    def join(
        self,
        count: int,
        *,
        gevent: bool = False,
        reject: bool = False,
        settle: bool = True,
        **options: Any,
    ) -> list[Worker]:
        """`count` workers more. For `local`, which has but one, it is the same one each time.

        Args:
            count: How many.
            gevent: Whether gevent has patched them.
            reject: What they do with a second stream of a session.
            settle: Whether to wait until they have reached their Redis.
            options: For `tests.bus.worker.Worker.join`.
        """
        number = 1 if self.kind == "local" else count
        members = self._workers.take(number, gevent=gevent)
        self._members += [(member, gevent) for member in members]
        settings = {**self.settings, "on_conflict": "reject" if reject else "supersede"}
        joining = [member.begin("join", settings=settings, **options) for member in members]
        for pending in joining:
            pending.result()
        if self.kind == "redis" and settle:
            for member in members:
                self.address(member)  # it has arrived
        return members * count if self.kind == "local" else members

    def address(self, worker: Worker) -> str:
        """Where messages for `worker` go: a socket's path, or a key."""
        if self.kind == "unix":
            return str(self.directory / str(worker.pid))
        return str(eventually(lambda: self._mailbox(worker.pid), "a worker's key"))

    def post(self, worker: Worker, *messages: bytes) -> None:
        """Puts messages where those of other workers arrive."""
        address = self.address(worker)
        if self.kind == "unix":
            for message in messages:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    sock.connect(address)
                    sock.send(message)
        else:
            with contextlib.closing(self.client()) as client:
                for message in messages:
                    client.xadd(address, {"message": message})

    def client(self) -> Any:
        """A client of its Redis."""
        import redis

        return redis.Redis.from_url(self.settings["bus"])

    def keys(self, pattern: str) -> set[str]:
        """Those of its keys in Redis that match, without its prefix in `pattern`."""
        with contextlib.closing(self.client()) as client:
            return {key.decode() for key in client.keys(f"{self.settings['bus_prefix']}:{pattern}")}

    def _mailbox(self, pid: int) -> str | None:
        with contextlib.closing(self.client()) as client:
            for key in self.keys("worker:*"):
                if client.get(key).split()[0] == str(pid).encode():
                    return key.replace(":worker:", ":mail:")
        return None

    def leave(self) -> None:
        """Ends the service. What hangs wakes; what does not answer is killed."""
        running = [(worker, gevent) for worker, gevent in self._members if worker.running]
        for worker, _ in running:
            worker.wake()
        leaving = [worker.begin("leave") for worker, _ in running]
        try:
            for pending in leaving:
                pending.result()
        except BaseException:
            for worker, _ in running:
                worker.kill()
            raise
        finally:
            for worker, gevent in self._members:
                self._workers.give_back(worker, gevent=gevent)


class Services:
    """Makes services of any kind, and ends them."""

    def __init__(self, workers: Workers, folder: Path, request: pytest.FixtureRequest) -> None:
        self._workers = workers
        self._folder = folder
        self._request = request
        self._numbers = itertools.count(1)
        self._made: list[Service] = []

    def make(self, kind: str, server: RedisServer | None = None, **settings: Any) -> Service:
        """A service of a directory or prefix of its own.

        Args:
            kind: local, unix or redis.
            server: The Redis; None for one that tests share.
            settings: Other ones than usual.
        """
        usual: dict[str, Any] = {"bus": kind}
        if kind == "unix":
            base = self._folder / str(next(self._numbers))
            base.mkdir()
            usual = {"bus": f"unix://{base}"}
        elif kind == "redis":
            server = server or self._request.getfixturevalue("shared_redis")
            usual = {"bus": server.url, "bus_prefix": f"t{uuid.uuid4().hex[:12]}"}
            with contextlib.suppress(Exception):
                server.command("SET", f"{usual['bus_prefix']}:since", 0)  # it has long been there
        self._made.append(Service(self._workers, kind, {**usual, **settings}))
        return self._made[-1]

    def end(self) -> None:
        """Ends them all. Idempotent."""
        made, self._made = self._made, []
        with contextlib.ExitStack() as stack:
            for service in made:
                stack.callback(service.leave)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.end()


@pytest.fixture
def services(
    workers: Workers, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Services]:
    # Not tmp_path: a socket's name is short, and a test's may be long.
    services = Services(workers, tmp_path_factory.mktemp("bus"), request)
    yield services
    services.end()


@pytest.fixture(params=["local", "unix", "redis"])
def service(services: Services, request: pytest.FixtureRequest) -> Service:
    return services.make(request.param)


@pytest.fixture(params=["unix", "redis"])
def shared(services: Services, request: pytest.FixtureRequest) -> Service:
    """A service that can have more than one worker."""
    return services.make(request.param)
