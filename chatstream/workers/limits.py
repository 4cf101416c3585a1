"""How long a client may take for its request, in both of our workers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from chatstream import server
from chatstream.config import Settings

LINGER = 2.0
"""Seconds that a peer has to close a connection that we have closed (RFC 9112, section 9.6)."""


def _refusal(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


TIMED_OUT = _refusal("408 Request Timeout")
LONG_BODY = _refusal("413 Content Too Large")
LONG_HEAD = _refusal("431 Request Header Fields Too Large")


@dataclass(frozen=True)
class Limits:
    """What a client is granted. Seconds and bytes.

    Attributes:
        first: From a connection to its first request's headers.
        kept: From an answer to the first byte of the next request.
        request: From a request's first byte to its last; on other routes than ours to its head, and
            then of silence.
        body: Bytes of a body that a worker collects before a thread has to see it.
    """

    first: float
    kept: float
    request: float
    body: int
    _ours: re.Pattern[bytes]

    @classmethod
    def load(cls) -> Limits:
        """The settings of this process's app; else those of the environment."""
        every = [service.settings for service in server.services()]
        settings = every[0] if every else Settings.load({}, os.environ)
        return cls(
            first=settings.headers_timeout,
            kept=settings.keepalive_timeout,
            request=settings.request_timeout,
            body=max(each.max_body for each in every or [settings]),
            _ours=_pattern(each.url_prefix for each in every or [settings]),
        )

    def ours(self, target: bytes) -> bool:
        """Whether a request's target is one of our routes, wherever they are mounted."""
        return self._ours.match(target) is not None

    def due(self, target: bytes, first_byte: float, now: float) -> float:
        """When a body has to be there, or to go on."""
        return (first_byte if self.ours(target) else now) + self.request


def _pattern(prefixes: Iterable[str]) -> re.Pattern[bytes]:
    prefix = b"|".join(re.escape(prefix.encode()) for prefix in prefixes)
    return re.compile(rb"[^?#]*(?:%b)/(?:stream|cancel(?:/[^?#]*)?)(?:[?#]|$)" % prefix)


def supported(cfg: Any) -> bool:
    """Whether a worker of ours knows the protocols of this configuration.

    HTTP/2, uWSGI's and PROXY's are left to gunicorn, with its own limits.
    """
    protocols = str(getattr(cfg, "http_protocols", ""))
    return cfg.protocol == "http" and "h2" not in protocols and cfg.proxy_protocol in (False, "off")
