"""The connections to the provider: dialled, pooled and taken back so that a stop reaches them.

Below requests, which asks this room's adapter. Ours are:

- dialling (`_dial`): urllib3's own swallows a SYN that was shut down and tries the next address;
- putting a connection back (`_Pool._put_conn`): the last moment at which a stop may not touch it.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util import wait_for_write

from chatstream import liveness
from chatstream.errors import out_of_descriptors
from chatstream.outcome import Phase
from chatstream.stream import SocketHandle, Stream

UNREAD = 256 * 1024
"""Bytes of the provider's that may wait in the kernel for a client that does not read.

Half of it is asked for; Linux doubles that (socket(7)). Left alone, the buffer grows to tcp_rmem's
megabytes, all of them paid for.
"""

IDLE = 30.0
"""Seconds that an unused connection is kept."""

USER_TIMEOUT = 30.0
"""Seconds until the kernel gives a silent provider up; see `chatstream.liveness`."""


@dataclass
class Call:
    """What the layers below requests have to know of the call they serve."""

    stream: Stream
    fresh: bool = False  # take no pooled connection
    reused: bool = False  # a pooled connection was taken
    answered: bool = False  # a byte of the response came
    sock: socket.socket | None = None
    message: Message | None = None


# requests has no argument that reaches a connection. Each call runs in a thread (or greenlet) of
# its own, so the context says whose it is.
serving: ContextVar[Call] = ContextVar("chatstream_call")


class Message(http.client.HTTPResponse):
    """Notes that an answer began: from then on a request must not be sent again."""

    def begin(self) -> None:
        call = serving.get()
        call.answered = bool(self.fp.peek(1))  # waits for the first byte or the end
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            # Interim (RFC 9110, 15.2): the answer follows. http.client skips only 100, and a
            # connection put back here would give the answer to the next stream.
            self.headers = None  # type: ignore[assignment]
            super().begin()
        call.message = self


class _ConnectionMixin(HTTPConnection):
    response_class = Message
    stream: Stream | None = None  # whose call it carries

    def _new_conn(self) -> socket.socket:
        try:
            return _dial(self, serving.get().stream)
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"Connecting to {self.host} timed out.") from error
        except OSError as error:
            raise NewConnectionError(self, f"Connecting to {self.host} failed: {error}") from error

    def connect(self) -> None:
        super().connect()
        serving.get().stream.phase = Phase.HEADERS  # from here on the provider may be at work

    def putrequest(self, *args: Any, **options: Any) -> None:
        if self.sock is not None:  # reused
            serving.get().stream.phase = Phase.HEADERS
        super().putrequest(*args, **options)

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        # A response that closes takes the socket from the connection before we see it.
        serving.get().sock = self.sock
        return super().getresponse()


class _Connection(_ConnectionMixin):
    socket.socket().close()


class _TLSConnection(_ConnectionMixin, HTTPSConnection):
    socket.socket().close()


def _dial(connection: HTTPConnection, stream: Stream) -> socket.socket:
    """Connects to the first address that answers, unless a stop comes first."""
    stream.phase = Phase.CONNECTING
    stream.check()
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, address in _addresses(connection._dns_host, connection.port):
        stream.check()
        try:
            return _connected(socket.socket(family, kind, protocol), address, connection, stream)
        except OSError as error:
            stream.check()
            failure = error
            if out_of_descriptors(error):
                break
    raise failure


def _addresses(host: str, port: int | None) -> list[Any]:
    failure: OSError
    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except OSError as error:
        failure = error
    # Without a descriptor to ask with, a resolver may as well say that there is no such name, or
    # that something is busy, as libnss-mdns has it. Raises EMFILE then, which has no other cause.
    socket.socket().close()
    raise failure


def _connected(
    sock: socket.socket, address: Any, connection: HTTPConnection, stream: Stream
) -> socket.socket:
    try:
        stream.arm(sock)
        _connect(sock, address, connection, stream)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, address: Any, connection: HTTPConnection, stream: Stream) -> None:
    for option in connection.socket_options or ():
        sock.setsockopt(*option)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD // 2)
    timeout = connection.timeout
    # Not a blocking connect: a stop that comes before it finds nothing to shut down, so it has to
    # be looked for between the SYN and the wait.
    sock.setblocking(False)
    failed = sock.connect_ex(address)
    if failed not in (0, errno.EINPROGRESS):
        raise OSError(failed, "connect")
    stream.check()
    if failed and not wait_for_write(sock, timeout):
        raise TimeoutError
    failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    stream.check()
    if failed:
        raise OSError(failed, "connect")
    # Not earlier: it would bound the connect, which has a timeout of its own.
    liveness.notice_vanished(sock, USER_TIMEOUT)
    sock.settimeout(timeout)


@dataclass(frozen=True)
class _Idle:
    connection: Any
    since: float


class _PoolMixin(HTTPConnectionPool):
    """A pool that hands a connection out armed and takes it back disarmed."""

    def __init__(
        self,
        *args: Any,
        max_idle: int,
        call_later: Callable[[float, Callable[[], None]], object],
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self._max_idle = max_idle
        self._call_later = call_later
        # Last in, first out. A deque's own methods are atomic, and no lock that gevent may have
        # patched: the loop's thread sweeps here.
        self._idle: deque[_Idle] = deque()
        self._swept: deque[Any] = deque()  # shut down by the loop; only an owner may close
        self._sweeping = False
        self._closed = False

    def _get_conn(self, timeout: float | None = None) -> Any:
        call = serving.get()
        call.stream.check()
        while not call.fresh and self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                connection = self._idle.pop().connection
                if connection.is_connected:
                    return self._reused(connection, call)
                connection.close()
        fresh: Any = self._new_conn()
        fresh.stream = call.stream
        return fresh

    def _reused(self, connection: Any, call: Call) -> Any:
        try:
            call.stream.arm(connection.sock)
        except BaseException:
            connection.close()
            raise
        call.reused = True
        connection.stream = call.stream
        return connection

    def _put_conn(self, conn: Any) -> None:
        while self._swept:
            with contextlib.suppress(IndexError):
                self._swept.pop().close()
        if conn is None or conn.sock is None:
            return
        if conn.stream.disarm() and len(self._idle) < self._max_idle:
            conn.stream = None
            self._idle.append(_Idle(conn, monotonic()))
            if self._closed:  # looked at last: `close` may be taking the others just now
                self._close_all()
            else:
                self._sweep_after(IDLE)
        else:
            conn.close()

    def _sweep_after(self, delay: float) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._call_later(delay, self._sweep)

    def _sweep(self) -> None:
        """Ends what has been idle too long. Runs in the loop's thread."""
        self._sweeping = False
        with contextlib.suppress(IndexError):
            while monotonic() - self._idle[0].since >= IDLE:
                connection = self._idle.popleft().connection
                with contextlib.suppress(OSError):
                    handle = SocketHandle(connection.sock)
                    self._swept.append(connection)  # from here on an owner may close it
                    handle.shutdown()
            self._sweep_after(self._idle[0].since + IDLE - monotonic())

    def close(self) -> None:
        self._closed = True  # before all are taken: what is put back after that sees this
        self._close_all()
        super().close()

    def _close_all(self) -> None:
        for connections in (self._idle, self._swept):
            with contextlib.suppress(IndexError):
                while True:
                    entry = connections.pop()
                    (entry.connection if isinstance(entry, _Idle) else entry).close()


class _Pool(_PoolMixin):
    ConnectionCls = _Connection


class _TLSPool(_PoolMixin, HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class Adapter(HTTPAdapter):
    """Makes requests use our pools, also towards a proxy. Sends nothing again by itself.

    For one address, one way to it and one set of certificates.
    """

    def __init__(
        self, max_streams: int, call_later: Callable[[float, Callable[[], None]], object]
    ) -> None:
        self._max_streams = max_streams
        self._call_later = call_later
        self._made: list[_PoolMixin] = []
        self._pool: Any = None
        self._pools = {"http": partial(self._make, _Pool), "https": partial(self._make, _TLSPool)}
        super().__init__(max_retries=0)

    def _make(self, kind: type[_PoolMixin], *args: Any, **keywords: Any) -> _PoolMixin:
        pool = kind(*args, max_idle=self._max_streams, call_later=self._call_later, **keywords)
        self._made.append(pool)
        return pool

    def close(self) -> None:
        """Closes the pools; urllib3 leaves that to the garbage collector."""
        super().close()
        self._pool = None
        while self._made:
            self._made.pop().close()

    def get_connection_with_tls_context(self, *args: Any, **keywords: Any) -> Any:
        """The pool of the one address that is called: to look for it takes as long as to send."""
        pool: Any = self._pool
        if pool is None:
            pool = self._pool = super().get_connection_with_tls_context(*args, **keywords)
        return pool

    def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
        super().init_poolmanager(*args, **keywords)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **keywords: Any) -> Any:
        if proxy.lower().startswith("socks"):
            raise requests.exceptions.InvalidProxyURL(
                "SOCKS proxies are not supported: a stop could not reach the connection. "
                "Use an HTTP proxy or NO_PROXY."
            )
        manager = super().proxy_manager_for(proxy, **keywords)
        manager.pool_classes_by_scheme = self._pools
        return manager
