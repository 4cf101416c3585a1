"""Servers, started when first asked for, and the leak check around every test."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.processes import Provider, Server, descriptors
from tests.integration.proxy import Proxy

if TYPE_CHECKING:
    from tests.integration.browser import Chromium, Standalone, Tabs


@dataclass
class Certificate:
    cert: str
    authority: str


class BlackHole:
    """An address that never answers a SYN: a listener whose queue is full."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.port = int(self._listener.getsockname()[1])
        self._fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)

    def close(self) -> None:
        for sock in (*self._fillers, self._listener):
            sock.close()


def whole_answer(client: Client) -> None:
    """One stream to its end; its connection to the provider is idle then.

    Also what closes those that were idle for too long. The loop has shut them down, and only an
    owner may close: until the next stream they have a descriptor, and the kernel lists them no
    more. So a leak check that finds too many has one such answer given before it counts again.
    """
    client.post(simulate={"tokens": 1, "rate": 1000})
    client.head()
    client.body()


MODES = {
    "gthread": {},
    "gevent": {},
    "iterable": {
        "CHATSTREAM_WORKER_CLASS": "gthread",
        "CHATSTREAM_DETACH": "0",
        "CHATSTREAM_THREADS": "64",
    },
}
"""The worker classes. On gthread the loop moves the streams; where that is switched off, and on
gevent, who walks them does. Modules whose tests are about that run in all three.
"""


class Rig:
    """One server, its provider, and what they need; with the figures a leak check compares."""

    def __init__(self, server: Server, provider: Provider | None, extra: object = None) -> None:
        self.server = server
        self.provider = provider
        self.extra = extra
        self.clients: list[Client] = []
        self._baseline = 0

    def client(self, **options: Any) -> Client:
        client = Client(self.server.port, **options)
        self.clients.append(client)
        return client

    def warm_up(self, *, answers: bool) -> None:
        """Has everything made that is made once: the loop, the pool, a reusable connection."""
        if answers:
            whole_answer(self.client())
        else:
            self.client().post("warm-up")
            eventually(lambda: self.server.debug()["live"], "the warm-up's stream")
        self.close_clients()
        eventually(lambda: not self._at_rest(), "rest after the warm-up")
        self._baseline = self.server.descriptors() - self._idle_connections()

    def _idle_connections(self) -> int:
        return self.provider.stats()["connections_open"] if self.provider else 0

    def _at_rest(self) -> dict[str, object]:
        facts = self.server.debug()
        return {name: facts[name] for name in ("slots", "live", "calls") if facts[name]}

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()

    def check_leaks(self) -> None:
        """Nothing live, no thread, and only descriptors of idle connections to the provider."""
        self.close_clients()
        eventually(lambda: not self._at_rest(), f"rest; now {self._at_rest()}")
        if self.provider is not None:
            eventually(lambda: self.provider.stats()["generating"] == 0, "no generation")
            if self._too_many():
                whole_answer(self.client())  # see there
                self.close_clients()
        eventually(
            lambda: not self._too_many(),
            f"{self._baseline} descriptors; now {self.server.descriptors()}",
        )

    def _too_many(self) -> bool:
        """Whether there are more descriptors than at first, connections to the provider apart."""
        return self.server.descriptors() > self._baseline + self._idle_connections()


@contextlib.contextmanager
def serving(log: Path, provider: Provider, *options: str, **more: object) -> Iterator[Rig]:
    """A server of a test's own, before `provider`.

    Args:
        log: What it prints goes there.
        provider: Whom it calls.
        options: More of its command line.
        more: As `Server` has it: the app, the command, the environment.
    """
    server = Server(log, *options, CHATSTREAM_UPSTREAM_URL=provider.url, **more)  # type: ignore[arg-type]
    rig = Rig(server, provider)
    try:
        yield rig
    finally:
        rig.close_clients()
        server.stop()


class Fleet(Rig):
    """A server of several workers: which of them is asked can be chosen, or left to chance."""

    def __init__(self, server: Server, provider: Provider, *apart: int) -> None:
        """
        Args:
            server: Its app is `tests.integration.app`.
            provider: May be another fleet's too.
            apart: Ports to which connections may be kept.
        """
        super().__init__(server, provider)
        self._apart = (provider.port, *apart)
        self._baselines: dict[int, int] = {}

    def worker(self, *but: int) -> int:
        """A worker, other than these."""
        return next(pid for pid in self.server.workers if pid not in but)

    def client_of(self, worker: int, **options: Any) -> Client:
        """A client whose connection is `worker`'s. It has to connect until it is."""

        def connected() -> Client | None:
            for _ in range(10):
                client = self.client(**options)
                if client.ask("GET", "/debug")[1]["x-worker"] == str(worker):
                    return client
                self.clients.remove(client)
                client.close()
            return None

        return eventually(connected, f"a connection to worker {worker}")  # type: ignore[return-value]

    def cancel(
        self, session: str, stream: str | None = None, *, at: int | None = None, **headers: str
    ) -> tuple[int, dict[str, Any], int]:
        """Cancels over a fresh connection, to worker `at` or whoever takes it.

        Returns:
            The status, the answer, and the worker that gave it.
        """
        client = self.client() if at is None else self.client_of(at)
        path = f"/api/chat/cancel/{session}" + (f"?streamId={stream}" if stream else "")
        status, got, body = client.ask("POST", path, **headers)
        self.clients.remove(client)
        client.close()
        return status, json.loads(body), int(got["x-worker"])

    def ready(self) -> None:
        """Has every worker warm, also those that are new."""
        new = [pid for pid in self.server.workers if pid not in self._baselines]
        if not new:
            return
        self.stream_through(new)
        # Without the clients' connections: some may not be closed yet.
        self._baselines |= descriptors(new, but=(*self._apart, self.server.port))

    def expect_of_the_new(self) -> None:
        """Workers that are new may have as many descriptors as those had that they replaced."""
        most = max(self._baselines.values())
        self._baselines = {pid: self._baselines.get(pid, most) for pid in self.server.workers}

    def stream_through(self, workers: Iterable[int] = ()) -> None:
        """Has each of these workers, or all, give a whole answer."""
        for pid in workers or self.server.workers:
            whole_answer(self.client_of(pid))
        self.close_clients()
        self._await_rest(self.server.workers)

    def check_leaks(self) -> None:
        """In no worker is anything left: see `Rig.check_leaks`."""
        self.close_clients()
        assert "Traceback" not in self.server.log()
        eventually(lambda: self.provider.stats()["generating"] == 0, "no generation")
        self._await_rest(self.server.workers)
        if leaks := self._leaks():
            self.stream_through(leaks)  # see `whole_answer`
        eventually(lambda: not self._leaks(), "as few descriptors as before")

    def _await_rest(self, workers: list[int]) -> None:
        awaited = set(workers)

        def all_rest() -> bool:
            facts = self.server.debug()  # whoever takes the connection
            if not any(facts[name] for name in ("slots", "live", "calls")):
                awaited.discard(facts["pid"])
            return not awaited

        eventually(all_rest, f"rest of {awaited}")

    def _leaks(self) -> dict[int, int]:
        """By how many descriptors each worker has more than it had."""
        now = descriptors(self.server.workers, but=self._apart)
        more = {pid: count - self._baselines.get(pid, count) for pid, count in now.items()}
        return {pid: count for pid, count in more.items() if count > 0}


@contextlib.contextmanager
def serving_fleet(log: Path, provider: Provider, *options: str, **more: object) -> Iterator[Fleet]:
    """The same as `serving`, of several workers."""
    with serving(log, provider, *options, **more) as rig:
        fleet = Fleet(rig.server, provider)
        try:
            yield fleet
        finally:
            fleet.close_clients()


@pytest.fixture
def provider() -> Iterator[Provider]:
    """One of the test's own."""
    with contextlib.closing(Provider()) as provider:
        yield provider


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        folder / "cert.pem"
    )
    return Certificate(str(folder / "cert.pem"), str(folder / "authority.pem"))


@pytest.fixture(scope="session")
def rigs(
    tmp_path_factory: pytest.TempPathFactory, certificate: Certificate
) -> Iterator[Callable[..., Rig]]:
    """`rigs(kind, worker_class, **environ)`: a server, shared by the tests that ask alike."""
    made: dict[object, Rig] = {}
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:

        def closing(thing):  # type: ignore[no-untyped-def]
            stack.callback(thing.close)
            return thing

        def rig(kind: str, worker_class: str, **environ: str) -> Rig:
            key = (kind, worker_class, *sorted(environ.items()))
            if key not in made:
                made[key] = make(kind, worker_class, environ)
            return made[key]

        def make(kind: str, worker_class: str, environ: dict[str, str]) -> Rig:
            provider: Provider | None = None
            extra: object = None
            if kind == "black hole":
                extra = closing(BlackHole())
                url = f"http://127.0.0.1:{extra.port}/v1/chat/completions"
            else:
                tls = {"certfile": certificate.cert} if "tls" in kind else {}
                delay = {"handshake_delay": 60.0} if "stalled" in kind else {}
                short = {"defaults": {"tokens": 1, "rate": 0}} if kind == "short answers" else {}
                provider = closing(Provider(**tls, **delay, **short))
                url = provider.url
                if delay:  # it cannot be asked
                    provider, extra = None, provider
            if "proxy" in kind:
                extra = closing(Proxy())
                environ = {**environ, "HTTP_PROXY": extra.url, "HTTPS_PROXY": extra.url}
            log = tmp_path_factory.mktemp("server") / f"{worker_class}.log"
            server = Server(
                log,
                **{
                    "CHATSTREAM_WORKER_CLASS": worker_class,
                    "CHATSTREAM_UPSTREAM_URL": url,
                    "REQUESTS_CA_BUNDLE": certificate.authority,
                    **MODES[worker_class],
                    **environ,
                },
            )
            stack.callback(server.stop)
            servers.append(server)
            if kind == "fleet":
                made_rig: Rig = Fleet(server, provider)
                stack.callback(made_rig.close_clients)
                return made_rig
            made_rig = Rig(server, provider, extra)
            stack.callback(made_rig.close_clients)
            made_rig.warm_up(answers=provider is not None)
            return made_rig

        yield rig
        for server in servers:
            server.terminate()  # all at once; `stop` then waits for each


@pytest.fixture(params=["gthread", "gevent"])
def worker_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(rigs: Callable[..., Rig], worker_class: str) -> Iterator[Rig]:
    """The plain server of a worker class, left as it was found."""
    rig = rigs("plain", worker_class)
    yield rig
    rig.check_leaks()


@pytest.fixture
def fleet(rigs: Callable[..., Fleet], worker_class: str) -> Iterator[Fleet]:
    """Four workers of a worker class and the default bus, left at rest."""
    fleet = rigs("fleet", worker_class, WEB_CONCURRENCY="4")
    fleet.ready()
    yield fleet
    fleet.check_leaks()


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """A browser for a module: while it is there, nothing else can have the thread's event loop."""
    from tests.integration.browser import Chromium

    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Standalone]]:
    """`standalone(worker_class, **environ)`: a service, shared by the tests that ask alike."""
    from tests.integration.browser import Standalone

    made: dict[object, Standalone] = {}
    with contextlib.ExitStack() as stack:

        def rig(worker_class: str = "gthread", **environ: str) -> Standalone:
            key = (worker_class, *sorted(environ.items()))
            if key not in made:
                log = tmp_path_factory.mktemp("standalone") / "server.log"
                made[key] = Standalone.start(log, worker_class, **environ)
                stack.callback(made[key].stop)
            return made[key]

        yield rig


@pytest.fixture
def tabs(
    chromium: Chromium, standalone: Callable[..., Standalone], request: pytest.FixtureRequest
) -> Iterator[Tabs]:
    """The page of a service, whose worker class may be a parameter, that is left at rest."""
    from tests.integration.browser import Tabs

    rig = standalone(getattr(request, "param", "gthread"))
    tabs = Tabs(chromium.profile, rig)
    yield tabs
    tabs.close()
    rig.check_leaks()
