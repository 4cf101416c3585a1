"""The two sides of a stream, as it sees them: the provider's answer, the client, the server."""

from __future__ import annotations

import abc
import socket
from collections.abc import Callable
from typing import Protocol


class Exchange(Protocol):
    """A request and its response, as the server has them.

    Attributes:
        sock: The client's socket. It does not block.
        trailer: Bytes that `frame` has behind the data, once the response has begun.
    """

    sock: socket.socket

    @property
    def trailer(self) -> int: ...

    def begin(self, data: bytes) -> bytes:
        """The response's first bytes as they are sent: the head, and `data` framed."""

    def frame(self, data: bytes) -> bytes:
        """More of the body as it is sent. Not b""."""

    def end(self) -> bytes:
        """What is sent at the response's end."""

    def fail(self, error: Exception) -> None:
        """The response could not begin: `begin`, or what comes before it, raised. In a thread."""

    def run(self, callback: Callable[[], object]) -> None:
        """Runs it in a thread of the server's."""

    def over(self, whole: bool) -> None:
        """Nothing more is sent. Whether all was: then the connection can go on."""


class Detachable(abc.ABC):
    """A WSGI response's iterable that need not be walked."""

    @abc.abstractmethod
    def detach(self, exchange: Exchange) -> bool:
        """Has the loop move the stream. In the place of the first `next`.

        Returns:
            Whether it does: then `close` is for when the exchange is over. Else the iterable is to
            be walked.
        """


class Client(Protocol):
    """The client's socket, as the loop watches it."""

    def expect_end(self, patience: float) -> None: ...
    def stalled(self, timeout: float) -> bool: ...
    def vanished(self) -> bool: ...
    def shutdown(self) -> None: ...
    def release(self) -> None: ...


class Body(Protocol):
    """The provider's answer, once its headers are in. Owner thread only.

    Attributes:
        more: Whether `receive_now` is to be called again, though the socket may show nothing: of
            TLS there may be bytes left, or the end is known already.
    """

    more: bool

    def receive(self, timeout: float) -> bytes:
        """The next bytes; b"" at the body's end. Raises TimeoutError or UpstreamError."""

    def detach(self) -> int:
        """From now on nothing waits. Returns the socket's descriptor, -1 if there is none."""

    def receive_now(self) -> bytes | None:
        """As `receive`, but None when nothing is there. After `detach`. Raises UpstreamError."""

    def drain(self, timeout: float) -> None:
        """Reads to the end if that takes no longer, so that the connection is reused; closes."""

    def close(self) -> None: ...
