"""Faults on the way to the provider, as our errors: requests', urllib3's and the system's.

The one seam at which they are mapped; `__cause__` is kept by who raises.
"""

from __future__ import annotations

import errno

import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from chatstream.errors import Busy, StreamError, UpstreamError, out_of_descriptors


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
