"""logs: one JSON object a line, whoever prints it; and what a record of ours holds."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from chatstream.errors import ConfigError
from chatstream.settings.table import Settings
from chatstream.telemetry import log_format

JSON = Settings(log_format="json")


def formatted(*args: Any, extra: Mapping[str, object] | None = None, **more: Any) -> dict[str, Any]:
    record = logging.getLogger("chatstream").makeRecord(
        "chatstream", logging.INFO, "file", 1, args[0], args[1:], more.get("exc_info"), extra=extra
    )
    line = log_format.json_formatter().format(record)
    assert "\n" not in line
    value: dict[str, Any] = json.loads(line)
    return value


def test_a_line_is_one_object() -> None:
    """When, how grave, whose, which process, what; and the record's own fields."""
    value = formatted("[SSE] %s\nstarted", "ä", extra={"session_id": "ä"})
    assert set(value) == {"time", "level", "logger", "pid", "message", "session_id"}
    assert value["message"] == "[SSE] ä\nstarted"
    assert (value["level"], value["logger"], value["session_id"]) == ("INFO", "chatstream", "ä")
    assert value["time"].endswith("+00:00")


def test_an_exception_is_in_its_line() -> None:
    try:
        raise RuntimeError("out\nof order")
    except RuntimeError:
        value = formatted("failed", exc_info=sys.exc_info())
    assert value["exc_info"].startswith("Traceback")
    assert value["exc_info"].endswith("RuntimeError: out\nof order")


def test_a_request_of_the_access_log() -> None:
    """Its facts as fields: no header, no query."""
    atoms = {
        "h": "10.0.0.1",
        "m": "POST",
        "U": "/api/chat/stream",
        "q": "secret=1",
        "s": "200",
        "B": 12,
        "D": 34_567,
        "{authorization}i": "Bearer secret",
        "f": "secret",
    }
    record = logging.makeLogRecord(
        {"name": "gunicorn.access", "msg": "%(m)s %(U)s %(s)s", "args": atoms, "levelname": "INFO"}
    )
    line = log_format.json_formatter().format(record)
    value = json.loads(line)
    assert "secret" not in line
    assert value["message"] == "POST /api/chat/stream 200"
    assert (value["status"], value["bytes"], value["duration"]) == (200, 12, 0.034567)
    assert (value["remote"], value["method"], value["path"]) == (
        "10.0.0.1",
        "POST",
        "/api/chat/stream",
    )


SCRIPT = """
import gc, os, sys, threading, warnings
from chatstream.telemetry import log_format as logs; from chatstream.sockets import native
from chatstream.settings.table import Settings
logs.configure(Settings(log_format="{form}"))

def fail():
    raise RuntimeError("in a thread")

class Unraisable:
    def __del__(self):
        raise RuntimeError("in a finalizer")

thread = threading.Thread(target=fail)
thread.start()
thread.join()
Unraisable()
gc.collect()
warnings.warn("a warning", stacklevel=1)
print("past all", end=" ", file=sys.stderr)
print("logs", file=sys.stderr)
os.fstat(sys.stderr.fileno())
logs.configure(Settings(log_format="{form}"))  # whoever does it again
try:
    raise RuntimeError("in the loop")
except RuntimeError:
    native.report()
raise RuntimeError("at the end")
"""


def run(script: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_whatever_a_process_prints_is_an_object() -> None:
    """Exceptions that nobody caught, in every place; warnings; what the loop reports."""
    code, printed = run(SCRIPT.format(form="json"))
    assert code == 1
    values = [json.loads(line) for line in printed.splitlines()]
    texts = [value["message"] + value.get("exc_info", "") for value in values]
    said = ("in a thread", "in a finalizer", "a warning", "past all logs", "in the loop", "end")
    for words in said:
        assert len([text for text in texts if words in text]) == 1, words
    assert len(values) == len(said)
    assert all({"time", "level", "logger", "message"} <= set(value) for value in values)


def test_text_is_as_ever() -> None:
    """Nothing of it is replaced."""
    code, printed = run(SCRIPT.format(form="text"))
    assert code == 1
    assert printed.count("Traceback") == 4
    assert "UserWarning: a warning" in printed


def test_why_it_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    """In the form that the log would have."""
    log_format.say_last(Settings(), "CHATSTREAM_X must be y.")
    assert capfd.readouterr().err == "chatstream: CHATSTREAM_X must be y.\n"
    log_format.say_last(JSON, 'not "z".\nOr so.')
    value = json.loads(capfd.readouterr().err)
    assert (value["level"], value["message"]) == ("ERROR", 'chatstream: not "z".\nOr so.')


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON is an extra: a ConfigError that says which."""
    monkeypatch.setitem(sys.modules, "pythonjsonlogger.json", None)
    with pytest.raises(ConfigError, match=r"pip install 'chatstream\[json\]'$"):
        log_format.configure(JSON)


def test_a_form_that_is_none_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^CHATSTREAM_LOG_FORMAT must be text or json, not 'x'\.$"
    ):
        Settings.load({}, {"CHATSTREAM_LOG_FORMAT": "x"})
