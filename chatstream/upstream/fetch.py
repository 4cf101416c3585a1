"""What is asked of the provider beside streams: its list of models, the built-in one's figures.

Small, prompt answers, each over a connection of its own. For what costs tokens there is `upstream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from urllib.parse import urlsplit, urlunsplit

import requests

from chatstream.errors import UpstreamError
from chatstream.upstream.faults import FAULTS, broken, mapped
from chatstream.upstream.provider import Bearer

LIMIT = 1024 * 1024
"""Longest answer, in bytes."""


@dataclass(frozen=True)
class Fetched:
    """An answer, whatever its status."""

    status: int
    content_type: str
    body: bytes
    retry_after: str | None = None


def fetch(url: str, *, key: str = "", connect: float = 5.0, timeout: float = 10.0) -> Fetched:
    """GETs `url`. Follows no redirect. Blocks for `connect` + `timeout` seconds, and a wait more.

    Only a provider whose headers come in drops can hold it longer. Safe from any thread.

    Args:
        url: What is asked for.
        key: The provider's; "" sends none.
        connect: Seconds for connecting to one address.
        timeout: Seconds for the answer; also the longest silence in it.

    Raises:
        UpstreamError: It was not reached, is late, broke off or says too much.
    """
    deadline = monotonic() + connect + timeout
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    headers["User-Agent"] = "chatstream"
    try:
        response = requests.get(
            url,
            headers=headers,
            auth=Bearer(key),
            timeout=(connect, timeout),
            allow_redirects=False,
            stream=True,
        )
    except FAULTS as error:
        raise mapped(error) from error
    with response:
        said = response.headers
        return Fetched(
            response.status_code,
            said.get("Content-Type", ""),
            _whole(response, deadline),
            said.get("Retry-After"),
        )


def _whole(response: requests.Response, deadline: float) -> bytes:
    """The body. Takes what is there: a read of so many bytes would wait for the last of them."""
    body = bytearray()
    try:
        while piece := response.raw.read1(65536, decode_content=True):
            body += piece
            if len(body) > LIMIT or monotonic() > deadline:
                raise UpstreamError(
                    "The provider's answer is too long, or took too long.",
                    code="upstream_timeout",
                    status=504,
                )
    except FAULTS as error:
        raise broken(error) from error
    return bytes(body)


def at_origin(upstream_url: str, path: str) -> str:
    """The address of `path` on the provider's host."""
    parts = urlsplit(upstream_url)
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))
