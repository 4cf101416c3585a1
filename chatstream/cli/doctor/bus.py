"""What doctor says of the bus: whether the workers will find each other's streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from chatstream import bus
from chatstream.bus.base import Bus
from chatstream.bus.unix.directory import check_base, check_writable, default_base
from chatstream.cli.doctor.check import Check, State
from chatstream.errors import BusUnavailable, ConfigError
from chatstream.settings.table import Settings


def check_bus(settings: Settings, app: str, workers: int | None) -> Iterator[Check]:
    """The bus of the settings, and who is on it.

    Args:
        settings: The app's.
        app: Its name on the bus.
        workers: gunicorn's; None where there is no gunicorn to be seen.
    """
    kind = settings.bus or ("local" if workers is None else "unix")
    if kind == "local":
        yield _check_local(settings, workers)
        return
    if kind == "unix" and workers is None:
        yield Check(
            "bus",
            State.NOTE,
            "CHATSTREAM_BUS=unix finds a service by gunicorn's socket. Under another server set"
            " unix:///a/directory, or it is `local`.",
        )
    yield (check := _check_redis(settings) if kind.startswith("redis") else _check_unix(kind))
    if check.state is not State.FAIL:
        yield from _check_others(settings, app)


def _check_local(settings: Settings, workers: int | None) -> Check:
    if workers is not None and workers > 1:
        return Check(
            "bus",
            State.WARN,
            f"It is local, and there are {workers} workers: a cancel stops a stream only if it"
            " reaches the same one. Leave CHATSTREAM_BUS out, or set redis:// for many hosts.",
        )
    said = "" if settings.bus or workers else " (under gunicorn it would be unix)"
    return Check("bus", State.OK, f"local{said}: for a single process.")


def _check_unix(kind: str) -> Check:
    path = kind.removeprefix("unix").removeprefix("://")
    base = Path(path) if path else default_base()
    try:
        check_base(base)
        check_writable(base)
    except (ConfigError, OSError) as error:
        return Check("bus", State.FAIL, f"{error}. The workers' user needs to write there.")
    return Check("bus", State.OK, f"unix, below {base}: for the workers of this host.")


def _check_redis(settings: Settings) -> Check:
    try:
        from chatstream.bus.redis.server import look
    except ImportError:
        return Check("bus", State.FAIL, "redis:// needs redis-py: pip install 'chatstream[redis]'")
    try:
        server = look(settings.bus or "")
    except ConfigError as error:
        return Check("bus", State.FAIL, str(error))
    except BusUnavailable as error:
        cause = error.__cause__ or error
        return Check("bus", State.FAIL, f"Redis cannot be reached: {cause}. See CHATSTREAM_BUS.")
    says = f"{server.product} {server.version} answers in {server.seconds * 1000:.1f} ms"
    if server.major < 5:
        return Check("bus", State.FAIL, f"{says}: it has no streams. Use Redis 5 or newer.")
    if server.policy not in ("", "noeviction"):
        return Check(
            "bus",
            State.WARN,
            f"{says}; its maxmemory-policy is {server.policy}, which may take away what the workers"
            " know of each other. Set noeviction.",
        )
    return Check("bus", State.OK, f"{says}, prefix {settings.bus_prefix!r}.")


def _check_others(settings: Settings, app: str) -> Iterator[Check]:
    """Who is running now."""
    try:
        with contextlib.ExitStack() as stack:
            visitors: list[Bus] = bus.visit(settings, app)
            for visitor in visitors:
                stack.callback(visitor.close)
            found = [each for visitor in visitors for each in visitor.list().workers]
    except (BusUnavailable, OSError) as error:
        yield Check("workers", State.WARN, f"Who is running cannot be found out: {error}")
        return
    streams = sum(len(each.streams) for each in found)
    silent = [str(each.worker.pid) for each in found if not each.answered]
    if silent:
        yield Check(
            "workers",
            State.WARN,
            f"These do not answer: {', '.join(silent)}. They hang, or are of an older release.",
        )
    says = f"{len(found)} run, with {streams} streams." if found else "None of this app runs now."
    yield Check("workers", State.OK if found else State.NOTE, says)
