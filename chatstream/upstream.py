"""The call to the provider. The only room that imports requests or urllib3.

requests does what it is good at: TLS, proxies from the environment, pooling. Three things are ours,
because a stop must reach them:

- dialling (`_dial`): urllib3's own swallows a SYN that was shut down and tries the next address;
- putting a connection back (`_Pool._put_conn`): the last moment at which a stop may not touch it;
- reading the body (`SocketBody`): with timeouts that leave room for pings.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import http.client
import json
import logging
import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from time import monotonic, sleep
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
)
from urllib3.util import wait_for_write

from chatstream import liveness, native
from chatstream.call_threads import CallThreads
from chatstream.config import Settings
from chatstream.errors import Busy, StreamError, UpstreamError, out_of_descriptors
from chatstream.framing import BadFraming, Chunked, Framing, Length, UntilClose
from chatstream.outcome import Phase
from chatstream.stream import Body, SocketHandle, Stream

UNREAD = 256 * 1024
"""Bytes of the provider's that may wait in the kernel for a client that does not read.

Half of it is asked for; Linux doubles that (socket(7)). Left alone, the buffer grows to tcp_rmem's
megabytes, all of them paid for.
"""

IDLE = 30.0
"""Seconds that an unused connection is kept."""

USER_TIMEOUT = 30.0
"""Seconds until the kernel gives a silent provider up; see `chatstream.liveness`."""

_NO_HEADERS = urllib3.HTTPHeaderDict()
_NOT_NOW = (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_TORN = (OSError, ValueError, AttributeError)
"""ValueError and AttributeError: a TLS object that was torn down under the read."""

_TURN = 0.01
"""Seconds that a greenlet may run before the others have a turn, though it need not wait."""

_CHUNK = 64 * 1024
_ERROR_BODY = 64 * 1024
_ERROR_PATIENCE = 5.0
_MESSAGE = 1000

log = logging.getLogger("chatstream")


class Upstream:
    """Calls one provider over a pool of connections. Make it after fork. Safe from any thread.

    Attributes:
        threads: Where to call `open`.
    """

    def __init__(
        self,
        settings: Settings,
        max_streams: int,
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        """
        Args:
            settings: Address, key and timeouts.
            max_streams: The pool's size.
            call_later: Runs something in the loop's thread, with which idle connections end.
        """
        self._url = settings.upstream_url
        self._key = settings.api_key
        self._timeout = (settings.upstream_connect_timeout, settings.upstream_headers_timeout)
        self._adapter = _Adapter(max_streams, call_later)
        self._prepared: _Prepared | None = None
        self.threads = CallThreads()

    def open(self, payload: bytes, stream: Stream) -> Body:
        """Sends `payload` and returns the provider's answer. Blocks until its headers are in.

        Args:
            payload: The provider's chat request, as JSON.
            stream: Whose call it is; a stop of it ends this at once.

        Raises:
            StreamAborted: The stream ended meanwhile.
            Busy: The process has no descriptor left.
            UpstreamError: The provider refused, failed, or was not reached.
        """
        call = _Call(stream)
        try:
            response = self._post(payload, call)
        except BaseException as error:
            stream.disarm()
            if isinstance(error, (requests.RequestException, HTTPError, OSError, ValueError)):
                stream.check()
                raise mapped(error) from error
            raise
        body = call.body(response)
        try:
            self._judge(response, body)
        except BaseException:
            body.close()
            raise
        body.let_go()
        return body

    def close(self) -> None:
        """Closes the idle connections, ends the idle threads."""
        self.threads.close()
        self._adapter.close()

    def _post(self, payload: bytes, call: _Call) -> requests.Response:
        try:
            return self._send(payload, call)
        except requests.ConnectionError:
            if not call.reused or call.answered or call.stream.ended:
                raise
        log.info(
            "[SSE] %s stream=%s the provider had closed an idle connection; calling once more",
            call.stream.session_id,
            call.stream.stream_id,
        )
        call.fresh, call.reused = True, False
        return self._send(payload, call)

    def _send(self, payload: bytes, call: _Call) -> requests.Response:
        token = _call.set(call)
        try:
            # The first calls may all prepare: they find the same.
            prepared = self._prepared = self._prepared or _prepared(self._url, self._key)
            request = prepared.request(payload)
            # Not a session's `send`: what that adds - cookies, redirects, hooks, the environment
            # read anew - must not be, and costs more than the call.
            return self._adapter.send(request, timeout=self._timeout, **prepared.environment)
        finally:
            _call.reset(token)

    def _judge(self, response: requests.Response, body: Body) -> None:
        """Raises UpstreamError unless the response is a stream of events."""
        status = response.status_code
        if status == 200:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if kind != "text/event-stream" or encoding != "identity":
                raise _not_stream("something else than an event stream")
        elif status in (401, 403):
            raise UpstreamError(
                "The provider did not accept this service's key.", code="upstream_auth"
            )
        elif status == 429:
            raise UpstreamError(
                "The provider is limiting this service's rate. Please try again later.",
                code="upstream_rate_limited",
                status=429,
                retry_after=_retry_after(response.headers.get("Retry-After")),
            )
        elif status == 407:
            raise UpstreamError("The proxy wants a password.", code="upstream_connect")
        elif 400 <= status < 500:
            raise UpstreamError(
                self._message(body) or f"The provider rejected the request ({status}).",
                code="upstream_rejected",
                status=400,
            )
        elif status >= 500:
            raise UpstreamError(f"The provider failed ({status}).")
        else:
            raise _not_stream(f"status {status}")

    def _message(self, body: Body) -> str:
        """The provider's sentence about a rejected request, without our key."""
        try:
            value = json.loads(_whole(body))
        except (ValueError, RecursionError, UpstreamError, TimeoutError):
            return ""
        error = value.get("error") if isinstance(value, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        if not isinstance(message, str):
            return ""
        if self._key:
            message = message.replace(self._key, "[key]")
        return message.encode(errors="replace").decode()[:_MESSAGE]


class SocketBody:
    """The body of a streaming response, read from its socket. Owner thread only.

    A `Body` (see `chatstream.stream`). http.client has read the headers; what it has read beyond
    them comes first.
    """

    def __init__(
        self,
        response: requests.Response,
        message: _Message,
        sock: socket.socket,
        stream: Stream,
    ) -> None:
        self._raw = response.raw
        self._message = message
        self._sock = sock
        self._stream = stream
        self._framing: Framing = _framing(message)
        self._closed = self._detached = False
        self._ahead = _read_ahead(message, sock)
        self.more = False
        # A socket timeout of Python's costs two more turns of the interpreter's lock an event: with
        # 200 streams, half of the CPU. The kernel's costs none; TLS and gevent cannot use it.
        self._plain = type(sock) is socket.socket
        self._kernel_waits = self._plain and not native.patched()
        self._kernel_timeout = -1.0  # unknown; zero would be for ever
        self._running_since = monotonic()
        if self._kernel_waits:
            sock.settimeout(None)

    def receive(self, timeout: float) -> bytes:
        deadline = monotonic() + timeout
        left = timeout
        while not self._framing.finished:
            data, self._ahead = self._ahead, b""
            data = data or self._recv(left)
            body = self._decoded(data)
            if body or not data:
                return body
            if (left := deadline - monotonic()) <= 0:  # bytes, but none of the body's
                raise TimeoutError
        return b""

    def detach(self) -> int:
        self._sock = native.bare(self._sock)
        self._sock.settimeout(0)
        self._detached = True
        return self._sock.fileno()

    def receive_now(self) -> bytes | None:
        framing = self._framing
        if framing.finished:
            return b""
        data = self._ahead
        try:
            if data:
                self._ahead = b""
            else:
                data = self._sock.recv(_CHUNK)
        except _NOT_NOW as error:
            self.more = False
            if _has_vanished(error):
                raise _broken(error) from error
            return None
        except _TORN as error:
            raise _broken(error) from error
        body = self._decoded(data)
        if framing.finished or not self._plain:
            self.more = framing.finished or not self._is_empty()
        return body or (b"" if framing.finished or not data else None)

    def _is_empty(self) -> bool:
        """Whether TLS has nothing left that the socket does not show.

        OpenSSL takes one record after the other from the socket; TLS within TLS takes what comes.
        """
        pending = getattr(self._sock, "pending", None)
        return pending is not None and not pending()

    def drain(self, timeout: float) -> None:
        if self._detached:  # the loop had time for that
            return
        deadline = monotonic() + timeout
        with contextlib.suppress(TimeoutError, UpstreamError):
            while (left := deadline - monotonic()) > 0 and self.receive(left):
                pass

    def let_go(self) -> None:
        """Gives back what the headers are in, once nobody looks at them."""
        self._message.let_go()
        self._raw.headers = _NO_HEADERS

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        raw = self._raw
        if self._framing.finished and self._framing.reusable and not self._message.will_close:
            self._message.close()  # to http.client, that is a response read to its end
            raw.release_conn()
        else:
            raw.close()
            self._stream.disarm()

    def _decoded(self, data: bytes) -> bytes:
        """The body's bytes in what has come; of b"", the provider's FIN, none."""
        try:
            if data:
                return self._framing.feed(data)
            self._framing.eof()
        except BadFraming as error:
            raise UpstreamError(
                f"The provider's answer broke off: {error}.", code="upstream_truncated"
            ) from error
        return b""

    def _recv(self, timeout: float) -> bytes:
        try:
            if self._kernel_waits:
                self._set_kernel_timeout(timeout)
                return self._sock.recv(_CHUNK)
            self._sock.settimeout(timeout)
            return self._recv_in_turn()
        except _NOT_NOW as error:
            if _has_vanished(error):
                raise _broken(error) from error
            raise TimeoutError from None
        except _TORN as error:
            raise _broken(error) from error

    def _recv_in_turn(self) -> bytes:
        """gevent switches only where there is something to wait for. Where the provider and the
        client are both faster than we are there never is, and no other greenlet would run again.
        """
        before = monotonic()
        if before - self._running_since > _TURN:
            sleep(0)
            self._running_since = before = monotonic()
        data = self._sock.recv(_CHUNK)
        if (now := monotonic()) - before > _TURN / 10:  # it has waited
            self._running_since = now
        return data

    def _set_kernel_timeout(self, timeout: float) -> None:
        """SO_RCVTIMEO (socket(7)), unless what is set is `timeout` or up to 1 % more."""
        if not timeout <= self._kernel_timeout <= timeout * 1.01:
            self._kernel_timeout = max(timeout, 0.001)
            seconds, rest = divmod(self._kernel_timeout, 1)
            value = struct.pack("@ll", int(seconds), int(rest * 1_000_000))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


class MockedBody:
    """The body of a response without a socket, as a mock of requests makes it. A `Body`.

    Nothing in it waits.
    """

    more: bool = True

    def __init__(self, response: requests.Response) -> None:
        self._response = response

    def receive(self, timeout: float) -> bytes:
        try:
            data: bytes = self._response.raw.read(_CHUNK)
        except (HTTPError, OSError, ValueError) as error:
            raise _broken(error) from error
        return data

    def detach(self) -> int:
        return -1

    def receive_now(self) -> bytes:
        return self.receive(0)

    def drain(self, timeout: float) -> None:
        pass

    def let_go(self) -> None:
        pass

    def close(self) -> None:
        self._response.close()


@dataclass
class _Call:
    """What the layers below requests have to know of the call they serve."""

    stream: Stream
    fresh: bool = False  # take no pooled connection
    reused: bool = False  # a pooled connection was taken
    answered: bool = False  # a byte of the response came
    sock: socket.socket | None = None
    message: _Message | None = None

    def body(self, response: requests.Response) -> SocketBody | MockedBody:
        if self.message is None or self.sock is None:
            return MockedBody(response)
        response.request.body = None  # it is sent, may be long, and lives as long as the response
        return SocketBody(response, self.message, self.sock, self.stream)


# requests has no argument that reaches a connection. Each call runs in a thread (or greenlet) of
# its own, so the context says whose it is.
_call: ContextVar[_Call] = ContextVar("chatstream_call")


class _Message(http.client.HTTPResponse):
    """Notes that an answer began: from then on a request must not be sent again."""

    def begin(self) -> None:
        call = _call.get()
        call.answered = bool(self.fp.peek(1))  # waits for the first byte or the end
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            # Interim (RFC 9110, 15.2): the answer follows. http.client skips only 100, and a
            # connection put back here would give the answer to the next stream.
            self.headers = None  # type: ignore[assignment]
            super().begin()
        call.message = self

    def let_go(self) -> None:
        """Gives back what the headers were read with and into, 10 KB, while the body goes on.

        Its own reader has taken what was read ahead. To http.client the response is over, which
        the connection has to be for its next request; the socket stays the connection's.
        """
        if not self.will_close:  # else the connection has none any more: we alone keep it open
            self.close()
        self.headers = self.msg = None  # type: ignore[assignment]


class _ConnectionMixin(HTTPConnection):
    response_class = _Message
    stream: Stream | None = None  # whose call it carries

    def _new_conn(self) -> socket.socket:
        try:
            return _dial(self, _call.get().stream)
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"Connecting to {self.host} timed out.") from error
        except OSError as error:
            raise NewConnectionError(self, f"Connecting to {self.host} failed: {error}") from error

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        call = _call.get()
        # A response that closes takes the socket from the connection before we see it.
        call.sock = self.sock
        call.stream.phase = Phase.HEADERS
        return super().getresponse()


class _Connection(_ConnectionMixin):
    pass


class _TLSConnection(_ConnectionMixin, HTTPSConnection):
    pass


def _dial(connection: HTTPConnection, stream: Stream) -> socket.socket:
    """Connects to the first address that answers, unless a stop comes first."""
    stream.phase = Phase.CONNECTING
    stream.check()
    host = connection._dns_host
    addresses = socket.getaddrinfo(host, connection.port, 0, socket.SOCK_STREAM)
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, address in addresses:
        stream.check()
        try:
            return _connected(socket.socket(family, kind, protocol), address, connection, stream)
        except OSError as error:
            stream.check()
            failure = error
            if out_of_descriptors(error):
                break
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

    def _get_conn(self, timeout: float | None = None) -> Any:
        call = _call.get()
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

    def _reused(self, connection: Any, call: _Call) -> Any:
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
        for connections in (self._idle, self._swept):
            with contextlib.suppress(IndexError):
                while True:
                    entry = connections.pop()
                    (entry.connection if isinstance(entry, _Idle) else entry).close()
        super().close()


class _Pool(_PoolMixin):
    ConnectionCls = _Connection


class _TLSPool(_PoolMixin, HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
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


@dataclass(frozen=True)
class _Prepared:
    """What all requests to the provider have in common."""

    template: requests.PreparedRequest
    environment: Mapping[str, Any]

    def request(self, payload: bytes) -> requests.PreparedRequest:
        request = copy.copy(self.template)
        request.headers = self.template.headers.copy()
        request.headers["Content-Length"] = str(len(payload))
        request.body = payload
        return request


def _prepared(url: str, key: str) -> _Prepared:
    """Reads the environment: proxies and certificates, as requests finds them."""
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "User-Agent": "chatstream",
    }
    with requests.Session() as session:
        template = session.prepare_request(
            requests.Request("POST", url, headers=headers, auth=Bearer(key))
        )
        environment = session.merge_environment_settings(url, {}, True, None, None)
    return _Prepared(template, dict(environment))


class Bearer(AuthBase):
    """The key. As an auth object, so that a .netrc cannot replace it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _framing(message: http.client.HTTPResponse) -> Framing:
    if message.status < 200:  # another protocol from here on
        return UntilClose()
    if message.chunked:
        return Chunked()
    return UntilClose() if message.length is None else Length(message.length)


def _read_ahead(message: http.client.HTTPResponse, sock: socket.socket) -> bytes:
    """Takes what http.client's buffer holds beyond the headers, and the buffer, which has 8 KB.

    Does not wait.
    """
    sock.settimeout(0)
    ahead = b""
    with contextlib.suppress(OSError, ValueError):  # a real fault shows again at the next recv
        ahead = message.fp.peek()
    message.fp = message.fp.detach()  # type: ignore[assignment]
    return ahead


def _whole(body: Body) -> bytes:
    """A provider's error body, as far as it is short and prompt."""
    parts: list[bytes] = []
    deadline = monotonic() + _ERROR_PATIENCE
    while sum(map(len, parts)) < _ERROR_BODY:
        part = body.receive(max(0.0, deadline - monotonic()))
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _not_stream(what: str) -> UpstreamError:
    return UpstreamError(f"The provider answered with {what}.", code="upstream_not_stream")


def _broken(error: Exception) -> UpstreamError:
    broken = UpstreamError("The connection to the provider broke.", code="upstream_truncated")
    broken.detail = _shown(error)
    return broken


def _retry_after(value: str | None) -> str | None:
    """The provider's Retry-After where it is one (RFC 9110, 10.2.3): seconds or a date."""
    return value if value and re.fullmatch(r"[0-9]{1,9}|[A-Za-z0-9 ,:]{20,40}", value) else None


def mapped(error: Exception) -> StreamError:
    """requests' exceptions, and those below them, as ours."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    root = _root(error)
    mapped: StreamError
    if out_of_descriptors(root):
        mapped = Busy("This worker has no free descriptor. Please try again.")
    elif isinstance(error, requests.ReadTimeout) and not _has_vanished(root):
        mapped = UpstreamError(
            "The provider did not answer in time.", code="upstream_timeout", status=504
        )
    elif (
        isinstance(error, (requests.ConnectionError, requests.ReadTimeout))
        and not isinstance(error, _NEVER_CONNECTED)
        and not isinstance(inner, (NewConnectionError, ConnectTimeoutError))
    ):
        mapped = UpstreamError(
            "The connection to the provider ended without an answer.", code="upstream_unreachable"
        )
    else:
        mapped = UpstreamError("The provider could not be connected to.", code="upstream_connect")
    mapped.detail = _shown(root)
    return mapped


_NEVER_CONNECTED = (
    requests.ConnectTimeout,
    requests.exceptions.SSLError,
    requests.exceptions.ProxyError,
)


def _has_vanished(error: BaseException) -> bool:
    """Whether it is the kernel that gave up (ETIMEDOUT), and no timeout of ours."""
    return isinstance(error, OSError) and error.errno == errno.ETIMEDOUT


def _root(error: BaseException) -> BaseException:
    """The first cause."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _shown(root: BaseException) -> str:
    """A first cause for the log. Only the system's are spelt out: others may quote a request."""
    shown = isinstance(root, OSError) and not isinstance(root, requests.RequestException)
    return f"{type(root).__name__}: {root}" if shown else type(root).__name__
