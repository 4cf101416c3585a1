"""openai_replies: which faults OpenAI's clients had better not repeat."""

from __future__ import annotations

import responses

from chatstream.errors import UpstreamError
from chatstream.web import openai_replies
from chatstream.web.openapi import refusals
from tests.web.chat import URL
from tests.web.openai import MakeDrop


def test_what_would_be_asked_in_vain_is_not_repeated(
    drop: MakeDrop, provider: responses.RequestsMock
) -> None:
    """OpenAI's clients repeat a 5xx unless a header tells them not to."""
    us = drop()
    for answer, again in (({"status": 401}, "false"), ({"status": 500}, None)):
        provider.reset()
        provider.post(URL, **answer)
        assert us.post().headers.get("X-Should-Retry") == again


IN_VAIN = {
    "deadline",
    "upstream_auth",
    "upstream_not_stream",
    "upstream_not_json",
    "event_too_large",
    "answer_too_large",
}
"""Which faults these are, as docs/openai.md has it."""


def test_which_faults_are_in_vain(drop: MakeDrop) -> None:
    """Of all that the routes know; the others may be gone when the client asks again."""
    codes = {code for _, known in refusals.OPENAI_BEFORE.values() for code in known}
    with drop().app.test_request_context():
        told = {code: openai_replies.refuse(UpstreamError("", code=code)).headers for code in codes}
    assert {code for code in codes if told[code].get("X-Should-Retry") == "false"} == IN_VAIN
