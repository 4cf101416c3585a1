"""bus: which bus a setting makes, and what is refused at the start."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chatstream import bus
from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Answer, Request
from chatstream.bus.unix.directory import default_base, service_directory
from chatstream.bus.unix.unix_bus import UnixBus
from chatstream.bus.unix.visitor import UnixVisitor
from chatstream.errors import ConfigError
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop
from tests.bus.peer import Peer

if TYPE_CHECKING:
    from tests.redis_server import RedisServer

Lines = Callable[[], list[str]]


def settings(text: str | None) -> Settings:
    return Settings.load({"CHATSTREAM_BUS": text} if text else {}, {})


def created(text: str | None, app: str = "0") -> Bus:
    """The bus of a setting, which has not been started."""

    def receive(request: Request) -> Answer:
        return Answer.ABSENT

    return bus.create(settings(text), receive, Loop(), app)


@pytest.fixture
def base() -> Iterator[Path]:
    """A base that is not too long, wherever the tests run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, "chatstream")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def in_gunicorn() -> Iterator[str]:
    """This process looks like a worker of gunicorn's; the name of its service."""

    class Worker:
        def __init__(self) -> None:
            self.sockets = [listener]

        def handle_exit(self, signum: int, frame: object) -> None:
            raise AssertionError("no signal was sent")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = signal.signal(signal.SIGTERM, Worker().handle_exit)
        yield str(os.fstat(listener.fileno()).st_ino)
        signal.signal(signal.SIGTERM, before)


# Which


@pytest.mark.parametrize("text", [None, "local"])
def test_without_gunicorn_it_is_local(text: str | None, warnings: Lines) -> None:
    """One process is the rule there, and nothing is said about it."""
    bus.check(settings(text))
    assert isinstance(created(text), LocalBus)
    assert warnings() == []


def test_unix_without_gunicorn_is_local_with_a_warning(warnings: Lines) -> None:
    """Named without a directory, it has nothing to know its service by: it says what to set."""
    bus.check(settings("unix"))
    assert isinstance(created("unix"), LocalBus)
    (line,) = warnings()
    assert line.startswith("CHATSTREAM_BUS=unix ")
    assert "CHATSTREAM_BUS=unix:///a/directory" in line


@pytest.mark.parametrize("text", [None, "unix"])
def test_under_gunicorn_it_is_unix(in_gunicorn: str, warnings: Lines, text: str | None) -> None:
    """By default too, in the directory of the service that has this listening socket."""
    joined = created(text)
    assert isinstance(joined, UnixBus)
    assert joined._path == service_directory(default_base(), in_gunicorn, "0")
    assert warnings() == []


def test_local_under_gunicorn_is_local(in_gunicorn: str) -> None:
    """What is set is taken."""
    assert isinstance(created("local"), LocalBus)


def test_a_directory_of_ones_own(base: Path, warnings: Lines) -> None:
    """unix:///a/directory is for any server: the directory says which service it is."""
    text = f"unix://{base}"
    bus.check(settings(text))
    joined = created(text)
    assert isinstance(joined, UnixBus)
    assert joined._path == service_directory(base, "service", "0")
    assert warnings() == []


def test_a_directory_of_ones_own_under_gunicorn(base: Path, in_gunicorn: str) -> None:
    """Two gunicorns that are given one directory are one service."""
    joined = created(f"unix://{base}")
    assert isinstance(joined, UnixBus)
    assert joined._path == service_directory(base, "service", "0")


@pytest.mark.parametrize("where", ["the default", "a directory"])
def test_two_apps_do_not_meet(base: Path, in_gunicorn: str, where: str) -> None:
    """Each app of a process has a directory, and each process the same one for the same app."""
    text = None if where == "the default" else f"unix://{base}"
    paths = []
    for app in ("a1", "a2", "a1"):
        joined = created(text, app)
        assert isinstance(joined, UnixBus)
        paths.append(joined._path)
    assert paths[0] == paths[2] != paths[1]
    assert {path.parent for path in paths} == {paths[0].parent}


def test_nothing_is_made_before_the_start(base: Path) -> None:
    """Neither by the check nor by the bus itself: the server may fork afterwards."""
    descriptors = len(os.listdir("/proc/self/fd"))
    text = f"unix://{base}"
    bus.check(settings(text))
    created(text).close()
    assert list(base.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_redis(shared_redis: RedisServer, warnings: Lines) -> None:
    """An address of a server that is there, with the service's own prefix."""
    from chatstream.bus.redis.redis_bus import RedisBus

    bus.check(settings(shared_redis.url))
    joined = created(shared_redis.url)
    assert isinstance(joined, RedisBus)
    joined.close()
    assert warnings() == []


# Refused at the start


def test_a_missing_directory(base: Path) -> None:
    """The sentence names the setting and the directory, and says what to do."""
    with pytest.raises(ConfigError) as caught:
        bus.check(settings(f"unix://{base}/none"))
    sentence = f"CHATSTREAM_BUS: '{base}/none' is not a directory. Please make it."
    assert sentence == str(caught.value)


def test_a_directory_that_is_too_long() -> None:
    """Found at the start, not when the first socket is bound."""
    base = "/" + "x" * 100
    with pytest.raises(ConfigError, match=r"^CHATSTREAM_BUS: '/x+' is too long by \d+ bytes: the"):
        bus.check(settings(f"unix://{base}"))


@pytest.mark.parametrize("text", ["redis://host:6379/0", "rediss://user:hunter2@host/0"])
def test_without_redis_py(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The extra is named, and how to install it; the address, with its password, is not."""
    monkeypatch.setitem(sys.modules, "redis", None)
    for name in [name for name in sys.modules if name.startswith("chatstream.bus.redis.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"pip install 'chatstream\[redis\]'$") as caught:
        bus.check(settings(text))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "local", "unix"])
def test_without_redis_py_the_others_work(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """Who sets no Redis needs no redis-py."""
    monkeypatch.setitem(sys.modules, "redis", None)
    for name in [name for name in sys.modules if name.startswith("chatstream.bus.redis.")]:
        monkeypatch.delitem(sys.modules, name)
    bus.check(settings(text))
    assert isinstance(created(text), LocalBus)


# Looking in


def entered(base: Path, service: str) -> Peer:
    """A process that lives in a service's directory."""
    return Peer(
        "from pathlib import Path",
        "from chatstream.bus.unix.directory import Directory",
        f"one = Directory(Path({str(service_directory(base, service, 'app'))!r}))",
        "(one.path / 'early').mkdir()",
    )


@pytest.mark.parametrize("text", [None, "unix"])
def test_every_service_of_an_app_is_visited(
    base: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """Those of this host, where no directory is set; of no other app."""
    monkeypatch.setattr(bus, "default_base", lambda: base)
    peers = [entered(base, "7"), entered(base, "8")]
    try:
        visitors = bus.visit(settings(text), "app")
        assert [type(visitor) for visitor in visitors] == [UnixVisitor] * 2
        for visitor in visitors:
            visitor.close()
        assert bus.visit(settings(text), "other") == []
    finally:
        for peer in peers:
            peer.kill()
    assert bus.visit(settings(text), "app") == []


def test_a_look_that_fails_leaves_nothing_open(base: Path, nothing_left: None) -> None:
    """One service's directory can be looked into, the other's is of another pid namespace."""
    peers = [entered(base, "7"), entered(base, "8")]
    note = service_directory(base, "8", "app") / "pids"
    note.unlink()
    note.symlink_to("pid:[1]")
    try:
        with pytest.raises(OSError, match="pid namespace"):
            bus.visit(settings(f"unix://{base}"), "app")
    finally:
        for peer in peers:
            peer.kill()
