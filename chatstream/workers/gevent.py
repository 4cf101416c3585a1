"""gunicorn's gevent worker, with deadlines for what a client sends.

gunicorn's own cuts headers off silently when `keepalive` is over, and waits for TLS and for bodies
for ever, these within the app, with what that holds for a request. A greenlet may well wait; so
here its socket knows until when, and gives the parser a request when it is there.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, NamedTuple

import gevent
from gevent.server import StreamServer
from gunicorn import sock as gunicorn_sock
from gunicorn.workers import base, ggevent

from chatstream.errors import RequestTimeout, out_of_descriptors
from chatstream.sockets import native
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

_RECEIVE = 65536

_UNREAD = 65536
"""Bytes of a body that an app did not read, thrown away so that a connection can go on."""

_KEPT_AT_THE_END = 2.0
"""Seconds that a worker which ends waits for clients to begin a request; as on gthread."""


class GeventWorker(ggevent.GeventWorker):  # type: ignore[misc]
    """gunicorn's gevent worker, with deadlines for what a client sends. For `worker_class`."""

    detaches = False  # lets go of a response that the loop moves

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Called by gunicorn's master before the first worker."""
        check_gunicorn()
        check_descriptors()

    def init_process(self) -> None:
        """As gunicorn's. A SIGTERM that comes while it patches must not be the master's to handle.

        It would be lost: the process has the master's handlers until `init_signals`.
        """
        signal.signal(signal.SIGTERM, self.handle_exit)
        super().init_process()

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """As gunicorn's, once the streams are out: they end at once, in greenlets of their own."""
        gevent.spawn(self._quit, sig, frame)

    def _quit(self, sig: int, frame: FrameType | None) -> None:
        self.alive = False
        until = monotonic() + LAST_WORDS
        while monotonic() < until and not all(service.at_rest() for service in draining.services()):
            gevent.sleep(0.02)
        base.Worker.handle_quit(self, sig, frame)

    def init_signals(self) -> None:
        """As gunicorn's, and the services of this process are told of an end."""
        super().init_signals()
        draining.follow_signals()

    def load_wsgi(self) -> None:
        """As gunicorn's; what is there then lives as long as the worker."""
        super().load_wsgi()
        gc.freeze()  # as on gthread: a full collection holds up every stop

    def run(self) -> None:
        """gunicorn's loop; by now the app is there, and its settings."""
        if supported(self.cfg):
            self.detaches = True
            self._limits = Limits.load()
            self._clients: set[_Client] = set()
            self._ended = 0.0
            self._tls = gunicorn_sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
            self.server_class = partial(_Server, handle=self._converse, worker=self)
        draining.join()
        super().run()

    def timeout_ctx(self) -> Any:
        """gunicorn's own deadline for a head; ours are the socket's."""
        return super().timeout_ctx() if self.server_class is None else contextlib.nullcontext()

    def notify(self) -> None:
        """gunicorn's sign of life, each second; who asks for nothing does not hold an end up."""
        super().notify()
        if self.alive:
            return
        draining.drain()  # `max_requests` may be another app's request, that no hook of ours saw
        if self.server_class is None:
            return
        self._ended = self._ended or monotonic()
        if monotonic() >= self._ended + _KEPT_AT_THE_END:
            for client in list(self._clients):
                client.end_if_idle()

    def _converse(self, listener: Any, sock: Any, address: Any) -> None:
        """One connection."""
        if self._tls is not None:
            try:
                sock = self._tls.wrap_socket(
                    sock,
                    server_side=True,
                    suppress_ragged_eofs=self.cfg.suppress_ragged_eofs,
                    do_handshake_on_connect=False,
                )
            except OSError:  # gone already
                sock.close()
                return
        client = _Client(sock, self._limits)
        self._clients.add(client)
        try:
            if self._tls is not None:
                client.shake_hands()
        except OSError as error:  # SSLError is one
            self.log.debug("No TLS handshake: %s", error)
            sock.close()
        else:
            self.handle(listener, client, address)
        finally:
            self._clients.discard(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """One request."""
        if not isinstance(sock, _Client):
            super().handle_request(listener_name, req, sock, addr)
            return
        exchange = _Exchange(self, req, _Conn(sock.sock, addr, listener_name))
        kept = exchange.serve()
        if kept is Kept.DETACHED:
            exchange.wait()
            kept = exchange.finish()
        if not (kept and self.cfg.keepalive and sock.drained(req.body)):
            raise StopIteration
        sock.await_next(req.unreader.take_buffered())


class _Conn(NamedTuple):
    """A connection, as an exchange knows one."""

    sock: Any
    client: Any
    server: Any


class _Exchange(Exchange):
    """One request and its response. The greenlet of a detached stream only waits."""

    def _let_go(self) -> None:
        self._spawn = native.runner()
        self._over = threading.Event()  # gevent's, which other threads may set
        self.sock = native.bare(self._conn.sock)

    def _take_back(self) -> None:
        self.sock = self._resp.sock = self._conn.sock

    def run(self, callback: Callable[[], object]) -> None:
        """Runs it in a greenlet."""
        self._spawn(partial(self.logged, callback))

    def over(self, whole: bool) -> None:
        """Wakes the greenlet."""
        self._whole = whole
        self._over.set()

    def wait(self) -> None:
        """Waits until it is over."""
        self._over.wait()


class _Server(StreamServer):  # type: ignore[misc]
    """gevent's server, made as gunicorn makes one of WSGI. TLS is the worker's, which bounds it."""

    def __init__(
        self, listener: Any, *, handle: Any, worker: Any, spawn: Any, **others: object
    ) -> None:
        super().__init__(listener, handle=partial(handle, listener), spawn=spawn)
        self._log = worker.log
        if worker.cfg.workers > 1:  # as gunicorn has it: the others shall get some
            self.max_accept = 1

    def do_read(self) -> Any:
        """Accepts a connection; where there is no descriptor for it, pauses and says so."""
        try:
            return super().do_read()
        except OSError as error:
            if not out_of_descriptors(error):
                raise
            self._log.warning("No connection is accepted for %s s: %s", NO_DESCRIPTOR, error)
        self.stop_accepting()
        self._timer = self.loop.timer(NO_DESCRIPTOR)
        self._timer.start(self._start_accepting_if_started)
        return None


def _within(seconds: float) -> Any:
    """Around what waits: TimeoutError when the time is over.

    Not the socket's own timeout: that begins anew with each byte of a TLS record.
    """
    return gevent.Timeout(max(0.001, seconds), TimeoutError)


class _Client:
    """A client's socket, as gunicorn's parser sees it. One greenlet's.

    Attributes:
        sock: The socket.
    """

    def __init__(self, sock: Any, limits: Limits) -> None:
        """
        Args:
            sock: The socket, just accepted.
            limits: What the client is granted.
        """
        self.sock = sock
        self._limits = limits
        self._arrival: Arrival | None = Arrival(limits.body)  # while a request is waited for
        self._due = monotonic() + limits.first
        self._first_byte = 0.0  # when it came
        self._new = True  # nothing was served yet
        self._patience = 0.0  # how long the rest of a long body may pause
        self._over = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def shake_hands(self) -> None:
        """TLS's beginning."""
        with _within(self._due - monotonic()):
            self.sock.do_handshake()

    def end_if_idle(self) -> None:
        """Ends the connection if nothing of a request is there. From any greenlet."""
        if self._arrival is not None and not self._arrival.begun:
            self._over = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)

    def drained(self, body: Any) -> bool:
        """Whether nothing is left of a body; what the app did not read of it is thrown away.

        If it is there: nobody waits for what goes on.
        """
        self._patience = 0.0
        try:
            return not body.failed and any(not body.read(1024) for _ in range(_UNREAD // 1024))
        except Exception:  # it is not there, or malformed
            return False

    def await_next(self, data: bytes) -> None:
        """A request was served; `data` has come of the next one."""
        self._arrival = Arrival(self._limits.body)
        self._due = monotonic() + self._limits.kept
        self._first_byte, self._new = 0.0, False
        if data:
            self._take(self._arrival, data)

    def recv(self, size: int) -> bytes:
        """A whole request, at first; then what is missing of a long one.

        Raises:
            RequestTimeout: It did not come in time; the client was told, if it had begun.
            TimeoutError: More of a body was asked for than anybody shall wait for.
            ConnectionResetError: The request was refused.
        """
        try:
            return self._rest(size) if self._arrival is None else self._request(self._arrival)
        except OSError:  # gevent's, for a descriptor that was shut down under it
            if not self._over:
                raise
            return b""

    def _request(self, arrival: Arrival) -> bytes:
        while not (arrival.whole or arrival.long or arrival.overlong):
            try:
                with _within(self._due - monotonic()):
                    data = self.sock.recv(_RECEIVE)
            except TimeoutError:
                if arrival.begun:
                    self._refuse(TIMED_OUT)
                raise RequestTimeout from None
            if not data:
                return b""
            self._take(arrival, data)
        if arrival.overlong:
            self._refuse(LONG_BODY if arrival.has_head else LONG_HEAD)
            raise ConnectionResetError(errno.ECONNRESET, "The request is too long.")
        self._arrival = None
        # A long body of ours is refused, so nobody has to wait for its rest.
        self._patience = 0.0 if self._limits.ours(arrival) else self._limits.request
        return arrival.data

    def _take(self, arrival: Arrival, data: bytes) -> None:
        if arrival.feed(data):
            self._send(CONTINUE)
        if arrival.begun:
            now = monotonic()
            self._first_byte = self._first_byte or now
            self._due = self._limits.due(arrival, self._first_byte, now, self._due, new=self._new)

    def _rest(self, size: int) -> bytes:
        try:
            with _within(self._patience):
                return bytes(self.sock.recv(size))
        except TimeoutError:
            if not self._patience:
                raise
            self._refuse(TIMED_OUT)
            raise RequestTimeout from None

    def _refuse(self, response: bytes) -> None:
        self._send(response)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)  # the app's own answer would come second

    def _send(self, response: bytes) -> None:
        self.sock.settimeout(0.0)  # who does not read its answers is not told
        with contextlib.suppress(OSError):
            self.sock.send(response)
        self.sock.settimeout(None)

    def close(self) -> None:
        """Closes, once the client has or had its time to: else what it has not read is lost."""
        try:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
                self._linger(monotonic() + LINGER)
        finally:
            self.sock.close()

    def _linger(self, until: float) -> None:
        while (left := until - monotonic()) > 0:
            self.sock.settimeout(left)
            if not self.sock.recv(_RECEIVE):
                return
