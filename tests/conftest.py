"""What all tests share: which of them are quick, and waiting for conditions."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import pytest

if TYPE_CHECKING:
    from tests.redis_server import RedisServer

Value = TypeVar("Value")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and all that we start would have it from us.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PATIENCE = float(os.environ.get("CHATSTREAM_TEST_PATIENCE", "10"))
"""Seconds that a condition may take to come true. Slow machines raise it; it delays no test."""


TESTS = Path(__file__).parent

INTEGRATION = (
    "bus",  # workers in processes of their own, and redis-server
    "docs",
    "integration",
    "test_examples.py",
    "testing",  # apps' own tests, run as a whole
    "web/page/test_chatstream.py",  # node
    "web/test_hostile.py",  # requests at random, by the hundred
)
"""Folders and files whose tests start servers, browsers or node, or take as long as if they did.

They have the mark of that name. `pytest` leaves them out, unless it is told their path;
`pytest -m integration` runs them alone, and `make test` runs everything.
"""

NODE_MODULES = TESTS / "node" / "node_modules"
"""What npm has installed for the tests: see the Makefile."""


def require(program: str) -> None:
    """Skips the test where `program` is not installed; in CI that is a failure."""
    if shutil.which(program) is None:
        lacking(f"no {program} here")


def program(name: str) -> str:
    """The path of a program that a Python package has brought, or `require`'s verdict."""
    beside = Path(sys.executable).with_name(name)
    if not beside.exists():
        require(name)
    return str(beside if beside.exists() else shutil.which(name))


def require_package(name: str) -> None:
    """The same for a package of tests/node/package.json, which `make test` installs."""
    require("node")
    if not (NODE_MODULES / name).is_dir():
        lacking(f"no npm package {name} here")


def lacking(what: str) -> NoReturn:
    """Skips the test for want of something; in CI that is a failure."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


def is_integration(path: Path) -> bool:
    """Whether the tests at `path` are left out where nobody asks for them."""
    return any(path.is_relative_to(TESTS / name) for name in INTEGRATION)


def pytest_configure(config: pytest.Config) -> None:
    """Who names such a file or folder asks for it: then nothing of what was named is left out."""
    named = (config.invocation_params.dir / arg.partition("::")[0] for arg in config.args)
    if config.option.markexpr == "not integration" and any(map(is_integration, named)):
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)  # before the marks are asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is not quick."""
    for item in items:
        if is_integration(item.path):
            item.add_marker("integration")


def pytest_collection_finish() -> None:
    """What is here for good is no garbage collector's business: see `nobody_elses_garbage`."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def nobody_elses_garbage() -> None:
    """What other modules left is gone: descriptors are counted in many tests."""
    gc.collect()


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a thread or a descriptor behind."""
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= threads, "threads as before")
    eventually(lambda: descriptors() <= fds, "descriptors as before")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that no test stops or fills with what another could see: use a prefix."""
    from tests.redis_server import RedisServer

    require("redis-server")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to stop and start as it likes."""
    from tests.redis_server import RedisServer

    require("redis-server")
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    yield server
    server.stop()


def fill(sock: socket.socket) -> None:
    """Sends until the kernel takes no more: the peer's window is shut, the send queue full."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def eventually(condition: Callable[[], Value], what: str = "", patience: float = PATIENCE) -> Value:
    """The condition's first true value. Fails when there is none within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {patience} s: {what or condition}; last seen: {value!r}")
        time.sleep(0.005)
    return value


@pytest.fixture
def short_base() -> Iterator[Path]:
    """A base for a bus that is not too long, wherever the tests run."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)
