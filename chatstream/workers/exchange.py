"""One request and its response on our workers, begun and ended by a thread, maybe not the same."""

from __future__ import annotations

import contextlib
import contextvars
import enum
import socket
from collections.abc import Callable
from datetime import datetime
from typing import Any

from gunicorn import util
from gunicorn.http import wsgi


class Kept(enum.Enum):
    """What becomes of the connection after a call of `Exchange.serve` or `end`."""

    NO = False
    YES = True  # the next request may come
    DETACHED = None  # the exchange is not over

    def __bool__(self) -> bool:
        return self is Kept.YES


class Exchange:
    """A request and its response. See `chatstream.stream.sides.Exchange` for what the loop calls.

    The app, its hooks and the access log are called in threads of the pool.
    """

    def __init__(self, worker: Any, req: Any, conn: Any) -> None:
        """
        Args:
            worker: The `ThreadWorker`.
            req: gunicorn's request.
            conn: Its connection.
        """
        self.sock: socket.socket = conn.sock
        self._worker = worker
        self._req = req
        self._conn = conn
        self._resp: Any = None
        self._environ: dict[str, Any] = {}
        self._answer: Any = None
        self._began = datetime.now()
        self._out = _Out()
        self._context = contextvars.Context()  # the app's, for what runs in other threads
        self._whole = False

    def serve(self) -> Kept:
        """Has the app answer. Raises what that raises before its headers are out."""
        kept = Kept.NO
        try:
            self._worker.cfg.pre_request(self._worker, self._req)
            kept = self._closing_on_faults(self._respond)
        finally:
            if kept is not Kept.DETACHED:
                self._after()
        return kept

    def finish(self) -> Kept:
        """Ends what the loop has left. Raises as `serve` does."""
        return self._context.run(self._finish)  # nobody else's: entered once

    def _finish(self) -> Kept:
        try:
            self._take_back()
            return self._closing_on_faults(self._end_response)
        finally:
            self._after()

    def _end_response(self) -> Kept:
        self._close_answer()
        return self._kept() if self._whole else Kept.NO

    def _respond(self) -> Kept:
        self._call_app()
        detached = False
        try:
            detached = self._detach()
            if not detached:
                self._walk()
        finally:
            if not detached:
                self._close_answer()
        return Kept.DETACHED if detached else self._kept()

    def _call_app(self) -> None:
        worker, conn = self._worker, self._conn
        self._began = datetime.now()
        self._resp, self._environ = wsgi.create(
            self._req, conn.sock, conn.client, conn.server, worker.cfg
        )
        self._environ["wsgi.multithread"] = True
        self._count()
        if not (worker.alive and worker.cfg.keepalive):
            self._resp.force_close()
        self._answer = worker.wsgi(self._environ, self._resp.start_response)

    def _count(self) -> None:
        """One request more; with `max_requests` the worker ends after the last one."""
        worker = self._worker
        worker.nr += 1
        if worker.alive and worker.nr >= worker.max_requests:
            worker.log.info("Autorestarting worker after current request.")
            worker.alive = False

    def _walk(self) -> None:
        if isinstance(self._answer, self._environ["wsgi.file_wrapper"]):
            self._resp.write_file(self._answer)
        else:
            for data in self._answer:
                self._resp.write(data)
        self._resp.close()

    def _close_answer(self) -> None:
        worker = self._worker
        worker.log.access(self._resp, self._req, self._environ, datetime.now() - self._began)
        if hasattr(self._answer, "close"):
            self._answer.close()

    def _kept(self) -> Kept:
        if self._resp.should_close():
            self._worker.log.debug("Closing connection.")
            return Kept.NO
        return Kept.YES

    def _after(self) -> None:
        worker = self._worker
        try:
            worker.cfg.post_request(worker, self._req, self._environ, self._resp)
        except Exception:
            worker.log.exception("Exception in post_request hook")

    def _closing_on_faults(self, step: Callable[[], Kept]) -> Kept:
        """Of what the app raises once its headers are out, the client can be told nothing.

        That is logged here, and goes no further.
        """
        try:
            return step()
        except OSError:
            raise
        except (Exception, SystemExit):
            if self._resp is None or not self._resp.headers_sent:
                raise
            self._worker.log.exception("Error handling request")
            util.close_graceful(self.sock)
            return Kept.NO

    # Detached

    def _detach(self) -> bool:
        """Whether the loop moves the response from now on."""
        # Here: what gunicorn's master has imported, a reload does not renew.
        from chatstream.stream.sides import Detachable

        # Its very type: a wrapper may pass itself off as what it wraps, and wants to be walked.
        if not issubclass(type(self._answer), Detachable):
            return False
        self._context = contextvars.copy_context()
        self._let_go()
        self._resp.sock = self._out
        detached = False
        try:
            detached = bool(self._answer.detach(self))
        finally:
            if not detached:
                self._take_back()
        return detached

    def _let_go(self) -> None:
        """Makes the client's socket one for the loop."""
        self.sock.setblocking(False)

    def _take_back(self) -> None:
        """Makes it one for a thread again."""
        self.sock = self._resp.sock = self._conn.sock
        self.sock.setblocking(True)

    def begin(self, data: bytes) -> bytes:
        """The head, and `data` framed."""
        self._resp.send_headers()
        self._resp.write(data)
        return self._out.taken()

    def fail(self, error: Exception) -> None:
        """The response cannot begin: what there is of it was not sent. In a thread."""
        self._worker.handle_error(self._req, self.sock, self._conn.client, error)

    def frame(self, data: bytes) -> bytes:
        """More of the body, framed."""
        resp = self._resp
        if resp.chunked:
            resp.sent += len(data)
            return b"%X\r\n%b\r\n" % (len(data), data)
        resp.write(data)  # knows what the app has said of the length
        return self._out.taken()

    @property
    def trailer(self) -> int:
        """A chunk's CRLF (RFC 9112, section 7.1)."""
        return 2 if self._resp.chunked else 0

    def end(self) -> bytes:
        """What ends the response."""
        self._resp.close()
        return self._out.taken()

    def run(self, callback: Callable[[], object]) -> None:
        """Runs it in a thread of the pool."""
        with contextlib.suppress(RuntimeError):  # see `ThreadWorker.resume`
            self._worker.tpool.submit(self.logged, callback)

    def logged(self, callback: Callable[[], object]) -> None:
        """Runs it; what it raises is logged."""
        try:
            callback()
        except Exception:
            self._worker.log.exception("Error handling request %s", self._req.uri)

    def over(self, whole: bool) -> None:
        """Has the rest done in a thread of the pool."""
        self._whole = whole
        self._worker.resume(self._conn, self)


class _Out:
    """In the place of gunicorn's socket: what it would send."""

    def __init__(self) -> None:
        self._data = b""

    def sendall(self, data: bytes) -> None:
        self._data += data

    def taken(self) -> bytes:
        data, self._data = self._data, b""
        return data
