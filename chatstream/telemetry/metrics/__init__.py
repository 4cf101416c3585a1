"""Figures for Prometheus, where CHATSTREAM_METRICS says that they are on.

`figures` has them; `master` is what gunicorn's master does for them, and has no Flask in it. A
gunicorn.conf.py of one's own takes its hooks from here.
"""

from __future__ import annotations

from chatstream.telemetry.metrics.master import FOLDER, child_exit, on_exit, on_starting, share

__all__ = ["FOLDER", "child_exit", "on_exit", "on_starting", "share"]
