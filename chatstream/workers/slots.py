"""How many streams a process can hold. Pure: no I/O but the question for the limit."""

from __future__ import annotations

import resource
from typing import NamedTuple

UNKNOWN = 3
"""Slots where neither CHATSTREAM_MAX_STREAMS is set nor the server's threads are known."""

MOST = 10_000
"""Slots that are not asked for: what one core can move (docs/scale.md)."""

_OF_A_STREAM = 5
"""Descriptors while its provider is called; four later: two sockets, each with a second one."""

_OF_OTHERS = 256
"""Descriptors for all else: listeners, logs, the bus, clients that do not stream."""

_FOR_CANCELS = 32
"""Connections of a worker that carry no stream."""


class Slots(NamedTuple):
    """Stream slots of a process.

    Attributes:
        all: Streams at a time.
        walked: Of these, streams that keep a thread of the server's.
    """

    all: int
    walked: int


def of_threads(threads: int) -> int:
    """Streams that may keep one of so many threads each; the others are for cancels."""
    return max(1, threads - max(4, threads // 8))


def of_whole_requests(threads: int) -> int:
    """The same where a thread gets a request that is there already, so that few do for cancels."""
    return max(1, threads - max(1, threads // 8))


def of_connections(connections: int) -> int:
    """Streams among so many connections, of which none needs a thread."""
    return max(1, connections - _FOR_CANCELS)


def of_descriptors(limit: int) -> int:
    """Streams for which so many descriptors are enough."""
    return max(1, (limit - _OF_OTHERS) // _OF_A_STREAM)


def limit() -> int:
    """Descriptors that this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def detached(
    connections: int, walked: int, wanted: int | None = None, descriptors: int | None = None
) -> Slots:
    """Where the loop moves the streams, but for those that it cannot.

    Args:
        connections: That the worker takes.
        walked: How many may keep a thread.
        wanted: What was asked for.
        descriptors: That a process may have; None for what this one may.
    """
    enough = of_descriptors(descriptors or limit())
    slots = wanted or min(MOST, enough, of_connections(connections))
    return Slots(slots, min(slots, walked))


def of_server(
    threads: int,
    connections: int,
    *,
    greenlets: bool,
    detaches: bool,
    wanted: int | None = None,
    descriptors: int | None = None,
) -> Slots:
    """Those of a gunicorn worker.

    Args:
        threads: Of a gthread worker.
        connections: `worker_connections`.
        greenlets: Whether it is one of gevent's.
        detaches: Whether the loop moves the streams.
        wanted: What was asked for.
        descriptors: That a process may have; None for what this one may.
    """
    known = of_connections(connections) if greenlets else of_threads(threads)
    if detaches and not greenlets:
        return detached(connections, known, wanted, descriptors)
    return Slots(wanted or known, wanted or known)


def too_many(wanted: int) -> str:
    """A sentence, where so many streams need more descriptors than there are; else "" ."""
    most, needed = of_descriptors(limit()), wanted * _OF_A_STREAM + _OF_OTHERS
    if wanted <= most:
        return ""
    return (
        f"CHATSTREAM_MAX_STREAMS={wanted} needs {needed} descriptors, and a process may have"
        f" {limit()} here. Set it to at most {most}, or raise the limit: ulimit -n, LimitNOFILE= in"
        " systemd, --ulimit nofile= in Docker."
    )
