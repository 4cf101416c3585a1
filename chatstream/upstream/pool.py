"""The connections to the provider: dialled, pooled and taken back so that a stop reaches them.

Below requests, which asks this room's adapter. Ours are:

- dialling (`_dial`): urllib3's own swallows a SYN that was shut down and tries the next address;
- putting a connection back (`_Pool._put_conn`): the last moment at which a stop may not touch it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from chatstream.sockets.handle import SocketHandle
from chatstream.upstream.dialling import Call, Connection, TLSConnection, serving

IDLE = 30.0
"""Seconds that an unused connection is kept."""


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
    ConnectionCls = Connection


class _TLSPool(_PoolMixin, HTTPSConnectionPool):
    ConnectionCls = TLSConnection


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
