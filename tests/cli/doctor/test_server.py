"""doctor.server: gunicorn's configuration, read as gunicorn does, and the kernel."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from chatstream.cli.doctor.check import Check, State
from chatstream.cli.doctor.server import (
    Gunicorn,
    check_gunicorn,
    check_kernel,
    check_reach,
    read_gunicorn,
)
from chatstream.settings.table import Settings
from tests.cli.doctor.findings import OURS, only, states


def gunicorn(**facts: Any) -> Gunicorn:
    usual = {"worker": "gthread", "ours": True, "workers": 2, "threads": 16}
    usual |= {"connections": 2000, "graceful": 30, "preload": False, "h2": False}
    return Gunicorn(**{**usual, "descriptors": 20_000, **facts})


@pytest.mark.parametrize(
    ("facts", "name", "state", "says"),
    [
        ({}, "worker", State.OK, "2 of gthread of 16 threads, ours."),
        ({"worker": "gevent"}, "worker", State.OK, "2 of gevent, ours."),
        ({"worker": "sync"}, "worker", State.FAIL, f"--worker-class {OURS}"),
        ({"ours": False}, "worker", State.WARN, "chatstream.workers.gthread"),
        ({"worker": "gevent", "ours": False}, "worker", State.WARN, "chatstream.workers.gevent"),
        ({"worker": "tornado", "ours": False}, "worker", State.WARN, "not one that"),
        ({"threads": 4}, "worker", State.WARN, "at least 5"),
        ({}, "slots", State.OK, "1968 streams a worker"),
        ({"connections": 11_000}, "slots", State.OK, "3948 streams a worker; 20000"),
        ({"ours": False}, "slots", State.OK, "12 streams a worker"),
        ({"worker": "gevent"}, "slots", State.OK, "1968 streams a worker"),
        ({"worker": "gevent", "descriptors": 1024}, "slots", State.WARN, "MAX_STREAMS=153"),
        ({}, "drain", State.OK, "25 s"),
        ({"graceful": 28}, "drain", State.OK, "25 s"),
        ({"graceful": 27}, "drain", State.WARN, "24 s, not for CHATSTREAM_DRAIN=25"),
        ({"ours": False, "preload": True}, "preload_app", State.WARN, "post_worker_init"),
        ({"h2": True}, "http2", State.WARN, "nginx"),
    ],
)
def test_a_configuration_of_gunicorn(
    facts: dict[str, Any], name: str, state: State, says: str
) -> None:
    """Worker class, numbers and times: what they come to, and what to change."""
    check = only(check_gunicorn(gunicorn(**facts), Settings()), name)
    assert check.state is state
    assert says in check.says


def test_a_configuration_that_is_well_says_no_more() -> None:
    found = states(check_gunicorn(gunicorn(preload=True), Settings()))  # ours is told by itself
    assert found == {"worker": "ok", "slots": "ok", "drain": "ok"}


CLOSED = Settings.load({"CHATSTREAM_TOKENS": "tok-1"}, {})


@pytest.mark.parametrize(
    ("hosts", "here"),
    [
        ((), True),
        (("127.0.0.1",), True),
        (("127.1.2.3", "::1", "localhost"), True),
        (("[::1]",), True),
        (("",), False),
        (("0.0.0.0",), False),
        (("::",), False),
        (("10.0.0.7",), False),
        (("web-1",), False),
        (("127.0.0.1", "0.0.0.0"), False),
    ],
)
def test_who_reaches_it(hosts: tuple[str, ...], here: bool) -> None:
    """Open and beyond this machine is worth a warning; a token without TLS, a note."""
    found = gunicorn(hosts=hosts)
    opened = list(check_reach(found, Settings(), identifies=False))
    closed = list(check_reach(found, CLOSED, identifies=True))
    assert [check.state for check in opened] == ([] if here else [State.WARN])
    assert [check.state for check in closed] == ([] if here else [State.NOTE])
    assert all("CHATSTREAM_TOKENS" in check.says for check in opened)
    assert list(check_reach(gunicorn(hosts=hosts, tls=True), CLOSED, identifies=True)) == []
    assert list(check_reach(found, Settings(), identifies=True)) == []  # it has a login


@pytest.mark.parametrize(
    ("arguments", "hosts", "tls"),
    [
        ("--bind 0.0.0.0:80 --bind [::1]:81", ("0.0.0.0", "::1"), False),
        ("--bind :8000", ("",), False),
        ("--bind unix:/run/x.sock", (), False),
        ("--bind 127.0.0.1:1 --certfile x --keyfile y", ("127.0.0.1",), True),
    ],
)
def test_where_gunicorn_listens(arguments: str, hosts: tuple[str, ...], tls: bool) -> None:
    """As it understands its arguments itself."""
    found = read_gunicorn(arguments)
    assert isinstance(found, Gunicorn), found
    assert (found.hosts, found.tls) == (hosts, tls)


def test_more_streams_than_descriptors() -> None:
    check = only(check_gunicorn(gunicorn(descriptors=1024), Settings(max_streams=500)), "slots")
    assert check.state is State.WARN
    assert "500 streams a worker" in check.says
    assert "ulimit -n" in check.says


def test_streams_that_keep_their_threads() -> None:
    check = only(check_gunicorn(gunicorn(threads=64), Settings(detach=False)), "slots")
    assert "56 streams a worker" in check.says


@pytest.mark.parametrize("how", ["arguments", "GUNICORN_CMD_ARGS", "file"])
def test_gunicorns_configuration_is_read_as_gunicorn_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """Its command line, its environment, its file."""
    arguments = f"--worker-class {OURS} --threads 9 --workers 3 --graceful-timeout 40"
    if how == "file":
        lines = [f"worker_class = {OURS!r}", "threads = 9", "workers = 3", "graceful_timeout = 40"]
        (tmp_path / "gunicorn.conf.py").write_text("\n".join(lines))
    elif how == "GUNICORN_CMD_ARGS":
        monkeypatch.setenv(how, arguments)
    found = read_gunicorn(arguments if how == "arguments" else "")
    assert isinstance(found, Gunicorn)
    assert (found.worker, found.ours, found.threads, found.workers) == ("gthread", True, 9, 3)
    assert found.graceful == 40


@pytest.mark.parametrize(
    ("arguments", "worker"),
    [
        ("--threads 1", "sync"),
        ("--threads 2", "gthread"),
        ("-k gevent", "gevent"),
        ("-k a.B", "a.B"),
    ],
)
def test_gunicorns_own_workers(arguments: str, worker: str) -> None:
    """More than one thread makes sync gthread, as in gunicorn. No class is imported for it."""
    found = read_gunicorn(arguments)
    assert isinstance(found, Gunicorn)
    assert (found.worker, found.ours) == (worker, False)


def test_a_class_in_the_file(tmp_path: Path) -> None:
    """The class itself, not its name."""
    lines = ["from chatstream.workers.gthread import ThreadWorker", "worker_class = ThreadWorker"]
    (tmp_path / "other.py").write_text("\n".join(lines))
    found = read_gunicorn("-c other.py")
    assert isinstance(found, Gunicorn)
    assert (found.worker, found.ours) == ("gthread", True)


def test_what_the_file_does_to_the_process_is_put_back(tmp_path: Path) -> None:
    """Command line, directory and the limit, which counts as the file leaves it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lines = [
        "import os, resource",
        "os.makedirs('sub', exist_ok=True)",
        "chdir = 'sub'",
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft - 1}, {hard}))",
    ]
    (tmp_path / "gunicorn.conf.py").write_text("\n".join(lines))
    argv = list(sys.argv)
    found = read_gunicorn("")
    assert isinstance(found, Gunicorn)
    assert found.descriptors == soft - 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    assert sys.argv == argv
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("arguments", "text", "says"),
    [
        ("--threads many", "", "invalid"),
        ("-c missing.py", "", "missing.py"),
        ("-c bad.py", "1/0", "ZeroDivisionError"),
        ("-c bad.py", "raise SystemExit('CHATSTREAM_THREADS must be at least 5.')", "at least 5"),
    ],
)
def test_a_configuration_that_fails(
    tmp_path: Path, arguments: str, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line that gunicorn says of it."""
    (tmp_path / "bad.py").write_text(text)
    check = read_gunicorn(arguments)
    assert isinstance(check, Check)
    assert check.state is State.FAIL
    assert says in check.says
    assert capsys.readouterr() == ("", "")


def test_no_configuration_of_gunicorn() -> None:
    """It is not guessed; how to say it is said."""
    check = read_gunicorn("")
    assert isinstance(check, Check)
    assert check.state is State.NOTE
    assert "--gunicorn" in check.says


def test_without_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "gunicorn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gunicorn", None)
    check = read_gunicorn("--threads 5")
    assert isinstance(check, Check)
    assert check.state is State.NOTE


def test_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that these tests run on has it all."""
    assert check_kernel().state is State.OK
    monkeypatch.delattr(os, "eventfd")
    check = check_kernel()
    assert check.state is State.FAIL
    assert "eventfd" in check.says
