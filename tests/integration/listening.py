"""A host app that keeps what its listeners hear: a line of JSON each, in a file."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import time
from typing import Any

import flask

from chatstream import Outcome, Started, stream_ended, stream_started
from tests.integration.app import app

__all__ = ["app"]


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _keep(kind: str, value: Started | Outcome) -> None:
    context = [flask.has_app_context(), flask.has_request_context()]
    fields = {key: _plain(field) for key, field in dataclasses.asdict(value).items()}
    line = json.dumps({"signal": kind, "pid": os.getpid(), "context": context, **fields}) + "\n"
    descriptor = os.open(os.environ["TEST_HEARD"], os.O_APPEND | os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, line.encode())  # one write: lines of several workers do not mix
    os.close(descriptor)


@stream_started.connect_via(app)
def begun(sender: flask.Flask, started: Started) -> None:
    _keep("started", started)


@stream_ended.connect_via(app)
def over(sender: flask.Flask, outcome: Outcome) -> None:
    time.sleep(float(os.environ.get("TEST_SLOW", "0")))  # a database that takes its time
    _keep("ended", outcome)


@stream_ended.connect_via(app)
def broken(sender: flask.Flask, outcome: Outcome) -> None:
    if outcome.session_id.startswith("broken"):
        raise LookupError("a listener of the app's that fails")
