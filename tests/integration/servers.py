"""Every server that docs/servers.md speaks of, and how it is run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.conftest import Rig, serving
from tests.integration.processes import Provider

FAR = "3600"
"""Seconds between pings that cannot be what notices."""

UWSGI = str(Path(sys.executable).with_name("uwsgi"))

_FOREIGN = ("gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--config", "/dev/null")
_APP = "tests.integration.app:app"


@dataclass(frozen=True)
class Kind:
    """A server: its command line (None: gunicorn with our configuration), and what it prints.

    Attributes:
        command: As `Server` has it.
        app: How the command's last argument names the app.
        ready: What it prints when it listens.
        environ: Its environment.
    """

    command: tuple[str, ...] | None = None
    app: str = _APP
    ready: str = r"Listening at: https?://127\.0\.0\.1:(\d+)"
    environ: dict[str, str] = field(default_factory=dict)


def _uwsgi(*options: str) -> Kind:
    command = (UWSGI, "--master", "--die-on-term", "--need-app", "--module", _APP, *options)
    return Kind(command, app="", ready=r"bound to TCP address 127\.0\.0\.1:(\d+)")


SERVERS = {
    "ours-gthread": Kind(),
    "ours-gevent": Kind(environ={"CHATSTREAM_WORKER_CLASS": "gevent"}),
    "gunicorn-gthread": Kind((*_FOREIGN, "--worker-class", "gthread", "--threads", "8")),
    "gunicorn-gevent": Kind((*_FOREIGN, "--worker-class", "gevent")),
    "gunicorn-sync": Kind((*_FOREIGN, "--worker-class", "sync")),
    "flask-run": Kind(
        ("flask", "--app", "tests.integration.app", "run", "--port", "0"),
        app="",
        ready=r"Running on http://127\.0\.0\.1:(\d+)",
    ),
    "waitress": Kind(
        ("waitress", "--listen=127.0.0.1:0", "--threads=8"),
        ready=r"Serving on http://127\.0\.0\.1:(\d+)",
    ),
    "uwsgi": _uwsgi("--http-socket", "127.0.0.1:0", "--threads", "8"),
}


@contextlib.contextmanager
def run(name: str, log: Path, provider: Provider, *options: str, **environ: str) -> Iterator[Rig]:
    """The server of that name, before `provider`. Pings are not what notices, unless told so."""
    kind = SERVERS[name]
    more = {"CHATSTREAM_PING_INTERVAL": FAR, **kind.environ, **environ}
    command = None if kind.command is None else list(kind.command)
    with serving(
        log, provider, *options, command=command, app=kind.app, ready=kind.ready, **more
    ) as rig:
        yield rig
