"""How the standalone service's log looks: lines for people, or one JSON object a line.

The room of python-json-logger. An app that mounts chatstream has its own logging; what a line of
ours says is on its record as well (`session_id`, `cause`, `stop_ms` …), for any formatter.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from chatstream import native
from chatstream.config import Settings
from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from types import TracebackType

TEXT = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger("chatstream")


def configure(settings: Settings) -> None:
    """Sets up logging for the process, and whatever else it prints. Once, at the start.

    Raises:
        ConfigError: JSON is asked for, and its package is not installed.
    """
    if settings.log_format == "text":
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=TEXT)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(json_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable
    native.written_as = _as_json


def say_last(settings: Settings, sentence: str) -> None:
    """Says on stderr why the service does not start; in its log's form, whatever is set up."""
    text = f"chatstream: {sentence}"
    if settings.log_format == "json":
        text = _as_json(text).decode().rstrip("\n")
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


def _as_json(text: str) -> bytes:
    """A line for who cannot log."""
    now = datetime.now(timezone.utc).isoformat()
    value = {"time": now, "level": "ERROR", "logger": "chatstream", "message": text}
    return json.dumps(value).encode() + b"\n"


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    log.critical("uncaught: %s", kind.__name__, exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _log_unraisable(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value is not None:
        log.error("ignored: %s", args.err_msg or args.exc_type.__name__, exc_info=args.exc_value)
