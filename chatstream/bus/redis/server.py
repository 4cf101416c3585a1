"""The server, and what it says of itself."""

from __future__ import annotations

import contextlib
import logging
from time import monotonic
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from chatstream.errors import BusUnavailable, ConfigError

log = logging.getLogger("chatstream")


COMMAND_TIMEOUT = 0.4
"""Seconds for one command; `?socket_timeout=` in the address overrides it."""

FAULTS = (redis.RedisError, OSError)


def check(url: str) -> None:
    """Looks at the server, if it is there.

    Raises:
        ConfigError: It cannot be a bus; the message says why.
    """
    try:
        client = connect(url)
        facts = client.info("server")
        mode = facts.get("redis_mode") or facts.get("server_mode") or "standalone"  # Valkey's word
        let_go(client)
    except redis.AuthenticationError:
        raise ConfigError(
            "CHATSTREAM_BUS: the Redis server refused the name or password."
        ) from None
    except redis.ResponseError:
        return  # not a command that this user may use
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        log.warning("[bus] redis cannot be reached yet: %s. It is tried again", error)
        return
    except (redis.RedisError, TypeError, ValueError) as error:
        raise ConfigError(f"CHATSTREAM_BUS has an option that redis-py refuses: {error}") from None
    if mode != "standalone":
        raise ConfigError(
            f"CHATSTREAM_BUS: this server runs as {mode}. Give the address of one ordinary server"
            " (behind a Sentinel: of its master, by a name that follows it)."
        )


class Server(NamedTuple):
    """What a server says of itself.

    Attributes:
        product: Redis or Valkey.
        version: Its own.
        major: The version of Redis that it is compatible with, its first number.
        policy: `maxmemory-policy`; "" where this user may not know it.
        seconds: One round trip.
    """

    product: str
    version: str
    major: int
    policy: str
    seconds: float


def look(url: str) -> Server:
    """Looks at the server, for people.

    Raises:
        ConfigError: It cannot be a bus; the message says why.
        BusUnavailable: It is not there, for its `__cause__`.
    """
    check(url)
    client = connect(url)
    try:
        client.ping()
        begun = monotonic()
        client.ping()
        seconds = monotonic() - begun
        facts = _info(client, "server") | _info(client, "memory")
    except FAULTS as error:
        raise BusUnavailable from error
    finally:
        let_go(client)
    compatible = str(facts.get("redis_version") or "0")
    version = str(facts.get("valkey_version") or compatible)
    product = "Valkey" if facts.get("valkey_version") else "Redis"
    major = int(compatible.partition(".")[0] or 0) if facts else 5
    return Server(product, version, major, str(facts.get("maxmemory_policy") or ""), seconds)


def _info(client: Any, section: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.info(section)
    except redis.ResponseError:  # not a command that this user may use
        return {}
    return found


def connect(url: str, *, connections: int = 1, waiting: float = 0.0) -> Any:
    """A client of the server whose commands fail in time, `waiting` seconds later than others."""
    wanted: dict[str, Any] = {
        "socket_timeout": COMMAND_TIMEOUT,
        "socket_connect_timeout": COMMAND_TIMEOUT,
        "socket_keepalive": True,
        **parse_url(url),
    }
    # Not for an address to choose. And redis-py 8 has a timeout of 5 s that ends idle listeners.
    wanted["socket_timeout"] += waiting
    wanted |= {"protocol": 2, "decode_responses": False, "retry": Retry(NoBackoff(), 0)}
    wanted |= {"max_connections": connections, "timeout": COMMAND_TIMEOUT}
    return redis.Redis(connection_pool=redis.BlockingConnectionPool(**wanted))


def let_go(client: Any) -> None:
    """Closes a client's connections, but for those that have a command of somebody's under way.

    The pool's own method takes these along, and `Redis.close` leaves all to a garbage collection.
    """
    for connection in filter(None, list(client.connection_pool.pool.queue)):
        with contextlib.suppress(Exception):
            connection.disconnect()


def in_words(error: Exception) -> str:
    """The error for the log. Of a refused command only its kind: its text has the arguments."""
    refused = isinstance(error, redis.ResponseError)
    return type(error).__name__ if refused else str(error) or type(error).__name__
