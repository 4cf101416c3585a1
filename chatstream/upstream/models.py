"""The provider's list of models."""

from __future__ import annotations

from chatstream.dialects.openai_chat import COMPLETIONS, sentence, sibling
from chatstream.errors import Refused, UpstreamError
from chatstream.settings.table import Settings
from chatstream.upstream.faults import refused
from chatstream.upstream.fetch import fetch


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
            f" end in {COMPLETIONS}.",
            code="no_models",
            status=404,
        )
    key = settings.api_key
    got = fetch(url, key=key, connect=settings.upstream_connect_timeout)
    refusal = refused(got.status, got.retry_after, lambda: sentence(got.body, key))
    if refusal is not None:
        raise refusal
    kind = got.content_type.partition(";")[0].strip().lower()
    if got.status != 200 or kind != "application/json":
        raise UpstreamError("The provider answered with no list.", code="upstream_not_json")
    return got.body
