"""Where gunicorn's parser gets a request from."""

from __future__ import annotations

import contextlib
import socket
import ssl

from gunicorn.http.unreader import SocketUnreader

from chatstream.errors import RequestTimeout
from chatstream.workers.limits import TIMED_OUT

NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Unreader(SocketUnreader):  # type: ignore[misc]
    """Where gunicorn's parser gets a request from. In a thread.

    What has arrived is in its buffer; the socket is asked for the rest of a long body only.

    Attributes:
        patience: Seconds that the client may send nothing; 0: only what is there.
    """

    patience = 0.0

    def chunk(self, size_hint: int | None = None) -> bytes:
        """More of a body.

        Raises:
            RequestTimeout: It did not go on; the client was told.
            TimeoutError: Nothing is there.
        """
        self.sock.settimeout(self.patience)
        try:
            return bytes(super().chunk(size_hint))
        except (TimeoutError, *NOT_YET):
            if not self.patience:
                raise TimeoutError from None
            self._refuse()
            raise RequestTimeout from None
        finally:
            self.sock.settimeout(None)

    def _refuse(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.settimeout(0.0)  # who does not read its answers is not told
            self.sock.send(TIMED_OUT)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)  # the app's own answer would come second
