"""The host app of somebody who has a server drain that would not."""

from __future__ import annotations

from chatstream.workers.draining import drain_at_sigterm
from tests.integration.app import app

useful = drain_at_sigterm()


@app.get("/useful")
def is_useful() -> str:
    return str(useful)


__all__ = ["app"]
