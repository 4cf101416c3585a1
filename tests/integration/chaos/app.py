"""The app under chaos: the chat routes, and what a leak check has to know of a worker."""

from __future__ import annotations

import logging
import os
import threading
import time

from flask import Flask, Response, jsonify, request

from chatstream import ChatStream

logging.basicConfig(
    level=logging.INFO, format="%(created).3f %(levelname)s [%(process)d] %(message)s"
)
app = Flask(__name__)
ChatStream(app, identify=lambda: request.headers.get("X-User", "anybody"))


def tell_when_late() -> None:
    """Says so when this worker stood still: a thread, or greenlet, that slept too long."""
    before = time.monotonic()
    while True:
        time.sleep(0.02)
        now = time.monotonic()
        if now - before > 0.1:
            logging.info("[late] %.3f", now - before)
        before = now


threading.Thread(target=tell_when_late, name="canary", daemon=True).start()


@app.get("/debug")
def debug() -> Response:
    """What is left here."""
    registry = app.extensions["chatstream"].registry
    return jsonify(
        pid=os.getpid(),
        slots=len(registry),
        live=len(registry.live()),
        calls=[t.name for t in threading.enumerate() if t.name.startswith("chatstream-call")],
    )


@app.after_request
def name_the_worker(response: Response) -> Response:
    response.headers["X-Worker"] = str(os.getpid())
    return response
