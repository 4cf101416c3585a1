"""What the operator of a server should know, as the log says it at the first stream."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from chatstream.bus.base import Bus
from chatstream.bus.local import LocalBus
from chatstream.settings.table import Settings
from chatstream.telemetry import metrics
from chatstream.workers import server, slots
from chatstream.workers.slots import UNKNOWN


def advice(settings: Settings, joined: Bus, environ: Mapping[str, Any]) -> list[str]:
    """What the operator of this server should know."""
    said = []
    gunicorn = str(environ.get("SERVER_SOFTWARE", "")).startswith("gunicorn")
    if gunicorn and not environ.get("wsgi.multithread"):
        said.append(
            "gunicorn's sync worker serves one stream at a time, no cancel can reach it meanwhile, "
            "and gunicorn kills it after `timeout`. Use --worker-class gthread or gevent."
        )
    if "uwsgi.version" in environ and not environ.get("wsgi.multithread"):
        said.append(
            "A process of uWSGI's with one thread serves one stream at a time, and no cancel can "
            "reach it meanwhile. Use --threads."
        )
    if environ.get("wsgi.multiprocess") and isinstance(joined, LocalBus):
        said.append(
            "More than one worker, and the bus is local: a cancel stops a stream only if it "
            "reaches the same worker. Set CHATSTREAM_BUS=unix:///a/directory, or redis://."
        )
    if environ.get("wsgi.multiprocess") and settings.metrics and not os.environ.get(metrics.FOLDER):
        said.append(
            f"More than one worker, and each shows figures of its own. Set {metrics.FOLDER}: see"
            " `chatstream.telemetry.metrics.master`."
        )
    if str(environ.get("SERVER_PROTOCOL", "")).startswith("HTTP/2"):
        said.append(
            "gunicorn serves an HTTP/2 connection's requests one after the other, so a cancel "
            "waits behind the stream it should stop. Terminate HTTP/2 in nginx."
        )
    unknown = server.gunicorn_worker() is None and server.slots_shown(environ) is None
    if settings.max_streams is None and unknown:
        said.append(
            f"The server's threads are not known: {UNKNOWN} streams at a time. "
            "Set CHATSTREAM_MAX_STREAMS to the threads less a few for cancels."
        )
    if sentence := slots.too_many(settings.max_streams or 0):
        said.append(sentence)
    return said
