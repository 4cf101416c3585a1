"""How the workers of a service find each other's streams. Knows neither streams nor HTTP.

`local` for one process, `unix` for the workers of one host, `redis` for many hosts. They are one
interface, `Bus` in `base`, and pass one suite of tests. `messages` is what crosses a process
boundary, drawn; `places` counts what an owner has in one process. Chosen by URL, here.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from chatstream.bus.base import Bus, Lives, Receive
from chatstream.bus.local import LocalBus
from chatstream.bus.unix.directory import (
    check_base,
    default_base,
    gunicorn_service,
    living,
    service_directory,
)
from chatstream.bus.unix.unix_bus import UnixBus
from chatstream.bus.unix.visitor import UnixVisitor
from chatstream.errors import ConfigError
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop

log = logging.getLogger("chatstream")


def check(settings: Settings) -> None:
    """Looks, at start-up, whether the bus of the settings can work.

    A Redis that is not there yet is no fault: it may come.

    Raises:
        ConfigError: It cannot; the message says what to set.
    """
    bus = settings.bus or ""
    if bus.startswith("unix") or (not bus and gunicorn_service()):
        check_base(_base(bus))
    elif bus.startswith("redis"):
        try:
            from chatstream.bus.redis.server import check as check_redis
        except ImportError:
            raise ConfigError(
                "CHATSTREAM_BUS=redis:// needs redis-py: pip install 'chatstream[redis]'"
            ) from None
        check_redis(bus)


def create(
    settings: Settings, receive: Receive, loop: Loop, app: str = "0", lives: Lives | None = None
) -> Bus:
    """The bus of the settings, for this process. Under gunicorn `unix` is the default.

    Args:
        settings: The app's.
        receive: See `Bus`.
        loop: The process's, for a bus that is read in it.
        app: Which app of the process; the same in all of a service's processes.
        lives: See `Bus`.
    """
    bus = settings.bus or ("unix" if gunicorn_service() else "local")
    if bus.startswith("redis"):
        from chatstream.bus.redis.redis_bus import RedisBus

        prefix, ttl = settings.bus_prefix, settings.bus_ttl
        return RedisBus(receive, bus, prefix=prefix, ttl=ttl, lives=lives)
    if bus == "unix" and gunicorn_service() is None:
        log.warning(
            "CHATSTREAM_BUS=unix finds a service by gunicorn's listening socket, and this is not"
            " gunicorn: `local` is used. Set CHATSTREAM_BUS=unix:///a/directory for workers of"
            " another server."
        )
        bus = "local"
    if bus == "local":
        return LocalBus(receive, lives)
    # A directory of one's own is a service of its own; else there is one for each gunicorn.
    service = (gunicorn_service() if bus == "unix" else None) or "service"
    return UnixBus(receive, loop, service_directory(_base(bus), service, app), lives)


def visit(settings: Settings, app: str) -> list[Bus]:
    """Buses of an app's services, for a process that is no worker of them. Started; close them.

    With `unix`, also as a default, one for each gunicorn of this host, user and app. Not in a
    process that is a worker: what it closes would take its own locks along.

    Args:
        settings: The app's.
        app: Which app.

    Raises:
        OSError: A directory cannot be looked into.
    """
    bus = settings.bus or "unix"
    if bus == "local":
        return []
    visitors: list[Bus] = []
    if bus.startswith("redis"):
        from chatstream.bus.redis.visitor import RedisVisitor

        visitors.append(RedisVisitor(bus, prefix=settings.bus_prefix))
    else:
        visitors += [UnixVisitor(path) for path in living(_base(bus), app)]
    with contextlib.ExitStack() as undo:
        for visitor in visitors:
            undo.callback(visitor.close)
            visitor.start()
        undo.pop_all()
    return visitors


def _base(bus: str) -> Path:
    path = bus.removeprefix("unix").removeprefix("://")
    return Path(path) if path else default_base()
