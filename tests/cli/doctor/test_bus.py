"""doctor.bus: whether the workers will find each other."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chatstream.cli.doctor.bus import check_bus
from chatstream.cli.doctor.check import State
from chatstream.settings.table import Settings
from tests.bus.peer import listening

if TYPE_CHECKING:
    from tests.redis_server import RedisServer
from tests.cli.doctor.findings import states


@pytest.mark.parametrize(
    ("text", "workers", "state", "says"),
    [
        (None, None, State.OK, "under gunicorn it would be unix"),
        ("local", 1, State.OK, "single process"),
        ("local", 4, State.WARN, "there are 4 workers"),
    ],
)
def test_a_local_bus(text: str | None, workers: int | None, state: State, says: str) -> None:
    (check,) = check_bus(Settings(bus=text), "app", workers)
    assert check.state is state
    assert says in check.says


def test_a_unix_bus(short_base: Path) -> None:
    """Nobody runs yet, and nothing is made by looking."""
    checks = list(check_bus(Settings(bus=f"unix://{short_base}"), "app", 4))
    assert states(checks) == {"bus": "ok", "workers": "note"}
    assert list(short_base.iterdir()) == []


def test_a_unix_bus_without_gunicorn() -> None:
    assert next(iter(check_bus(Settings(bus="unix"), "app", None))).state is State.NOTE


def test_a_directory_that_is_missing_or_not_ones_own(short_base: Path) -> None:
    (check,) = check_bus(Settings(bus=f"unix://{short_base}/missing"), "app", 1)
    assert check.state is State.FAIL
    assert "Please make it" in check.says
    (short_base / f"chatstream-{os.geteuid()}").mkdir(mode=0o755)
    (check,) = check_bus(Settings(bus=f"unix://{short_base}"), "app", 1)
    assert check.state is State.FAIL
    assert "only this user can enter" in check.says


def test_a_worker_that_does_not_answer_is_named(short_base: Path) -> None:
    """It has entered and listens, and that is all it does."""
    path = short_base / f"chatstream-{os.geteuid()}" / "service-app"
    peer = listening(path)
    try:
        _, silent, running = check_bus(Settings(bus=f"unix://{short_base}"), "app", 1)
    finally:
        peer.kill()
    assert silent.state is State.WARN
    assert str(peer.pid) in silent.says
    assert running.says == "1 run, with 0 streams."


def test_redis(redis_server: RedisServer) -> None:
    """Its version and time; a policy that evicts is warned of."""
    settings = Settings(bus=redis_server.url)
    checks = list(check_bus(settings, "app", 4))
    assert states(checks) == {"bus": "ok", "workers": "note"}
    assert " answers in " in checks[0].says
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    check = next(iter(check_bus(settings, "app", 4)))
    assert check.state is State.WARN
    assert "allkeys-lru" in check.says
    assert "noeviction" in check.says
    assert redis_server.command("DBSIZE") == 0


def test_redis_that_is_away_or_wants_a_password(redis_server: RedisServer) -> None:
    redis_server.command("CONFIG", "SET", "requirepass", "hunter2")
    (check,) = check_bus(Settings(bus=redis_server.url), "app", 4)
    assert check.state is State.FAIL
    assert "password" in check.says
    redis_server.stop()
    (check,) = check_bus(Settings(bus=redis_server.url), "app", 4)
    assert check.state is State.FAIL
    assert "refused" in check.says


def test_without_redis_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that needs it has been imported, and it is not there to be."""
    for name in [name for name in sys.modules if name.startswith("chatstream.bus.redis.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    (check,) = check_bus(Settings(bus="redis://127.0.0.1:1/0"), "app", 4)
    assert check.state is State.FAIL
    assert "chatstream[redis]" in check.says
