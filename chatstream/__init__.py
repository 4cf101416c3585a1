"""chatstream: relays an LLM provider's answer to the browser as Server-Sent Events, and stops.

The names are fetched when they are first asked for. gunicorn's master imports our workers, and
nothing else may come with them: what a master has imported, a reload does not renew, and gevent has
not patched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatstream.errors import (
        BusUnavailable,
        Busy,
        ChatStreamError,
        ConfigError,
        Refused,
        StreamAborted,
        StreamError,
        Unconfirmed,
        UpstreamError,
    )
    from chatstream.extension import ChatStream
    from chatstream.iterable import StreamIterable
    from chatstream.outcome import Cancelled, Cause, Kind, Outcome, Phase, Started, Usage
    from chatstream.service import Service
    from chatstream.signals import cancel_answered, stream_ended, stream_started
    from chatstream.stream import Stream

__all__ = [
    "BusUnavailable",
    "Busy",
    "Cancelled",
    "Cause",
    "ChatStream",
    "ChatStreamError",
    "ConfigError",
    "Kind",
    "Outcome",
    "Phase",
    "Refused",
    "Service",
    "Started",
    "Stream",
    "StreamAborted",
    "StreamError",
    "StreamIterable",
    "Unconfirmed",
    "UpstreamError",
    "Usage",
    "cancel_answered",
    "stream_ended",
    "stream_started",
]

_ROOMS = ("outcome", "errors", "signals", "stream", "iterable", "service", "extension")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chatstream' has no attribute {name!r}")
    rooms = (import_module(f"chatstream.{room}") for room in _ROOMS)
    value = next(getattr(room, name) for room in rooms if hasattr(room, name))
    globals()[name] = value  # from now on Python finds it by itself
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
