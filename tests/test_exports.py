"""The front door: what `import chatstream` promises."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest

import chatstream

NAMES = [
    "BusUnavailable",
    "Busy",
    "Cancelled",
    "Cause",
    "ChatStream",
    "ChatStreamError",
    "ConfigError",
    "Kind",
    "Outcome",
    "Phase",
    "Refused",
    "Service",
    "Started",
    "Stream",
    "StreamAborted",
    "StreamError",
    "StreamIterable",
    "Unconfirmed",
    "UpstreamError",
    "Usage",
    "cancel_answered",
    "stream_ended",
    "stream_started",
]

SIGNALS = NAMES[-3:]


def test_the_names() -> None:
    """A new or a lost name is a decision: `__all__` is this list, in this order."""
    assert chatstream.__all__ == NAMES


def test_nothing_else_is_at_the_front_door() -> None:
    """A star brings these names and no other; what is not there is an AttributeError, as ever."""
    brought: dict[str, object] = {}
    exec("from chatstream import *", brought)
    assert set(brought) - {"__builtins__"} == set(NAMES)
    assert set(NAMES) <= set(dir(chatstream))
    with pytest.raises(AttributeError, match="Strean"):
        _ = chatstream.Strean  # type: ignore[attr-defined]


def test_nothing_of_ours_is_at_the_front_door_by_accident() -> None:
    """What the module itself imports to be lazy is Python's; of ours there is only the list."""
    ours = {
        name
        for name, value in vars(chatstream).items()
        if getattr(value, "__module__", "").startswith("chatstream")
        and not isinstance(value, types.ModuleType)
        and not name.startswith("_")
    }
    assert ours <= set(NAMES)


def test_every_name_is_documented_and_ours() -> None:
    """Each has a docstring of its own and comes from a module of this package."""
    for name in NAMES:
        value = getattr(chatstream, name)
        if name not in SIGNALS:
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


@pytest.mark.parametrize("worker", ["gthread", "gevent"])
def test_gunicorns_master_gets_only_the_worker(worker: str) -> None:
    """It imports the worker's class; what it has imported, gevent cannot patch any more.

    And a reload does not renew: a worker of the next generation would have the old extension.
    """
    script = f"""
import sys, threading
import chatstream.workers.{worker}
assert threading.active_count() == 1
kept_out = {{"flask", "werkzeug", "urllib3", "requests", "redis", "chatstream.service"}}
if "{worker}" != "gevent":
    kept_out.add("gevent")
loaded = kept_out & set(sys.modules)
assert not loaded, loaded
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 0, run.stderr
