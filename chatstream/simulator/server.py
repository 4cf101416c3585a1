"""The server: one thread, one epoll and one heap of timers."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

from chatstream.simulator.connection import Connection, Phase
from chatstream.simulator.ledger import Ledger
from chatstream.simulator.plan import SECOND, Plan, ns
from chatstream.simulator.routes import Routes
from chatstream.simulator.wire import Request

_ACCEPT_PAUSE_NS = SECOND // 20  # when the process is out of descriptors

_BATCH = (
    32  # events or timers served between two looks at epoll: bounds how late a hang-up is stamped
)

_MAX_EVENTS = 4096

_BACKLOG = 4096

_LONGEST_POLL_S = 3600.0  # epoll_wait takes no more than an int of milliseconds

_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Simulator:
    """The provider. Listens from construction on; serves in a thread of its own (`start`) or yours.

    `start`, `behave`, `close` and the properties are safe from any thread; the rest is the loop's
    thread's.

    Args:
        host: Address to listen on.
        port: 0 takes a free one, see `port`.
        certfile: PEM file; given, the server speaks TLS.
        keyfile: PEM file, unless the key is in `certfile`.
        handshake_delay: Seconds for which a TLS connection is accepted but not answered.
        defaults: Values for keys of ``simulate`` that a request leaves out, see `Plan`.
        say: Takes a line of text for every request that has ended; must not block.

    Raises:
        ValueError: A default is unknown or out of range, or the certificate cannot be read.
        OSError: It cannot listen there, for instance because the port is in use.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        certfile: str | None = None,
        keyfile: str | None = None,
        handshake_delay: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._defaults: dict[str, Any] = {}
        self.behave(defaults or {})
        self._context = _tls_context(certfile, keyfile)
        self._handshake_delay_ns = ns(handshake_delay)
        self._host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.setblocking(False)
        # On Linux the sockets it accepts inherit this: an event must not wait for another's ACK.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._port: int = self._listener.getsockname()[1]
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.poller = select.epoll()
        self.poller.register(self._listener, select.EPOLLIN)
        self.poller.register(self._wake_fd, select.EPOLLIN)
        self.ledger = Ledger(say)
        self._routes = Routes(self.ledger, lambda: self._defaults, self.call_at, self._totals)
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._ready: dict[int, None] = {}  # descriptors to serve, in the order epoll named them
        self._timers: list[tuple[int, int, Connection | None, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._accepted = 0
        self._handshakes_aborted = 0
        self._last_closed_ns: int | None = None
        self._internal_errors = 0
        self._closing = False
        self._running = False
        self._loop_ident: int | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        # Guards _running and _wake_fd. Reentrant: a signal handler's close() may find it held.
        self._lock = threading.RLock()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def origin(self) -> str:
        """Scheme, host and port, to which the paths of the figures are appended."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._context else 'http'}://{host}:{self._port}"

    @property
    def url(self) -> str:
        """The chat API's address."""
        return f"{self.origin}/v1/chat/completions"

    def __enter__(self) -> Simulator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Simulator:
        """Serves in a thread of its own; returns itself. To be called once."""
        with self._lock:
            self._running = True
        self._thread = threading.Thread(
            target=self.serve_forever, name="chatstream-simulator", daemon=True
        )
        self._thread.start()
        return self

    def behave(self, defaults: Mapping[str, Any]) -> None:
        """Sets what a request's ``simulate`` leaves out, from the next request on.

        Takes the place of what was set before. Safe from any thread: one step.

        Raises:
            ValueError: A key is unknown or its value out of range; then nothing has changed.
        """
        Plan.parse(defaults)
        self._defaults = dict(defaults)

    def serve_forever(self) -> None:
        """Serves in the calling thread until `close` is called."""
        with self._lock:
            self._loop_ident = threading.get_ident()
            self._running = True
        try:
            while not self._closing:
                self._turn()
        finally:
            self._dispose()

    def close(self) -> None:
        """Ends the loop, closes every socket, waits for both. Safe from any thread. Idempotent.

        From a signal handler in the loop's own thread it only asks the loop to end.
        """
        with self._lock:
            self._closing = True
            with suppress(OSError, ValueError):  # closed already
                os.eventfd_write(self._wake_fd, 1)
            if not self._running:
                self._dispose()
        if threading.get_ident() == self._loop_ident:
            return
        self._ended.wait()
        if self._thread is not None:
            self._thread.join()

    def _dispose(self) -> None:
        now_ns = time.monotonic_ns()
        for connection in list(self._connections.values()):
            connection.close(now_ns)
        with self._lock:
            if self._ended.is_set():
                return
            self._listener.close()
            self.poller.close()
            os.close(self._wake_fd)
            self._wake_fd = -1
            self._timers.clear()
            self._ended.set()

    # ---- the loop

    def _turn(self) -> None:
        events = self.poller.poll(self._timeout_s(), _MAX_EVENTS)
        now_ns = time.monotonic_ns()  # before anything else: one stamp for all that have gone
        for fd, mask in events:
            if mask & _GONE and (connection := self._connections.get(fd)) is not None:
                self._guard(connection, functools.partial(connection.hang_up, now_ns))
            else:
                self._ready[fd] = None
        self._serve_ready()
        self._run_timers()

    def _timeout_s(self) -> float | None:
        if self._ready:
            return 0
        if not self._timers:
            return None
        return min(max(0, self._timers[0][0] - time.monotonic_ns()) / SECOND, _LONGEST_POLL_S)

    def _serve_ready(self) -> None:
        # What is left over stays in line ahead of what the next poll adds, so that nobody starves.
        for fd in list(itertools.islice(self._ready, _BATCH)):
            if fd not in self._ready:  # closed by one of those before
                continue
            del self._ready[fd]
            if (connection := self._connections.get(fd)) is not None:
                self._guard(connection, connection.ready)
            elif fd == self._listener.fileno():
                self._guard(None, self._accept)

    def _run_timers(self) -> None:
        for _ in range(_BATCH):
            if not self._timers or self._timers[0][0] > time.monotonic_ns():
                return
            _, _, connection, call = heappop(self._timers)
            self._guard(connection, call)

    def _guard(self, connection: Connection | None, call: Callable[[], None]) -> None:
        """Calls; a defect costs one connection, not the server, and shows in /stats."""
        try:
            call()
        except Exception:
            self._internal_errors += 1
            if connection is not None:
                with suppress(Exception):
                    connection.hang_up(time.monotonic_ns(), "internal_error")

    def call_at(
        self, when_ns: int, connection: Connection | None, call: Callable[[], None]
    ) -> None:
        """Has `call` called at an instant. It is never cancelled: `call` must bear being late."""
        heappush(self._timers, (when_ns, next(self._timer_numbers), connection, call))

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting()
                    return
                continue  # that client has gone already (accept(2): treat like EAGAIN)
            self._admit(sock, address[1])

    def _pause_accepting(self) -> None:
        # The listener stays readable while descriptors are short: the loop would spin.
        self.poller.modify(self._listener, 0)
        resume_ns = time.monotonic_ns() + _ACCEPT_PAUSE_NS
        self.call_at(resume_ns, None, lambda: self.poller.modify(self._listener, select.EPOLLIN))

    def _admit(self, sock: socket.socket, peer: int) -> None:
        sock.setblocking(False)
        self._accepted += 1
        connection = Connection(self, sock, self._accepted, peer)
        self._connections[sock.fileno()] = connection
        self._guard(connection, lambda: connection.open(self._context, self._handshake_delay_ns))

    def forget(self, connection: Connection, fd: int, now_ns: int) -> None:
        """Takes a connection out of the books. It is about to close and still in its last phase."""
        del self._connections[fd]
        self._ready.pop(fd, None)
        with suppress(OSError):
            self.poller.unregister(fd)
        if connection.phase is Phase.HANDSHAKE:
            self._handshakes_aborted += 1
        if not connection.figures_only:
            self._last_closed_ns = now_ns

    def serve(self, connection: Connection, request: Request) -> None:
        """Answers one request, now or later."""
        self._routes.serve(connection, request)

    def _totals(self) -> dict[str, object]:
        is_chat = [not connection.figures_only for connection in self._connections.values()]
        return {
            "connections_open": sum(is_chat),
            "connections_total": self._accepted - self._routes.figure_connections,
            "handshakes_aborted": self._handshakes_aborted,
            "last_connection_closed_ns": self._last_closed_ns,
            "internal_errors": self._internal_errors,
        }


def _tls_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    if certfile is None:
        if keyfile is not None:
            raise ValueError("keyfile needs a certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"certfile or keyfile cannot be read: {why}") from error
    return context
