"""replies: the shape of refusals, which is ours whatever the app has."""

from __future__ import annotations

import flask
import responses
from werkzeug.exceptions import HTTPException

from tests.web.chat import (
    MESSAGES,
    URL,
    MakeChat,
    assert_not_found,
    assert_refused,
    body_of,
)


def test_the_404_is_the_same_for_finished_and_unknown(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """Whether a stream has been is not to be learned."""
    c = chat()
    c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    found = [c.cancel(path) for path in ("/s-1", "/s-1?streamId=t-1", "/x", "/x?streamId=y")]
    assert len({(r.status, r.data, str(r.headers)) for r in found}) == 1
    assert_not_found(found[0])


def test_a_hosts_error_pages_do_not_replace_refusals(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """With the app's errorhandler(HTTPException) each of our refusals is still ours."""
    app = flask.Flask("host")
    app.register_error_handler(HTTPException, lambda error: ("<h1>html</h1>", error.code))
    app.register_error_handler(Exception, lambda error: ("<h1>html</h1>", 500))
    provider.post(URL, status=429)
    c = chat(app, MAX_BODY="500", identify=lambda: "me")
    assert_refused(c.send(b"{"), 400, "bad_json")
    assert_refused(c.send(body_of(501)), 413, "too_large")
    assert_refused(c.send(b"{}", "text/plain"), 415, "unsupported_media_type")
    assert_refused(c.post(), 429, "upstream_rate_limited")
    assert_not_found(c.cancel("/x"))
    assert_not_found(c.cancel("//x"))
    assert c.client.get("/elsewhere").data == b"<h1>html</h1>"
