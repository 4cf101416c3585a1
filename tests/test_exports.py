"""The front door: what `import chatstream` promises."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import chatstream

NAMES = [
    "BusUnavailable",
    "Busy",
    "Cause",
    "ChatStream",
    "ChatStreamError",
    "ConfigError",
    "Kind",
    "Outcome",
    "Phase",
    "Refused",
    "Service",
    "Stream",
    "StreamAborted",
    "StreamError",
    "StreamIterable",
    "Unconfirmed",
    "UpstreamError",
]


def test_the_names() -> None:
    """A new or a lost name is a decision: `__all__` is this list, in this order."""
    assert chatstream.__all__ == NAMES


def test_nothing_else_is_at_the_front_door() -> None:
    """Every public name that is no submodule is in `__all__`, and each of them is there."""
    public = {
        name
        for name, value in vars(chatstream).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(NAMES)


def test_every_name_is_documented_and_ours() -> None:
    """Each has a docstring of its own and comes from a module of this package."""
    for name in NAMES:
        value = getattr(chatstream, name)
        assert value.__module__.startswith("chatstream."), name
        assert inspect.getdoc(value), name
        assert value.__doc__, name


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers of users read our annotations."""
    files = inspect.getfile(chatstream).rpartition("/")[0]
    with open(f"{files}/py.typed") as marker:
        assert marker.read() == ""


def test_the_import_starts_nothing() -> None:
    """Importing makes no thread, no socket, and loads neither gevent, gunicorn nor the simulator.

    Nor urllib3: with preload_app, gevent patches ssl after this import, and urllib3 must see that.
    Nor redis-py, which is an extra, and imports ssl as well.
    """
    script = """
import os, sys, threading
before = len(os.listdir("/proc/self/fd"))
import chatstream
assert threading.active_count() == 1
assert len(os.listdir("/proc/self/fd")) == before
heavy = {"gevent", "gunicorn", "chatstream.simulator", "urllib3", "requests", "redis"}
loaded = heavy & set(sys.modules)
assert not loaded, loaded
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stderr
