"""The process around a stream. gunicorn's master imports it: no Flask, requests, redis, blinker.

For `worker_class`: `ThreadWorker` in `gthread` and `GeventWorker` in `gevent`, small subclasses of
gunicorn's, which bound how long a client may take and spend no thread on one that waits. With them:
`waiting`, `unreader`, `arrival`, `exchange` (one request), `limits`, `checks`, `log`.
For every server: `server` (which one this is), `slots` (how many streams fit), `draining`.

What a server's configuration takes from us is here, and fetched when it is first asked for:
`post_worker_init`, `drain_at_sigterm`, and the hooks of the figures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatstream.telemetry.metrics.master import child_exit, on_exit, on_starting, share
    from chatstream.workers.draining import drain_at_sigterm, post_worker_init

__all__ = [
    "child_exit",
    "drain_at_sigterm",
    "on_exit",
    "on_starting",
    "post_worker_init",
    "share",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chatstream.workers' has no attribute {name!r}")
    ends = name in ("drain_at_sigterm", "post_worker_init")
    room = "workers.draining" if ends else "telemetry.metrics.master"
    return getattr(import_module(f"chatstream.{room}"), name)
