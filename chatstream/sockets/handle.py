"""SocketHandle: a second descriptor of a socket, with which any thread can shut it down."""

from __future__ import annotations

import _socket
import contextlib
import os
import socket


class SocketHandle:
    """A second descriptor of a socket, with which another thread can shut the connection down.

    Made before `connect()`, it reaches every phase. While it is open, closing the socket itself
    sends no FIN: whoever takes the handle from its stream has to shut down or close it.
    """

    def __init__(self, sock: socket.socket) -> None:
        # The C class: gevent's own would need the hub, and this one is used by native threads.
        self._sock = _socket.socket(fileno=os.dup(sock.fileno()))

    def shutdown(self) -> None:
        """Ends the connection now, both ways, and closes the handle. Never blocks."""
        # ENOTCONN: not connected yet, or no longer. A thread that is dialling looks again.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def close(self) -> None:
        """Closes the handle and leaves the connection as it is."""
        self._sock.close()
