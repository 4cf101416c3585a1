"""What docs/servers.md says of every server: a test for each cell of its table."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import SHUT_DOWN, Client
from tests.integration.conftest import Certificate, Rig
from tests.integration.processes import ROOT, Provider, children, is_running
from tests.integration.scenes import MOMENTS, SCENES
from tests.integration.servers import COLUMNS, SERVERS, THREADS, run

DOCUMENT = ROOT / "docs" / "servers.md"


BEGUN = (*MOMENTS, "blocked")

AT_ONCE = 1.0
"""Seconds, on a machine that does much else."""

numbers = itertools.count(1)

behind_tls = [name for name, kind in SERVERS.items() if kind.tls]


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, certificate: Certificate
) -> Iterator[Callable[..., Rig]]:
    """`running(name, tls)`: a server of that name with a provider of its own, for the module."""
    made: dict[tuple[str, bool], Rig] = {}
    with contextlib.ExitStack() as stack:

        def rig(name: str, tls: bool = False) -> Rig:
            if (name, tls) not in made:
                log = tmp_path_factory.mktemp("server") / f"{name}.log"
                provider = stack.enter_context(contextlib.closing(Provider()))
                secured = certificate if tls else None
                made[name, tls] = stack.enter_context(
                    run(SERVERS[name], log, provider, certificate=secured)
                )
            return made[name, tls]

        yield rig
        for left in made.values():
            left.server.terminate()  # all at once


@pytest.fixture
def rig(running: Callable[..., Rig], name: str) -> Iterator[Rig]:
    rig = running(name)
    yield rig
    at_rest(rig)


@pytest.fixture
def tls_rig(running: Callable[..., Rig], name: str) -> Iterator[Rig]:
    rig = running(name, True)
    yield rig
    at_rest(rig)


def at_rest(rig: Rig) -> None:
    """Nothing live is left, and nothing in the log that should not be."""
    rig.close_clients()
    eventually(lambda: rig.server.debug()["slots"] == 0, "every slot")
    assert rig.server.errors() == []


def begin(rig: Rig, scene: str) -> tuple[str, Client]:
    """A stream in the middle of its scene, as the provider sees it: some servers answer nobody."""
    session = f"{scene}-{next(numbers)}"
    blocked = {"receive_buffer": 4096} if scene == "blocked" else {}
    client = rig.client(tls=rig.extra, **blocked)
    client.post(session, simulate={"id": session, **SCENES[scene]})
    rig.provider.request(session)
    if scene == "blocked":
        eventually(lambda: _full(rig, session), "a full path")
    elif scene != "headers":
        client.until(b'"content"')
    return session, client


def _full(rig: Rig, session: str) -> bool:
    """Whether nothing moves any more, in the time that so many questions take."""

    def delivered() -> int:
        return int(rig.provider.request(session)["delivered"])

    before = delivered()
    return before > 0 and all(delivered() == before for _ in range(20))


def assert_stopped_at_once(rig: Rig, session: str, since: int, cause: str) -> None:
    figure = rig.provider.request(session, "closed")
    assert figure["closed_by"] == "client"
    took = (figure["closed_ns"] - since) / 1e9
    print(f"\n{session}, {cause}: {took * 1000:.2f} ms")
    assert took < AT_ONCE
    rig.close_clients()  # one that does not read would hold the end up for two seconds
    assert f" aborted by client/cancel cause={cause} " in rig.server.ending_of(session)


@pytest.mark.parametrize("name", SERVERS)
def test_a_whole_answer(rig: Rig, name: str) -> None:
    """Whatever a server cannot do, it serves; and of what it cannot it says so."""
    client = rig.client().post(f"whole-{name}", simulate={"tokens": 3, "rate": 100})
    client.until(b"data: [DONE]")
    client.close()
    assert " completed " in rig.server.ending_of(f"whole-{name}")
    log = rig.server.log()
    assert ("sync worker serves one stream at a time" in log) == (name == "gunicorn-sync")
    if name == "gunicorn-gthread":
        assert "at a time" not in log


@pytest.mark.parametrize("scene", BEGUN)
@pytest.mark.parametrize("name", SERVERS)
def test_a_client_closes(rig: Rig, name: str, scene: str) -> None:
    """Its socket tells, no ping: there is none."""
    assert SERVERS[name].cell("a client closes") == "at once"
    session, client = begin(rig, scene)
    since = time.monotonic_ns()
    client.close()
    assert_stopped_at_once(rig, session, since, "client")


@pytest.mark.parametrize("scene", BEGUN)
@pytest.mark.parametrize("name", SERVERS)
def test_a_cancel(rig: Rig, name: str, scene: str) -> None:
    """Where it is answered, the provider has been told; where it is not, it waits in a queue."""
    session, client = begin(rig, scene)
    other = rig.client(timeout=1 if SERVERS[name].cell("a cancel") == "cannot get in" else 20)
    since = time.monotonic_ns()
    if SERVERS[name].cell("a cancel") == "cannot get in":
        with pytest.raises(TimeoutError):
            other.ask("POST", f"/api/chat/cancel/{session}")
        assert rig.provider.request(session)["closed_ns"] is None
        client.close()
        return
    assert SERVERS[name].cell("a cancel") == "at once"
    status, _, answer = other.ask("POST", f"/api/chat/cancel/{session}")
    assert (status, json.loads(answer)) == (200, {"ok": True, "cancelled": True})
    assert_stopped_at_once(rig, session, since, "cancel")


@pytest.mark.parametrize("name", ["flask-run"])
def test_resets_give_slots_back(rig: Rig, name: str) -> None:
    """More than there are: werkzeug's server does not close what it walks after a RST."""
    for number in range(SERVERS[name].slots + 2):
        client = rig.client().post(f"rst-{number}", simulate={"rate": 500, "tokens": 100_000})
        client.until(b'"content"')
        client.reset()
        assert "cause=client" in rig.server.ending_of(f"rst-{number}")


def say_goodbye(client: Client) -> None:
    """As a browser: TLS is told of the end before TCP is."""
    client.sock.settimeout(0)
    with contextlib.suppress(ssl.SSLError):  # the server's goodbye is not waited for
        client.sock.unwrap()  # type: ignore[attr-defined]
    client.close()


LEAVES = [
    *((scene, Client.close) for scene in BEGUN),
    *((scene, leave) for scene in ("silent", "blocked") for leave in (Client.reset, say_goodbye)),
]
"""In every scene; and in every way, while nothing is written and in the middle of a write."""


@pytest.mark.parametrize(("scene", "leave"), LEAVES)
@pytest.mark.parametrize("name", behind_tls)
def test_a_client_behind_tls_leaves(
    tls_rig: Rig, name: str, scene: str, leave: Callable[[Client], None]
) -> None:
    """The socket below tells as much."""
    session, client = begin(tls_rig, scene)
    since = time.monotonic_ns()
    leave(client)
    assert_stopped_at_once(tls_rig, session, since, "client")


@pytest.mark.parametrize("scene", BEGUN)
@pytest.mark.parametrize("name", [name for name in behind_tls if name != "gunicorn-sync"])
def test_a_cancel_behind_tls(tls_rig: Rig, name: str, scene: str) -> None:
    """And its stream's end is one that TLS vouches for."""
    session, client = begin(tls_rig, scene)
    since = time.monotonic_ns()
    assert tls_rig.server.cancel(session)[0] == 200
    if scene != "blocked":
        assert client.head()[0] == 200
        assert b"[DONE]" not in client.body()
    assert_stopped_at_once(tls_rig, session, since, "cancel")


@pytest.mark.parametrize("name", SERVERS)
def test_sigterm(name: str, tmp_path: Path, provider: Provider) -> None:
    """Told or cut off, the provider knows, and the processes are gone."""
    says = SERVERS[name].cell("SIGTERM")
    with run(SERVERS[name], tmp_path / "log", provider, CHATSTREAM_DRAIN="0.8") as rig:
        session, client = begin(rig, "silent")
        client.head()
        processes = [rig.server.pid, *children(rig.server.pid)]
        rig.server.terminate()
        end = _what_comes(client)
        # A reset where bytes had come that nobody had read.
        assert provider.request(session, "closed")["closed_by"] in ("client", "reset")
        rig.close_clients()
        eventually(lambda: not any(map(is_running, processes)), "the end of all processes")
        if says == "drained, told":
            assert SHUT_DOWN in end
            assert " aborted by shutdown cause=shutdown " in rig.server.ending_of(session)
        else:
            assert says == "cut off"
            assert b"error" not in end
            assert [line for line in rig.server.lines_of(session) if "started" not in line] == []


def _what_comes(client: Client) -> bytes:
    """What a client is sent until it is told, or cut off."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while SHUT_DOWN not in data and (piece := client.sock.recv(65536)):
            data += piece
    return data


@pytest.mark.parametrize("name", SERVERS)
def test_a_stream_holds(rig: Rig, name: str) -> None:
    """More streams than threads, or as many as there are slots; and a cancel gets in."""
    kind = SERVERS[name]
    holds = kind.cell("a stream holds")
    if holds == "the worker":
        begin(rig, "silent")
        late = rig.client(timeout=1).post("late")
        with pytest.raises(TimeoutError):
            late.head()
        return
    streams = [begin(rig, "silent") for _ in range(min(kind.slots, 2 * THREADS))]
    if holds == "a thread":
        assert kind.slots < THREADS
        assert rig.client().post().head()[0] == 503
    else:
        assert holds in ("nothing", "a greenlet")
        assert len(streams) > THREADS
    assert rig.server.cancel(streams[-1][0])[0] == 200
    assert rig.provider.request(streams[-1][0], "closed")["closed_by"] == "client"


SHOWN_BY = {
    "a client closes": "test_every_server.py::test_a_client_closes",
    "a cancel": "test_every_server.py::test_a_cancel",
    "a client vanishes": "test_vanished.py::test_a_client_of_any_server_that_vanished",
    "SIGTERM": "test_every_server.py::test_sigterm",
    "a stream holds": "test_every_server.py::test_a_stream_holds",
}


def _table() -> list[list[str]]:
    """The rows of the document's first table, without the one that draws the line."""
    rows = [
        line for line in DOCUMENT.read_text().split("\n\n## ")[0].splitlines() if line[:1] == "|"
    ]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [row for row in cells if set("".join(row)) - set("-: ")]


def test_the_table_says_what_the_tests_show() -> None:
    """Every server has its row, and each cell is the word that its test asserts."""
    head, *rows, shown_by = _table()
    assert tuple(head[1:-1]) == COLUMNS
    names = [re.search(r"`([a-z-]+)`$", row[0])[1] for row in rows]  # type: ignore[index]
    assert names == list(SERVERS)
    for name, row in zip(names, rows, strict=True):
        assert tuple(row[1:-1]) == SERVERS[name].says
    tests = [cell.strip("`") for cell in shown_by[1:-1]]
    assert tests == [test.partition("::")[2] for test in SHOWN_BY.values()]


def test_every_cell_has_its_test() -> None:
    """One that pytest finds, by the row's name."""
    files = {test.partition("::")[0] for test in SHOWN_BY.values()}
    paths = [f"tests/integration/{file}" for file in sorted(files)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "--override-ini=addopts=-q"]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, timeout=60)
    found = done.stdout.decode()
    for test in SHOWN_BY.values():
        ids = re.findall(rf"{re.escape(test)}\[([^\]]*)\]", found)
        shown = {name for name in SERVERS for words in ids if name in words}
        assert shown == set(SERVERS), f"{test} does not show {set(SERVERS) - shown}"
