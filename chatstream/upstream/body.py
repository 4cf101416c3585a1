"""The provider's answer, read from its socket once the headers are in.

Ours and not urllib3's, since it has to leave room for pings: it waits for as long as it is told,
or not at all, and says which.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
from time import monotonic, sleep
from typing import TYPE_CHECKING

import urllib3
from urllib3.exceptions import HTTPError

from chatstream.errors import UpstreamError
from chatstream.sockets import native
from chatstream.sockets.framing import BadFraming, Chunked, Framing, Length, UntilClose
from chatstream.stream.stream import Stream
from chatstream.upstream.faults import broken, has_vanished

if TYPE_CHECKING:
    import requests


_NO_HEADERS = urllib3.HTTPHeaderDict()

_NOT_NOW = (TimeoutError, BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_TORN = (OSError, ValueError, AttributeError)
"""ValueError and AttributeError: a TLS object that was torn down under the read."""

_TURN = 0.01
"""Seconds that a greenlet may run before the others have a turn, though it need not wait."""

_CHUNK = 64 * 1024


class SocketBody:
    """The body of a streaming response, read from its socket. Owner thread only.

    A `Body` (see `chatstream.stream.sides`). http.client has read the headers; what it has read
    beyond them comes first.
    """

    def __init__(
        self,
        response: requests.Response,
        message: http.client.HTTPResponse,
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
            if has_vanished(error):
                raise broken(error) from error
            return None
        except _TORN as error:
            raise broken(error) from error
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
        self._message.headers = self._message.msg = None  # type: ignore[assignment]
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
            if has_vanished(error):
                raise broken(error) from error
            raise TimeoutError from None
        except _TORN as error:
            raise broken(error) from error

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
            raise broken(error) from error
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
