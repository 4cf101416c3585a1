"""How the standalone service's log looks: lines for people, or one JSON object a line.

The room of python-json-logger. An app that mounts chatstream has its own logging; what a line of
ours says is on its record as well (`session_id`, `cause`, `stop_ms` …), for any formatter.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

from chatstream.errors import ConfigError
from chatstream.settings.table import Settings
from chatstream.sockets import native

if TYPE_CHECKING:
    from types import TracebackType


TEXT = "%(asctime)s %(levelname)s %(message)s"


def configure(settings: Settings) -> None:
    """Sets up logging for the process, and whatever else it prints. Once, at the start.

    Raises:
        ConfigError: JSON is asked for, and its package is not installed.
    """
    if settings.log_format == "text":
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=TEXT)
        return
    formatter = json_formatter()
    take_over()
    handler = logging.StreamHandler()
    write_past(handler)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)


def take_over() -> None:
    """Has an object made of what is printed past all logs: by gunicorn, by Python. Idempotent."""
    if not isinstance(sys.stderr, _Objects):
        sys.stderr = _Objects(sys.stderr)
    sys.excepthook = _print_uncaught
    threading.excepthook = _print_uncaught_in_thread
    sys.unraisablehook = _print_unraisable
    native.written_as = _as_json


def write_past(handler: logging.Handler) -> None:
    """Has a log's handler, which writes objects itself, write to where stderr went before."""
    stream = getattr(handler, "stream", None)
    if isinstance(handler, logging.StreamHandler) and isinstance(stream, _Objects):
        handler.setStream(stream.below)


def say_last(settings: Settings, sentence: str) -> None:
    """Says on stderr why the service does not start; in its log's form, whatever is set up."""
    text = f"chatstream: {sentence}"
    if settings.log_format == "json":
        os.write(2, _as_json(text))
    else:
        print(text, file=sys.stderr)


def json_formatter() -> logging.Formatter:
    """Makes one JSON object of a record: time, level, logger, process, message, and its own fields.

    Of gunicorn's access log also who asked for what; no headers, and nothing of a query.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from pythonjsonlogger.json import JsonFormatter
    except ImportError as error:
        raise ConfigError(
            "CHATSTREAM_LOG_FORMAT=json needs python-json-logger: pip install 'chatstream[json]'"
        ) from error

    class Formatter(JsonFormatter):
        def add_fields(
            self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
        ) -> None:
            super().add_fields(log_data, record, message_dict)
            if record.name == "gunicorn.access" and isinstance(record.args, Mapping):
                log_data.update(_request(record.args))

    return Formatter(
        "%(levelname)s %(name)s %(process)d %(message)s",
        rename_fields={"levelname": "level", "name": "logger", "process": "pid"},
        timestamp="time",
    )


def _request(atoms: Mapping[str, Any]) -> dict[str, object]:
    """What is worth a field of gunicorn's words for a request."""
    return {
        "remote": atoms["h"],
        "method": atoms["m"],
        "path": atoms["U"],
        "status": int(atoms["s"]),
        "bytes": atoms["B"],
        "duration": atoms["D"] / 1e6,
    }


class _Objects(io.TextIOBase):
    """In the place of stderr: each line that is printed becomes an object. Safe from any thread.

    Attributes:
        below: What was there before.
    """

    encoding = "utf-8"

    def __init__(self, below: TextIO) -> None:
        self.below = below
        self._lock = native.allocate_lock()  # guards the one below
        self._begun = ""  # a line that has no end yet

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.below.fileno()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
        os.write(2, b"".join(_as_json(line) for line in lines if line.strip()))
        return len(text)


def _as_json(text: str, error: BaseException | None = None) -> bytes:
    """A line for what cannot log."""
    value = {
        "time": datetime.now(timezone.utc).isoformat(),
        "level": "ERROR",
        "logger": "chatstream",
        "pid": os.getpid(),
        "message": text,
    }
    if error is not None:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        value["exc_info"] = "".join(lines).rstrip("\n")
    return json.dumps(value).encode() + b"\n"


def _print_uncaught(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    os.write(2, _as_json(f"uncaught: {kind.__name__}", error))


def _print_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        os.write(2, _as_json(f"uncaught: {args.exc_type.__name__}", args.exc_value))


def _print_unraisable(args: sys.UnraisableHookArgs) -> None:
    os.write(2, _as_json(args.err_msg or f"ignored: {args.exc_type.__name__}", args.exc_value))
