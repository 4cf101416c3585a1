"""chatstream: relays an LLM provider's answer to the browser as Server-Sent Events, and stops."""

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
from chatstream.extension import ChatStream, Service
from chatstream.outcome import Cause, Kind, Outcome, Phase
from chatstream.stream import Stream, StreamIterable

__all__ = [
    "BusUnavailable",
    "Busy",
    "Cause",
    "ChatStream",
    "ChatStreamError",
    "ConfigError",
    "Kind",
    "Outcome",
    "Phase",
    "Refused",
    "Service",
    "Stream",
    "StreamAborted",
    "StreamError",
    "StreamIterable",
    "Unconfirmed",
    "UpstreamError",
]
