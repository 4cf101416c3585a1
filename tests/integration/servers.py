"""Every server that docs/servers.md speaks of: how it is run, and what the table there says."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import program
from tests.integration.conftest import Certificate, Rig, serving
from tests.integration.processes import Provider

FAR = "3600"
"""Seconds between pings that cannot be what notices."""

THREADS = 8
"""Of each server that has some."""

COLUMNS = ("a client closes", "a cancel", "a client vanishes", "SIGTERM", "a stream holds")

UWSGI = "uwsgi"
"""In the place of a module: the program that pyuwsgi brings."""

_GUNICORN = ("gunicorn", "--bind", "{host}:0", "--no-control-socket", "--config")
_OURS = (*_GUNICORN, "gunicorn.conf.py")
_FOREIGN = (*_GUNICORN, "/dev/null")
_APP = "tests.integration.app:app"


@dataclass(frozen=True)
class Kind:
    """A server.

    Attributes:
        says: Its cells of the table, in the order of `COLUMNS`.
        slots: Streams at a time.
        command: Its command line.
        app: How the command's last argument names the app.
        ready: What it prints when it listens.
        environ: Its environment.
    """

    says: tuple[str, ...]
    slots: int
    command: tuple[str, ...]
    app: str = _APP
    ready: str = r"Listening at: https?://{host}:(\d+)"
    environ: dict[str, str] = field(default_factory=dict)

    def cell(self, column: str) -> str:
        return self.says[COLUMNS.index(column)]

    @property
    def tls(self) -> bool:
        """Whether it takes gunicorn's options for TLS."""
        return self.command[0] == "gunicorn"


WELL = ("at once", "at once", "within 45 s", "drained, told")
CUT = ("at once", "at once", "within 45 s", "cut off")

SERVERS = {
    "ours-gthread": Kind((*WELL, "nothing"), 10_000, _OURS),
    "ours-gevent": Kind(
        (*WELL, "a greenlet"), 10_000, _OURS, environ={"CHATSTREAM_WORKER_CLASS": "gevent"}
    ),
    "gunicorn-gthread": Kind(
        (*WELL, "a thread"), 4, (*_FOREIGN, "--worker-class=gthread", f"--threads={THREADS}")
    ),
    "gunicorn-gevent": Kind((*WELL, "a greenlet"), 968, (*_FOREIGN, "--worker-class=gevent")),
    "gunicorn-sync": Kind(
        ("at once", "cannot get in", "within 45 s", "drained, told", "the worker"),
        1,
        (*_FOREIGN, "--worker-class=sync", "--timeout=120"),
    ),
    "flask-run": Kind(
        (*CUT, "a thread"),
        3,
        ("flask", "--app", "tests.integration.app", "run", "--host={host}", "--port=0"),
        app="",
        ready=r"Running on .*http://[\d.]+:(\d+)",
    ),
    "waitress": Kind(
        (*CUT, "a thread"),
        THREADS - 1,
        ("waitress", "--listen={host}:0", f"--threads={THREADS}"),
        ready=r"Serving on http://{host}:(\d+)",
    ),
    "uwsgi": Kind(
        (*CUT, "a thread"),
        4,
        (
            *(UWSGI, "--master", "--die-on-term", "--need-app", f"--threads={THREADS}"),
            *("--http-socket={host}:0", "--module"),
        ),
        ready=r"bound to TCP address {host}:(\d+)",
    ),
}


def command_of(kind: Kind, host: str = "127.0.0.1") -> list[str]:
    """What `Server` has to run. Skips where a program is missing."""
    first, *rest = (word.replace("{host}", host) for word in kind.command)
    return [program(first) if first == UWSGI else first, *rest]


@contextlib.contextmanager
def run(
    kind: Kind,
    log: Path,
    provider: Provider,
    *options: str,
    host: str = "127.0.0.1",
    certificate: Certificate | None = None,
    **environ: str,
) -> Iterator[Rig]:
    """The server, before `provider`. Pings are not what notices, unless told so.

    Args:
        kind: Which.
        log: What it prints goes there.
        provider: Whom it calls.
        options: More of its command line.
        host: Where it listens.
        certificate: With which it speaks TLS.
        environ: More of its environment.
    """
    more = {"CHATSTREAM_PING_INTERVAL": FAR, "CHATSTREAM_THREADS": str(THREADS), **environ}
    trust = None
    if certificate is not None:
        trust = ssl.create_default_context(cafile=certificate.authority)
        options += ("--certfile", certificate.cert, "--keyfile", certificate.cert)
    with serving(
        log,
        provider,
        *options,
        command=command_of(kind, host),
        app=kind.app,
        ready=kind.ready.replace("{host}", host.replace(".", r"\.")),
        tls=trust,
        **{**kind.environ, **more},
    ) as rig:
        rig.extra = trust
        yield rig
