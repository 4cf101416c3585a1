"""The naive version: a generator that looks at a flag before each chunk. For stock gunicorn."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator

import requests
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
stopped: dict[str, threading.Event] = {}


@app.post("/api/chat/stream")
def stream() -> Response:
    body = request.get_json()
    session = body.get("sessionId") or str(uuid.uuid4())
    flag = stopped[session] = threading.Event()

    def events() -> Iterator[bytes]:
        try:
            with requests.post(os.environ["UPSTREAM_URL"], json=body, stream=True) as answer:
                for chunk in answer.iter_content(chunk_size=None):
                    if flag.is_set():
                        break
                    yield chunk
        finally:
            stopped.pop(session, None)

    return Response(events(), mimetype="text/event-stream")


@app.post("/api/chat/cancel/<session>")
def cancel(session: str) -> tuple[Response, int]:
    flag = stopped.get(session)
    if flag is None:
        return jsonify(ok=False), 404
    flag.set()
    return jsonify(ok=True), 200
