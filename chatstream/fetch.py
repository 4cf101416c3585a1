"""What is asked of the provider beside streams: its list of models, the built-in one's figures.

Small, prompt answers, each over a connection of its own. For what costs tokens there is `upstream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from urllib.parse import urlsplit, urlunsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from chatstream.config import Settings
from chatstream.errors import Refused, UpstreamError
from chatstream.faults import mapped, refused, sentence
from chatstream.upstream import Bearer

LIMIT = 1024 * 1024
"""Longest answer, in bytes."""

_COMPLETIONS = "/chat/completions"


@dataclass(frozen=True)
class Fetched:
    """An answer, whatever its status."""

    status: int
    content_type: str
    body: bytes
    retry_after: str | None = None


def fetch(url: str, *, key: str = "", connect: float = 5.0, timeout: float = 10.0) -> Fetched:
    """GETs `url`. Follows no redirect. Blocks for up to `connect` + `timeout` seconds, and a read.

    That is once the headers are in: each line of them may take `timeout`. Safe from any thread.

    Args:
        url: What is asked for.
        key: The provider's; "" sends none.
        connect: Seconds for connecting to one address.
        timeout: Seconds for the answer.

    Raises:
        UpstreamError: It was not reached, is late, broke off or says too much.
    """
    deadline = monotonic() + connect + timeout
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    headers["User-Agent"] = "chatstream"
    try:
        with requests.get(
            url,
            headers=headers,
            auth=Bearer(key),
            timeout=(connect, timeout),
            allow_redirects=False,
            stream=True,
        ) as response:
            body = _gathered(response, deadline)
    except (requests.RequestException, OSError, ValueError) as error:
        raise mapped(error) from error
    said = response.headers
    return Fetched(
        response.status_code,
        said.get("Content-Type", ""),
        body,
        said.get("Retry-After"),
    )


def _gathered(response: requests.Response, deadline: float) -> bytes:
    """The body, as it comes: requests' `iter_content` waits until a piece of a known length is
    whole, and a byte now and then would put every timeout off.
    """
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
    except ReadTimeoutError as error:
        raise requests.ReadTimeout from error
    except HTTPError as error:
        raise requests.ConnectionError from error
    return bytes(body)


def models(settings: Settings) -> bytes:
    """The provider's list of models, the JSON that it gives. Blocks as `fetch` does.

    Raises:
        Refused: Its address is not known.
        UpstreamError: It is not to be had.
    """
    url = sibling(settings.upstream_url, "/models")
    if url is None:
        raise Refused(
            "Where this provider lists its models is not known: CHATSTREAM_UPSTREAM_URL does not"
            f" end in {_COMPLETIONS}.",
            code="no_models",
            status=404,
        )
    key = settings.api_key
    got = fetch(url, key=key, connect=settings.upstream_connect_timeout)
    refusal = refused(got.status, got.retry_after, lambda: sentence(got.body, key))
    if refusal is not None:
        raise refusal
    if got.status != 200 or got.content_type.partition(";")[0].strip() != "application/json":
        raise UpstreamError("The provider answered with no list.", code="upstream_not_json")
    return got.body


def sibling(upstream_url: str, path: str) -> str | None:
    """The address of another route of OpenAI's API, such as `/models`.

    None where the chat's address is not one that ends as OpenAI's does.
    """
    parts = urlsplit(upstream_url)
    base, found, rest = parts.path.rpartition(_COMPLETIONS)
    if not found or rest:
        return None
    return urlunsplit((parts.scheme, parts.netloc, base + path, "", ""))


def at_origin(upstream_url: str, path: str) -> str:
    """The address of `path` on the provider's host."""
    parts = urlsplit(upstream_url)
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))
