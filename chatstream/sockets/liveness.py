"""Peers that vanish without a word: no FIN, no RST, as when a machine loses power or a NAT forgets.

The kernel notices them if it is asked to, and says ETIMEDOUT. What the options mean is in tcp(7),
what it does in Linux's net/ipv4/tcp_timer.c:

- Nothing in flight (`tcp_keepalive_timer`): after TCP_KEEPIDLE without a segment from the peer it
  is probed every TCP_KEEPINTVL. With TCP_USER_TIMEOUT set, that takes TCP_KEEPCNT's place: the
  connection ends at the first turn that finds the peer silent for so long.
- Data in flight (`tcp_write_timeout`): keepalive rests; the connection ends TCP_USER_TIMEOUT after
  the first retransmission. Without the option that takes tcp_retries2: a quarter of an hour.
- A peer that is there and does not read (`tcp_probe_timer`): its window is probed, each probe is
  acknowledged, and yet since Linux 5.11 the connection ends TCP_USER_TIMEOUT after the first probe
  (measured on 6.18: after 25.3 s with 25 s, 36.3 s with 36 s).

So that option is for a provider, which is only read from. A client that vanishes right after it
acknowledged a ping is sent the next one 15 s later, so ping and timeout add up; and one that is
there and does not read has not vanished. Who watches a client asks the kernel what it has heard
(`has_vanished`): gone is who was asked anything - data, or a probe of either kind - and was silent
for 25 s.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import socket
import struct

KEEPALIVE_IDLE = 15
"""Seconds of silence after which the peer is probed (TCP_KEEPIDLE)."""

KEEPALIVE_INTERVAL = 5
"""Seconds between two probes (TCP_KEEPINTVL)."""

KEEPALIVE_COUNT = 3
"""Unanswered probes, where the kernel has no TCP_USER_TIMEOUT (TCP_KEEPCNT)."""

SILENCE = 25.0
"""Seconds without a segment from a peer that was sent some: it has vanished."""

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT),
)

_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)

_LAST = 60
"""How much of struct tcp_info is asked for: up to tcpi_last_ack_recv (linux/tcp.h)."""


def notice_vanished(
    sock: socket.socket | _socket.socket, user_timeout: float | None = None
) -> list[tuple[int, int, int]]:
    """Has the kernel notice when the peer vanishes. Safe from any thread.

    A socket that is not TCP stays as it is: its peer is on this machine. So does what the kernel
    does not know.

    Args:
        sock: Connected, or going to be: then the timeout bounds the connect, too.
        user_timeout: Seconds of TCP_USER_TIMEOUT, or None: it stays as it is.

    Returns:
        The options as they were, for `restore`.
    """
    before: list[tuple[int, int, int]] = []
    if not _is_inet(sock):
        return before
    options = list(_KEEPALIVE)
    if user_timeout is not None:
        options.append((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout * 1000)))
    for level, option, value in options:
        try:
            old = sock.getsockopt(level, option)
            sock.setsockopt(level, option, value)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
        else:
            before.append((level, option, old))
    return before


def restore(sock: socket.socket | _socket.socket, before: list[tuple[int, int, int]]) -> None:
    """Undoes `notice_vanished`, for who has the socket next. Safe from any thread."""
    with contextlib.suppress(OSError):
        for option in before:
            sock.setsockopt(*option)


def has_vanished(sock: socket.socket | _socket.socket) -> bool:
    """Whether the peer was asked something, and was silent for 25 s. Safe from any thread.

    Whatever a peer that is there does, it acknowledges: data, and in silence the probes that
    `notice_vanished` asks for. Also those of its shut window: not to read is no reason. False where
    the kernel does not tell, as with a socket that is not TCP.
    """
    if not _is_inet(sock):
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST)
    except OSError:
        return False
    if len(info) < _LAST:
        return False
    probes = info[3]  # tcpi_probes: unanswered ones
    (in_flight,) = struct.unpack_from("=I", info, 24)  # tcpi_unacked
    data, acknowledgement = struct.unpack_from("=II", info, 52)  # tcpi_last_data_recv, _ack_recv
    silence = min(data, acknowledgement) / 1000
    return silence >= SILENCE and bool(in_flight or probes)


def _is_inet(sock: socket.socket | _socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6)
