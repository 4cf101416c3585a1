"""The host app of the integration tests: an app of somebody's, with chatstream mounted in it."""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import gc
import logging
import os
import struct
import termios
import threading
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from chatstream import ChatStream

logging.basicConfig(level=logging.INFO, format="%(levelname)s [%(process)d] %(message)s")
app = Flask(__name__)
ChatStream(
    app,
    identify=lambda: request.headers.get("X-User", "anybody"),
    admin=lambda: request.headers.get("X-Admin") == "yes",
)


def beside(environ: dict[str, object], start_response: Any) -> list[bytes]:
    """An app that is not Flask's, mounted before all hooks of Flask's."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"beside"]


app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/beside": beside})  # type: ignore[method-assign]

# The host's database: a pool of one connection, held for as long as a request context lives.
_database = threading.Semaphore(1)


@app.before_request
def take_connection() -> None:
    if request.path not in ("/debug", "/upload"):
        request.environ["test.connection"] = _database.acquire(timeout=5)


@app.teardown_request
def give_connection(error: BaseException | None) -> None:
    if request.environ.get("test.connection"):
        _database.release()


@app.errorhandler(HTTPException)
def page(error: HTTPException) -> tuple[str, int]:
    return f"<h1>{error.code}</h1>", error.code or 500


@app.get("/hello")
def hello() -> str:
    return "hello" if request.environ["test.connection"] else "no connection was free"


@app.post("/upload")
def upload() -> str:
    """A host's own route that takes what is longer than a chat: says how much came."""
    return str(sum(map(len, iter(lambda: request.stream.read(65536), b""))))


@app.get("/debug")
def debug() -> object:
    """What a leak check has to know of this worker."""
    service = app.extensions["chatstream"]
    return jsonify(
        pid=os.getpid(),
        slots=len(service.registry),
        live=len(service.registry.live()),
        calls=[t.name for t in threading.enumerate() if t.name.startswith("chatstream-call")],
    )


@app.post("/debug/cancel-all/<owner>")
def cancel_all(owner: str) -> object:
    """Stops all of an owner's streams; says what, by each worker, and whether that answered."""
    found = app.extensions["chatstream"].cancel_all(owner)
    return jsonify(
        {
            each.worker.pid: [each.answered, [live.name.session_id for live in each.streams]]
            for each in found.workers
        }
    )


@app.get("/debug/frozen")
def frozen() -> object:
    """Whether the garbage collector leaves this app alone; what is frozen is not in its list."""
    return jsonify(gc.is_tracked(app) and all(it is not app for it in gc.get_objects()))


@app.get("/debug/send-queue/<int:port>")
def send_queue(port: int) -> object:
    """Bytes the client at `port` has not taken from this worker's socket (SIOCOUTQ)."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with contextlib.closing(_socket.socket(fileno=os.dup(fd))) as sock:
                if sock.getpeername()[1:2] == (port,):
                    return jsonify(_outq(fd))
    return jsonify(None)


def _outq(fd: int) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0" * 4))
    return int(size)


def hidden(environ: dict[str, object], start_response: object) -> object:
    """The same app behind a middleware that shows no socket."""
    environ.pop("gunicorn.socket", None)
    return app(environ, start_response)  # type: ignore[arg-type]


class Watched:
    """What a monitoring middleware makes of each response, to see its end: as Sentry's does."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Any:
        yield from self._response

    def close(self) -> None:
        self._response.close()


def watched(environ: dict[str, object], start_response: Any) -> Watched:
    """The same app behind such a middleware."""
    return Watched(app(environ, start_response))


@app.before_request
def read_the_body() -> None:
    """What many hosts do: log or check the JSON of every request."""
    if request.headers.get("X-Read-Body"):
        request.get_json(silent=True)


@app.after_request
def name_the_worker(response: Response) -> Response:
    response.headers["X-Worker"] = str(os.getpid())
    return response


@app.after_request
def break_the_response(response: Response) -> Response:
    if request.headers.get("X-Break"):
        raise RuntimeError("an after_request of the app's that fails")
    return response
