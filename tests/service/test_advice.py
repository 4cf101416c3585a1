"""advice: what the operator of a server should know, and who has not to be told."""

from __future__ import annotations

from typing import Any

import pytest

from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Answer
from chatstream.service import advice
from chatstream.settings.table import Settings
from chatstream.telemetry.metrics import FOLDER
from chatstream.workers import server, slots

GTHREAD = {"SERVER_SOFTWARE": "gunicorn/27.0.1", "wsgi.multithread": True}
UWSGI = {"uwsgi.version": b"2.0.28"}
MANY = {**GTHREAD, "wsgi.multiprocess": True}
LOCAL = LocalBus(lambda request: Answer.ABSENT)
ANOTHER: Any = object()
"""A bus that reaches other processes."""


def said(environ: dict[str, Any], bus: Bus = LOCAL, **settings: Any) -> list[str]:
    defaults: dict[str, Any] = {"upstream_url": "https://provider.test/", "max_streams": 4}
    return advice.advice(Settings(**{**defaults, **settings}), bus, environ)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, []),
        (GTHREAD, []),
        ({**GTHREAD, "wsgi.multithread": False}, ["gunicorn's sync worker"]),
        ({"SERVER_SOFTWARE": "waitress", "wsgi.multithread": False}, []),
        ({**UWSGI, "wsgi.multithread": False}, ["A process of uWSGI's with one thread"]),
        ({**UWSGI, "wsgi.multithread": True}, []),
        (MANY, ["More than one worker, and the bus is local"]),
        ({**GTHREAD, "SERVER_PROTOCOL": "HTTP/2.0"}, ["an HTTP/2 connection's requests"]),
        ({**GTHREAD, "SERVER_PROTOCOL": "HTTP/1.1"}, []),
    ],
)
def test_what_a_servers_set_up_makes_impossible(environ: dict[str, Any], words: list[str]) -> None:
    """A sentence for each, with what to do about it; none where all is well."""
    sentences = said(environ)
    assert len(sentences) == len(words)
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))


def test_workers_that_reach_each_other() -> None:
    """Where the bus that was joined knows the others, nothing is to be said."""
    assert said(MANY, ANOTHER) == []


@pytest.mark.parametrize(
    ("environ", "metrics", "folder", "expected"),
    [
        (MANY, "/metrics", None, 1),
        (MANY, "/metrics", "/a/folder", 0),
        (MANY, None, None, 0),
        (GTHREAD, "/metrics", None, 0),
    ],
)
def test_figures_of_many_workers(
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, Any],
    metrics: str | None,
    folder: str | None,
    expected: int,
) -> None:
    """Where they are shown, and nothing adds them up."""
    if folder is None:
        monkeypatch.delenv(FOLDER, raising=False)
    else:
        monkeypatch.setenv(FOLDER, folder)
    sentences = said(environ, ANOTHER, metrics=metrics)
    assert [FOLDER in sentence for sentence in sentences] == [True] * expected


def test_threads_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither a setting nor the server says how many streams fit."""
    [sentence] = said({}, max_streams=None)
    assert "CHATSTREAM_MAX_STREAMS" in sentence
    monkeypatch.setattr(server, "slots_shown", lambda environ: 7)
    assert said({}, max_streams=None) == []


def test_more_streams_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no worker of ours has refused to start."""
    monkeypatch.setattr(slots, "limit", lambda: 1024)
    assert said({}, max_streams=1000) == [slots.too_many(1000)]
