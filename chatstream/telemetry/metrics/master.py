"""What gunicorn's master does for the figures of its workers.

    worker A ── its own file ──┐
    worker B ── its own file ──┼─> a folder of the master's ──> GET, by whichever worker is asked
    worker C ── its own file ──┘

The folder is PROMETHEUS_MULTIPROC_DIR, which prometheus_client looks at when it is imported. A
gunicorn.conf.py of one's own has these lines:

    from chatstream.telemetry.metrics import child_exit, on_exit, on_starting, share
    share()

The master imports this, and nothing of Flask may come with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment's word for where prometheus_client keeps what processes share."""

_PREFIX = "chatstream-metrics-"

_LOCK = "lock"

_MEMORY = Path("/dev/shm")  # files that are written for every stream should reach no disk

_made: tuple[int, Path] | None = None  # the process that made it, and the folder

_lock: int | None = None  # the descriptor that holds it; kept open


def share() -> None:
    """Makes a fresh folder for the processes to come. Before prometheus_client is imported.

    Does nothing where PROMETHEUS_MULTIPROC_DIR names one already; that of another master, from
    which this one was executed (USR2), is left to it. Idempotent.
    """
    global _made, _lock
    given = Path(os.environ.get(FOLDER, ""))
    if given.name and not given.name.startswith(_PREFIX):
        return
    if _made is not None and _made[0] == os.getpid():
        return
    base = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    _sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    # Held until the last process that has it is gone, also where nothing could be cleaned up.
    _lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(_lock, fcntl.LOCK_EX)
    _made = (os.getpid(), folder)
    os.environ[FOLDER] = str(folder)


def on_starting(arbiter: Any) -> None:
    """gunicorn's hook of this name: the folder is for the user whom the workers become."""
    cfg = arbiter.cfg
    if _made is not None and os.geteuid() == 0 and cfg.uid != 0:
        os.chown(_made[1], cfg.uid, cfg.gid)


def child_exit(arbiter: object, worker: Any) -> None:
    """gunicorn's hook of this name: what only holds for a living worker is forgotten.

    Its counters stay, since sums must not fall.
    """
    if FOLDER not in os.environ:
        return
    with contextlib.suppress(ImportError, OSError):  # it is not installed; the folder is gone
        # In the master, and as late as this: workers to come have it from there. What it binds of
        # the standard library may be unpatched, since it waits for nothing.
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(arbiter: object) -> None:
    """gunicorn's hook of this name: the folder that `share` made is removed."""
    if _made is not None and _made[0] == os.getpid():
        shutil.rmtree(_made[1], ignore_errors=True)


def _sweep(base: Path) -> None:
    """Removes what masters have left that were killed."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's; not locked yet; in use
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
