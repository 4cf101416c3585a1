"""gunicorn's gevent worker, with deadlines for what a client sends.

gunicorn's own cuts headers off silently when `keepalive` is over, and waits for TLS and for bodies
for ever. A greenlet may well wait; so here its socket knows until when.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from functools import partial
from time import monotonic
from typing import Any

from gevent.server import StreamServer
from gunicorn import sock as gunicorn_sock
from gunicorn.workers import ggevent

from chatstream import server
from chatstream.errors import RequestTimeout
from chatstream.workers.limits import LINGER, TIMED_OUT, Limits, supported

_RECEIVE = 65536


class GeventWorker(ggevent.GeventWorker):  # type: ignore[misc]
    """gunicorn's gevent worker, with deadlines for what a client sends. For `worker_class`."""

    def init_process(self) -> None:
        """As gunicorn's. A SIGTERM that comes while it patches must not be the master's to handle.

        It would be lost: the process has the master's handlers until `init_signals`.
        """
        signal.signal(signal.SIGTERM, self.handle_exit)
        super().init_process()

    def init_signals(self) -> None:
        """As gunicorn's, and the services of this process are told of an end."""
        super().init_signals()
        server.follow_signals()

    def run(self) -> None:
        """gunicorn's loop; by now the app is there, and its settings."""
        if supported(self.cfg):
            self._limits = Limits.load()
            self._tls = gunicorn_sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
            self.server_class = partial(_Server, handle=self._converse, cfg=self.cfg)
        super().run()

    def timeout_ctx(self) -> Any:
        """gunicorn's own deadline for a head; ours are the socket's."""
        return super().timeout_ctx() if self.server_class is None else contextlib.nullcontext()

    def _converse(self, listener: Any, sock: Any, address: Any) -> None:
        """One connection."""
        due = monotonic() + self._limits.first
        if self._tls is not None:
            try:
                sock.settimeout(self._limits.first)
                sock = self._tls.wrap_socket(
                    sock, server_side=True, suppress_ragged_eofs=self.cfg.suppress_ragged_eofs
                )
            except OSError as error:  # SSLError is one
                self.log.debug("No TLS handshake: %s", error)
                sock.close()
                return
        self.handle(listener, _Client(sock, self._limits, due), address)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """One request."""
        if isinstance(sock, _Client):
            with sock.serving(req):
                super().handle_request(listener_name, req, sock.sock, addr)
        else:
            super().handle_request(listener_name, req, sock, addr)


class _Server(StreamServer):  # type: ignore[misc]
    """gevent's server, made as gunicorn makes one of WSGI. TLS is the worker's, which bounds it."""

    def __init__(
        self, listener: Any, *, handle: Any, cfg: Any, spawn: Any, **others: object
    ) -> None:
        super().__init__(listener, handle=partial(handle, listener), spawn=spawn)
        if cfg.workers > 1:  # as gunicorn has it: the others shall get some
            self.max_accept = 1


class _Client:
    """A client's socket, as gunicorn's parser sees it. One greenlet's.

    Attributes:
        sock: The socket.
    """

    def __init__(self, sock: Any, limits: Limits, due: float) -> None:
        """
        Args:
            sock: The socket.
            limits: What the client is granted.
            due: When its first head has to be there.
        """
        self.sock = sock
        self._limits = limits
        self._due = due
        self._new = True
        self._first_byte = 0.0  # of the present request; 0 while there is none
        self._target: bytes | None = None  # once its head is there

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def recv(self, size: int) -> bytes:
        """More of a request.

        Raises:
            RequestTimeout: It did not come in time; the client was told, if it had begun.
        """
        try:
            self.sock.settimeout(max(0.001, self._due - monotonic()))
            data: bytes = self.sock.recv(size)
        except TimeoutError:
            self._refuse()
            raise RequestTimeout from None
        finally:
            self.sock.settimeout(None)
        self._postpone(monotonic())
        return data

    def _postpone(self, now: float) -> None:
        if not self._first_byte:
            self._first_byte = now
            due = now + self._limits.request
            self._due = min(self._due, due) if self._new else due
        if self._target is not None:
            self._due = self._limits.due(self._target, self._first_byte, now)

    def _refuse(self) -> None:
        if self._first_byte:
            with contextlib.suppress(OSError):
                self.sock.sendall(TIMED_OUT)
                self.sock.shutdown(socket.SHUT_WR)  # the app's own answer would come second

    @contextlib.contextmanager
    def serving(self, request: Any) -> Any:
        """Around the answer to a request, whose head is there."""
        now = monotonic()
        self._first_byte = self._first_byte or now
        self._target = request.uri.encode("latin-1", "replace")
        self._due = self._limits.due(self._target, self._first_byte, now)
        try:
            yield
        finally:
            pipelined = bool(request.unreader.buf.getvalue())
            now = monotonic()
            self._target, self._new = None, False
            self._first_byte = now if pipelined else 0.0
            self._due = now + (self._limits.request if pipelined else self._limits.kept)

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
