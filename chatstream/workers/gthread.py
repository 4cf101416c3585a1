"""gunicorn's gthread worker, whose threads only serve.

gunicorn's own reads requests, and waits for clients to let go of closed connections, in the
threads that should serve, or while it should accept: a few silent browsers, half-sent bodies or
clients that do not close hold a cancel up for seconds. Here all of that happens in the worker's
poller, with deadlines, and a request gets a thread when it is there.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import selectors
import socket
import ssl
from concurrent import futures
from time import monotonic
from types import FrameType
from typing import Any

from gunicorn import http
from gunicorn import sock as gunicorn_sock
from gunicorn.workers import base, gthread

from chatstream.workers import draining
from chatstream.workers.arrival import Arrival
from chatstream.workers.checks import check_descriptors, check_gunicorn, supported
from chatstream.workers.exchange import Exchange, Kept
from chatstream.workers.limits import (
    CONTINUE,
    LAST_WORDS,
    LINGER,
    LONG_BODY,
    LONG_HEAD,
    NO_DESCRIPTOR,
    TIMED_OUT,
    Limits,
)
from chatstream.workers.unreader import NOT_YET, Unreader
from chatstream.workers.waiting import GRAIN, Waiting, WaitingRoom

_RECEIVE = 65536

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_NO_CONNECTION = (  # and what accept(2) passes on of the connection's own
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.EINTR,
    errno.EPERM,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENONET,
)


class ThreadWorker(gthread.ThreadWorker):  # type: ignore[misc]
    """gunicorn's gthread worker, whose threads only serve. For `worker_class`.

    All but what is said to be in a thread runs in the worker's main one.
    """

    alive: bool
    detaches = False  # lets go of a response that the loop moves

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._accept_again = 0.0
        self._supported = self.detaches = supported(self.cfg)

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Called by gunicorn's master before the first worker."""
        check_gunicorn()
        check_descriptors()
        super().check_config(cfg, log)

    def init_signals(self) -> None:
        """As gunicorn's, and the services of this process are told of an end."""
        super().init_signals()
        draining.follow_signals()

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """As of all of gunicorn's workers. gthread's own takes locks that it may have interrupted.

        Its pool ends with the process anyway.
        """
        base.Worker.handle_quit(self, sig, frame)

    def load_wsgi(self) -> None:
        """As gunicorn's; what is there then lives as long as the worker."""
        super().load_wsgi()
        # So it need not be looked through again and again: a full collection holds up every
        # thread, also one that is to stop a stream.
        gc.freeze()

    def run(self) -> None:
        """gunicorn's loop; by now the app is there, and its settings."""
        self._room = WaitingRoom(self.poller)
        self._limits = Limits.load()
        self._tls = gunicorn_sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
        draining.join()
        try:
            super().run()
        except SystemExit:  # a signal's: at once
            self._see_streams_out()
            raise

    def _see_streams_out(self) -> None:
        """Streams end at once; no thread that the process would wait for has to send their ends."""
        until = monotonic() + LAST_WORDS
        while not all(service.at_rest() for service in draining.services()):
            if (left := until - monotonic()) <= 0:
                return
            self.wait_for_and_dispatch_events(min(left, GRAIN))

    # A connection comes

    def accept(self, listener: socket.socket) -> None:
        """Takes a connection, and waits for its first request."""
        if not self._supported:
            super().accept(listener)
            return
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._pause_accepting(error)
            elif error.errno not in _NO_CONNECTION:
                raise
            return
        self.nr_conns += 1
        conn = gthread.TConn(self.cfg, sock, address, listener.getsockname())
        due = monotonic() + self._limits.first
        if self._tls is None:
            self._receive(conn, b"", due)
        else:
            self._begin_tls(conn, self._tls, due)

    def _pause_accepting(self, error: OSError) -> None:
        self.log.warning("No connection is accepted for %s s: %s", NO_DESCRIPTOR, error)
        self._accept_again = monotonic() + NO_DESCRIPTOR
        self.set_accept_enabled(False)

    def set_accept_enabled(self, enabled: bool) -> None:
        """As gunicorn's, but not while there is no descriptor to accept with."""
        super().set_accept_enabled(enabled and monotonic() >= self._accept_again)

    def _begin_tls(self, conn: Any, context: ssl.SSLContext, due: float) -> None:
        try:
            conn.sock = context.wrap_socket(
                conn.sock,
                server_side=True,
                suppress_ragged_eofs=self.cfg.suppress_ragged_eofs,
                do_handshake_on_connect=False,
            )
        except OSError:  # gone already
            self._drop(conn)
        else:
            self._room.wait(Waiting(conn, due, self._shake_hands))

    def _shake_hands(self, waiting: Waiting) -> None:
        try:
            waiting.conn.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._room.listen(waiting, selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self._room.listen(waiting, selectors.EVENT_WRITE)
        except OSError as error:  # SSLError is one
            self.log.debug("No TLS handshake: %s", error)
            self._drop(self._room.forget(waiting))
        else:
            self._receive(self._room.forget(waiting), b"", waiting.due)

    # A request comes

    def _receive(self, conn: Any, data: bytes, due: float, *, new: bool = True) -> None:
        """Waits for a request.

        Args:
            conn: The connection.
            data: What has come of it with the one before.
            due: When its first byte has to be there; of a new connection the head.
            new: Whether it is the connection's first.
        """
        waiting = Waiting(conn, due, self._on_request)
        waiting.new = new
        waiting.arrival = Arrival(self._limits.body)
        conn.sock.setblocking(False)
        self._room.wait(waiting)
        if data:
            self._take(waiting, data)
        if self._tls is not None and waiting in self._room and conn.sock.pending():
            self._on_request(waiting)  # the poller knows nothing of what TLS has read already

    def _on_request(self, waiting: Waiting) -> None:
        try:
            while waiting in self._room:
                data = waiting.conn.sock.recv(_RECEIVE)
                if not data:
                    self._drop(self._room.forget(waiting))
                    return
                self._take(waiting, data)
                if self._tls is None:  # else some may be left in its buffer
                    return
        except NOT_YET:
            return
        except OSError as error:
            self.log.debug("A connection ended: %s", error)
            self._drop(self._room.forget(waiting))

    def _take(self, waiting: Waiting, data: bytes) -> None:
        """Some of a request is there. Has it served when no more has to be waited for."""
        arrival = waiting.arrival
        assert arrival is not None
        if arrival.feed(data):
            with contextlib.suppress(OSError):  # nothing was sent that could be in its way
                waiting.conn.sock.send(CONTINUE)
        if arrival.overlong:
            self._refuse(self._room.forget(waiting), LONG_BODY if arrival.has_head else LONG_HEAD)
        elif arrival.whole or arrival.long:
            self._serve(self._room.forget(waiting), arrival)
        else:
            self._room.postpone(waiting, self._due(waiting, arrival))

    def _due(self, waiting: Waiting, arrival: Arrival) -> float:
        """When the rest of a request has to be there."""
        now = monotonic()
        if not arrival.begun:
            return waiting.due
        waiting.first_byte = waiting.first_byte or now
        return self._limits.due(arrival, waiting.first_byte, now, waiting.due, new=waiting.new)

    def _serve(self, conn: Any, arrival: Arrival) -> None:
        if conn.parser is None:
            conn.parser = http.get_parser(self.cfg, conn.sock, conn.client)
            conn.parser.unreader = Unreader(conn.sock)
        # A long body of ours is refused, so nobody has to wait for its rest.
        ours = self._limits.ours(arrival)
        conn.parser.unreader.patience = 0.0 if ours else self._limits.request
        conn.parser.unreader.unread(arrival.data)
        conn.data_ready = True
        self.enqueue_req(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """In a thread: has the app answer, or the loop go on with its answer."""
        if not self._supported:
            return super().handle_request(req, conn)
        return Exchange(self, req, conn).serve()

    def resume(self, conn: Any, exchange: Exchange) -> None:
        """In the loop's thread: what it has moved is over."""
        # Where no thread can be started, the pool has it done by one of those that it has. Where it
        # is shut down nothing is done: the process ends.
        with contextlib.suppress(RuntimeError):
            self.tpool.submit(self._finish, conn, exchange)

    def _finish(self, conn: Any, exchange: Exchange) -> None:
        """In a thread. Says itself what came of it: `submit` may have raised."""
        fs: futures.Future[Any] = futures.Future()
        try:
            fs.set_result(self._keepalive_after(conn, exchange.finish()))
        except BaseException as error:  # as a pool has it
            fs.set_exception(error)
        self.method_queue.defer(self.finish_request, conn, fs)

    def finish_request(self, conn: Any, fs: Any) -> None:
        """A request was served: waits for the next one, or for the client to close."""
        if not self._supported:
            super().finish_request(conn, fs)
            return
        kept: Any = False
        try:
            kept = not fs.cancelled() and fs.result()
        except Exception:
            self.log.exception("Error handling request")
        if kept is Kept.DETACHED:
            return
        if not kept:
            self._linger(conn)
            return
        unreader = conn.parser.unreader
        early, unreader.buf = unreader.buf.getvalue(), io.BytesIO()
        patience = self._limits.kept if self.alive else gthread.STOP_KEEPALIVE_LINGER
        try:
            self._receive(conn, early, monotonic() + patience, new=False)
        except OSError:  # the app has closed it
            self._drop(conn)

    def _keepalive_after(self, conn: Any, keepalive: Any) -> Any:
        """In a thread: whether the connection can be used again.

        Not while a body goes on that the app did not read: nobody waits for it here.
        """
        if not self._supported:
            return super()._keepalive_after(conn, keepalive)
        if not keepalive:
            return keepalive
        conn.parser.unreader.patience = 0.0
        return bool(conn.parser.finish_body(deadline=monotonic() + 1.0))

    # A connection goes

    def _refuse(self, conn: Any, response: bytes) -> None:
        with contextlib.suppress(OSError):
            conn.sock.send(response)
        self._linger(conn)

    def _linger(self, conn: Any) -> None:
        """Closes our side, and waits for the client to do so: else what it has not read is lost."""
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
        else:
            self._room.wait(Waiting(conn, monotonic() + LINGER, self._on_lingering))

    def _on_lingering(self, waiting: Waiting) -> None:
        try:
            if waiting.conn.sock.recv(_RECEIVE):
                return
        except NOT_YET:
            return
        except OSError:
            pass
        self._drop(self._room.forget(waiting))

    def _drop(self, conn: Any) -> None:
        self.nr_conns -= 1
        conn.close()

    # Who waits, and until when

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """As gunicorn's, and ends what has waited too long."""
        super().wait_for_and_dispatch_events(min(timeout, self._room.patience()))
        if self.alive and self.nr_conns >= self.worker_connections:
            conn = self._room.make_room()
            if conn is not None:
                self._drop(conn)
        for waiting in self._room.expired():
            if waiting.idle:
                self._drop(waiting.conn)
            else:
                self._refuse(waiting.conn, TIMED_OUT)

    def _cap_keepalive(self, deadline: float) -> None:
        """The worker ends: who has not begun to ask has until `deadline`, and streams are drained.

        Whatever it ends for: `max_requests` may be another app's request, that no hook of ours saw.
        """
        draining.drain()
        super()._cap_keepalive(deadline)
        for waiting in self._room:
            if waiting.idle:
                self._room.postpone(waiting, min(waiting.due, deadline))

    def murder_keepalived(self, force: bool = False) -> None:
        """Ends what still waits at the end; before, deadlines do."""
        super().murder_keepalived(force)
        for waiting in list(self._room) if force else ():
            self._drop(self._room.forget(waiting))
