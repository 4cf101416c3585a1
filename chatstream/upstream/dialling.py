"""Dialling the provider, so that a stop reaches every phase of it."""

from __future__ import annotations

import errno
import http.client
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util import wait_for_write

from chatstream.errors import out_of_descriptors
from chatstream.sockets import liveness
from chatstream.stream.outcome import Phase
from chatstream.stream.stream import Stream

UNREAD = 256 * 1024
"""Bytes of the provider's that may wait in the kernel for a client that does not read.

Half of it is asked for; Linux doubles that (socket(7)). Left alone, the buffer grows to tcp_rmem's
megabytes, all of them paid for.
"""

USER_TIMEOUT = 30.0
"""Seconds until the kernel gives a silent provider up; see `chatstream.sockets.liveness`."""


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


class Connection(_ConnectionMixin):
    socket.socket().close()


class TLSConnection(_ConnectionMixin, HTTPSConnection):
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
