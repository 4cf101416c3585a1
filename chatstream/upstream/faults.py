"""What a provider does wrong, as our errors: its refusals, and faults on the way to it.

The one seam at which the exceptions of requests, urllib3 and the system are mapped; `__cause__` is
kept by who raises.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import requests
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from chatstream.errors import Busy, StreamError, UpstreamError, out_of_descriptors

FAULTS = (requests.RequestException, HTTPError, OSError, ValueError)
"""What a provider's faults, and those on the way to it, are raised as."""


def mapped(error: Exception) -> StreamError:
    """requests' exceptions, and those below them, as ours."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    root = _root(error)
    mapped: StreamError
    if out_of_descriptors(root):
        mapped = Busy("This worker has no free descriptor. Please try again.")
    elif isinstance(error, requests.ReadTimeout) and not has_vanished(root):
        mapped = UpstreamError(
            "The provider did not answer in time.", code="upstream_timeout", status=504
        )
    elif (
        isinstance(error, (requests.ConnectionError, requests.ReadTimeout))
        and not isinstance(error, _NEVER_CONNECTED)
        and not isinstance(inner, (NewConnectionError, ConnectTimeoutError))
    ):
        mapped = UpstreamError(
            "The connection to the provider ended without an answer.", code="upstream_unreachable"
        )
    else:
        mapped = UpstreamError("The provider could not be connected to.", code="upstream_connect")
    mapped.detail = _shown(root)
    return mapped


_NEVER_CONNECTED = (
    requests.ConnectTimeout,
    requests.exceptions.SSLError,
    requests.exceptions.ProxyError,
)


def refused(
    status: int, retry_after: str | None, message: Callable[[], str]
) -> UpstreamError | None:
    """A provider's refusal, by its status; None if that is none.

    Args:
        status: The provider's.
        retry_after: Its Retry-After header.
        message: Its own sentence, "" for none; asked for only where a client may see it.
    """
    if status in (401, 403):
        return UpstreamError(
            "The provider did not accept this service's key.", code="upstream_auth"
        )
    if status == 429:
        return UpstreamError(
            "The provider is limiting this service's rate. Please try again later.",
            code="upstream_rate_limited",
            status=429,
            retry_after=_retry_after(retry_after),
        )
    if status == 407:
        return UpstreamError("The proxy wants a password.", code="upstream_connect")
    if 400 <= status < 500:
        return UpstreamError(
            message() or f"The provider rejected the request ({status}).",
            code="upstream_rejected",
            status=400,
        )
    return UpstreamError(f"The provider failed ({status}).") if status >= 500 else None


def _retry_after(value: str | None) -> str | None:
    """The provider's Retry-After where it is one (RFC 9110, 10.2.3): seconds or a date."""
    return value if value and re.fullmatch(r"[0-9]{1,9}|[A-Za-z0-9 ,:]{20,40}", value) else None


def broken(error: Exception) -> UpstreamError:
    """A connection that broke inside an answer."""
    mapped = UpstreamError("The connection to the provider broke.", code="upstream_truncated")
    mapped.detail = _shown(error)
    return mapped


def has_vanished(error: BaseException) -> bool:
    """Whether it is the kernel that gave up (ETIMEDOUT), and no timeout of ours."""
    return isinstance(error, OSError) and error.errno == errno.ETIMEDOUT


def _root(error: BaseException) -> BaseException:
    """The first cause."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _shown(root: BaseException) -> str:
    """A first cause for the log. Only the system's are spelt out: others may quote a request."""
    shown = isinstance(root, OSError) and not isinstance(root, requests.RequestException)
    return f"{type(root).__name__}: {root}" if shown else type(root).__name__
