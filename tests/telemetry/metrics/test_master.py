"""metrics.shared: the folder that a master makes for its workers."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatstream.telemetry.metrics import master


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is made yet, and what is comes into the test's own place."""
    monkeypatch.setattr(master, "_made", None)
    monkeypatch.setattr(master, "_lock", None)
    monkeypatch.setattr(master, "_MEMORY", tmp_path)
    monkeypatch.setenv(master.FOLDER, "")
    yield
    if master._lock is not None:
        os.close(master._lock)


def made() -> Path:
    return Path(os.environ[master.FOLDER])


def test_it_is_fresh_private_and_made_once(tmp_path: Path) -> None:
    """gunicorn executes its configuration again at each reload: the folder stays."""
    master.share()
    folder = made()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("*.db")) == []
    master.share()
    assert folder == made()


def test_a_folder_of_the_users_own_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither another is made, nor is that one removed."""
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setenv(master.FOLDER, str(mine))
    master.share()
    assert made() == mine
    master.on_exit(None)
    assert mine.exists()


def test_that_of_another_master_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is in the environment of a master that was executed by it (USR2)."""
    theirs = tmp_path / "chatstream-metrics-theirs"
    theirs.mkdir()
    lock = os.open(theirs / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setenv(master.FOLDER, str(theirs))
    master.share()
    assert made() != theirs
    master.on_exit(None)
    assert theirs.exists()
    assert not made().exists()
    os.close(lock)


def test_what_was_left_is_swept_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    """Whose lock nobody holds is of a master that was killed."""
    for name in ("left", "used", "new", "other"):
        (tmp_path / f"chatstream-metrics-{name}").mkdir()
    for name in ("left", "used"):
        (tmp_path / f"chatstream-metrics-{name}" / "lock").touch()
        (tmp_path / f"chatstream-metrics-{name}" / "counter_1.db").touch()
    lock = os.open(tmp_path / "chatstream-metrics-used" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    master.share()
    names = {folder.name.removeprefix("chatstream-metrics-") for folder in tmp_path.iterdir()}
    assert names - {made().name.removeprefix("chatstream-metrics-")} == {"used", "new", "other"}
    os.close(lock)


def test_a_fork_removes_nothing() -> None:
    """A worker that ends, or what an app has forked, is not the master."""
    master.share()
    folder = made()
    if (pid := os.fork()) == 0:
        master.on_exit(None)
        os._exit(0)
    os.waitpid(pid, 0)
    assert folder.exists()
    master.on_exit(None)
    assert not folder.exists()


def test_it_is_for_the_user_whom_the_workers_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """A master of root's gives it away; any other cannot, and need not."""
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append((path, uid, gid)))
    arbiter = SimpleNamespace(cfg=SimpleNamespace(uid=33, gid=34))
    master.on_starting(arbiter)  # nothing is made
    master.share()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    master.on_starting(arbiter)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    master.on_starting(arbiter)
    assert given == [(made(), 33, 34)]


def test_the_dead_are_in_no_gauge(tmp_path: Path) -> None:
    """Of who died what only holds for the living is removed; and nothing else."""
    master.share()
    names = ["gauge_livesum_7.db", "counter_7.db", "histogram_7.db", "gauge_livesum_8.db"]
    for name in names:
        (made() / name).touch()
    master.child_exit(None, SimpleNamespace(pid=7))
    assert sorted(names[1:]) == sorted(path.name for path in made().glob("*.db"))
    master.on_exit(None)
    master.child_exit(None, SimpleNamespace(pid=8))  # the folder is gone: nothing happens


def test_the_master_gets_neither_flask_nor_the_library() -> None:
    """What it imports, gevent could not patch any more, nor a reload renew."""
    script = """
import sys, threading
from chatstream.telemetry.metrics import child_exit, on_exit, on_starting, share
share()
kept_out = {"flask", "werkzeug", "requests", "urllib3", "prometheus_client", "gevent", "blinker"}
assert not kept_out & set(sys.modules), kept_out & set(sys.modules)
assert threading.active_count() == 1
on_exit(None)
"""
    environ = {key: value for key, value in os.environ.items() if key != master.FOLDER}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 0, run.stderr
