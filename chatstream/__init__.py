"""chatstream: relays an LLM provider's answer to the browser as Server-Sent Events, and stops.

The names are fetched when they are first asked for. gunicorn's master imports our workers, and
nothing else may come with them: what a master has imported, a reload does not renew, and gevent has
not patched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatstream.dialects.base import Usage
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
    from chatstream.service.service import Service
    from chatstream.stream.iterable import StreamIterable
    from chatstream.stream.outcome import Cancelled, Cause, Kind, Outcome, Phase, Started
    from chatstream.stream.stream import Stream
    from chatstream.telemetry.signals import cancel_answered, stream_ended, stream_started
    from chatstream.web.extension import ChatStream


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

_ROOMS = {
    "errors": (
        *("BusUnavailable", "Busy", "ChatStreamError", "ConfigError", "Refused", "StreamAborted"),
        *("StreamError", "Unconfirmed", "UpstreamError"),
    ),
    "stream.outcome": ("Cancelled", "Cause", "Kind", "Outcome", "Phase", "Started"),
    "dialects.base": ("Usage",),
    "stream.stream": ("Stream",),
    "stream.iterable": ("StreamIterable",),
    "telemetry.signals": ("cancel_answered", "stream_ended", "stream_started"),
    "service.service": ("Service",),
    "web.extension": ("ChatStream",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chatstream' has no attribute {name!r}")
    value = getattr(import_module(f"chatstream.{_HOME[name]}"), name)
    globals()[name] = value  # from now on Python finds it by itself
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
