"""Lookout: looks at all clients, for those that have vanished or take no bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from chatstream.sockets import native
from chatstream.sockets.loop import Loop
from chatstream.stream.outcome import Cause
from chatstream.stream.stream import Stream

LOOK = 7.5
"""Seconds between two looks at all clients: so much late is it noticed that one has vanished.

A quarter of the send timeout, where that is less: so much late it is noticed that one has stalled.
"""

LOOKS = 100
"""Clients that are looked at in one turn of the loop: about a millisecond."""


class Lookout:
    """Ends the streams whose clients have vanished or take no bytes, in the loop's thread.

    Also those that have an end already, and only have to be sent. Safe from any thread.
    """

    def __init__(self, loop: Loop, held: Callable[[], list[Stream]]) -> None:
        """
        Args:
            loop: Who looks.
            held: The streams that have a slot.
        """
        self._loop = loop
        self._held = held
        self._lock = native.allocate_lock()  # guards the one below
        self._pid = 0  # the process whose clients are looked at
        self._timeout = 0.0

    def begin(self, timeout: float) -> None:
        """Looks again and again from now on, until `stop`. Once per process; idempotent.

        Args:
            timeout: Seconds that a client may take no bytes.
        """
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            self._pid, self._timeout = os.getpid(), timeout
        self._look()

    def stop(self) -> None:
        """The look that may be under way is the last."""
        self._pid = 0

    def _look(self) -> None:
        self._look_at(self._held())

    def _look_at(self, streams: list[Stream]) -> None:
        """Looks at some of these; the others have their turn after what the loop has to do."""
        some, others = streams[:LOOKS], streams[LOOKS:]
        try:
            for stream in some:
                _look_at(stream, self._timeout)
        finally:  # a client that cannot be looked at hides no other for ever
            if self._pid == os.getpid():  # else stopped meanwhile: that would begin a new loop
                if others:
                    self._loop.call_soon(partial(self._look_at, others))
                else:
                    self._loop.call_later(min(LOOK, self._timeout / 4), self._look)


def _look_at(stream: Stream, timeout: float) -> None:
    client = stream.client
    if client is None or stream.unattended:
        return
    cause = Cause.CLIENT if client.vanished() else Cause.STALLED
    if cause is Cause.CLIENT or client.stalled(timeout):
        stream.client_gone(cause)
        client.shutdown()
