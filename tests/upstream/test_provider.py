"""provider: the request, and the judgement of what is answered. Against scripted servers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import responses

from chatstream.errors import UpstreamError
from chatstream.stream.forms import EventStream
from chatstream.stream.stream import Stream
from tests.upstream.peer import (
    DONE,
    EVENT,
    JSON,
    KEY,
    PAYLOAD,
    REJECTED,
    SSE,
    WHOLE,
    MakeProvider,
    MakeUpstream,
    ReachedBy,
    always_says,
    answer,
    refused,
    says,
    whole_call,
)

# The request


def test_what_the_provider_is_sent(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """The payload byte for byte, the key, and nothing that would encode or hold back the answer."""
    there = provider(says(WHOLE))
    whole_call(upstream(there.url))
    [request] = there.requests
    assert request.line == "POST /v1/chat HTTP/1.1"
    assert request.body == PAYLOAD
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers


@pytest.mark.parametrize("key", [KEY, ""])
def test_a_stream_may_have_headers_of_its_own(
    provider: MakeProvider, upstream: MakeUpstream, key: str
) -> None:
    """They are this call's only, and none of them takes the place of one of ours."""
    there = provider(always_says(WHOLE))
    us = upstream(there.url, api_key=key)
    stream = EventStream("s", "t")
    ours = {
        "AUTHORIZATION": "Bearer evil",
        "Content-Type": "text/evil",
        "content-length": "1",
        "Content-Encoding": "evil",
        "Accept": "evil/*",
        "accept-encoding": "evil",
        "Accept-Language": "evil",
        "Host": "evil.test",
        "User-Agent": "evil",
        "Transfer-Encoding": "evil",
        "Connection": "evil",
        "Cookie": "evil",
        "Proxy-Authorization": "evil",
    }
    stream.headers = {"traceparent": "00-1-2-01", "X-Tenant": "7", **ours}
    whole_call(us, stream)
    whole_call(us)
    first, second = there.requests
    assert (first.headers.pop("traceparent"), first.headers.pop("x-tenant")) == ("00-1-2-01", "7")
    assert first == second
    assert "evil" not in str(first)


def test_a_header_that_would_be_two_is_none(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """A line's end in a value: nothing is sent, and the stream fails as any that cannot be."""
    there = provider(always_says(WHOLE))
    stream = EventStream("s", "t")
    stream.headers = {"X-Tenant": "7\r\nAuthorization: evil"}
    with pytest.raises(UpstreamError):
        upstream(there.url).open(PAYLOAD, stream)
    assert there.requests == []


@pytest.mark.parametrize(("key", "sent"), [(KEY, f"Bearer {KEY}"), ("", None)])
def test_a_netrc_does_not_replace_the_key(
    provider: MakeProvider,
    upstream: MakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    key: str,
    sent: str | None,
) -> None:
    """A .netrc on the machine changes nothing, with a key and without one."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login eve password evil\n")
    monkeypatch.setenv("NETRC", str(netrc))
    there = provider(says(WHOLE))
    whole_call(upstream(there.url, api_key=key))
    assert there.requests[0].headers.get("authorization") == sent


def test_cookies_are_not_kept(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """A provider's cookie does not travel from one user's stream to the next one's."""
    there = provider(always_says(WHOLE.replace(b"\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n", 1)))
    us = upstream(there.url)
    whole_call(us)
    whole_call(us)
    assert ["cookie" in request.headers for request in there.requests] == [False, False]


def test_requests_share_nothing_that_a_mock_may_change(
    upstream: MakeUpstream, stream: Stream
) -> None:
    """Each call's request is its own: what is done to one's headers is not in the next."""
    us = upstream("http://provider.test/v1/chat")
    with responses.RequestsMock() as mock:
        mock.post("http://provider.test/v1/chat", body=DONE, content_type="text/event-stream")
        for payload in (b"{}", PAYLOAD):
            us.open(payload, stream).close()
        first, second = (call.request for call in mock.calls)
    first.headers["X-Mark"] = "1"
    assert (first.body, second.body) == (b"{}", PAYLOAD)
    assert (first.headers["content-length"], second.headers["content-length"]) == (
        "2",
        str(len(PAYLOAD)),
    )
    assert "X-Mark" not in second.headers
    assert second.headers["authorization"] == f"Bearer {KEY}"


# The answer's status


STATUSES = {
    "500": (answer("500 Oops"), "upstream_error", 502),
    "503": (answer("503 Overloaded", "Retry-After: 9"), "upstream_error", 502),
    "401": (answer("401 No", JSON, body=b'{"error":{"message":"bad key"}}'), "upstream_auth", 502),
    "403": (answer("403 No"), "upstream_auth", 502),
    "429": (answer("429 Slow down"), "upstream_rate_limited", 429),
    "400": (answer("400 Bad", JSON, body=REJECTED), "upstream_rejected", 400),
    "402": (answer("402 Pay", JSON, body=REJECTED), "upstream_rejected", 400),
    "404": (answer("404 Where"), "upstream_rejected", 400),
    "422": (answer("422 Bad", JSON, body=REJECTED), "upstream_rejected", 400),
    "301": (answer("301 Moved", "Location: /other"), "upstream_not_stream", 502),
    "307": (answer("307 Over there", "Location: /other", SSE), "upstream_not_stream", 502),
    "204": (answer("204 Nothing"), "upstream_not_stream", 502),
    "201": (answer("201 Made", SSE), "upstream_not_stream", 502),
    "JSON": (answer("200 OK", JSON, body=b"{}"), "upstream_not_stream", 502),
    "HTML": (answer("200 OK", "Content-Type: text/html"), "upstream_not_stream", 502),
    "no type": (answer("200 OK"), "upstream_not_stream", 502),
    "almost": (answer("200 OK", "Content-Type: text/event-streams"), "upstream_not_stream", 502),
    "gzip": (answer("200 OK", SSE, "Content-Encoding: gzip"), "upstream_not_stream", 502),
}


@pytest.mark.parametrize(("raw", "code", "status"), STATUSES.values(), ids=STATUSES)
def test_what_is_no_stream_is_an_error(
    provider: MakeProvider, upstream: MakeUpstream, raw: bytes, code: str, status: int
) -> None:
    """Each way of not streaming has its code and its status; one request is made, none follows."""
    there = provider(says(raw))
    error = refused(upstream(there.url))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.status) == (code, status)
    assert len(there.requests) == 1


@pytest.mark.parametrize(
    "kind",
    ["text/event-stream", "Text/Event-Stream", "text/event-stream;charset=utf-8"],
)
@pytest.mark.parametrize("encoding", [[], ["Content-Encoding: identity"]])
def test_what_is_a_stream(
    provider: MakeProvider, upstream: MakeUpstream, kind: str, encoding: list[str]
) -> None:
    """The content type counts, not its case nor its parameters; identity is no encoding."""
    there = provider(says(answer("200 OK", f"Content-Type: {kind}", *encoding, body=DONE)))
    assert whole_call(upstream(there.url)) == DONE


INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


@pytest.mark.parametrize(
    "before",
    [INTERIM, INTERIM * 3, b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"],
    ids=["one", "three", "100", "102"],
)
def test_interim_answers_are_skipped(
    provider: MakeProvider, upstream: MakeUpstream, before: bytes
) -> None:
    """What comes before the answer is no answer, and does not disturb the connection's next one."""
    there = provider(always_says(before + WHOLE))
    us = upstream(there.url)
    assert [whole_call(us), whole_call(us)] == [EVENT + DONE] * 2
    assert len(there.peers) == 1


def test_another_protocol_is_no_stream(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """A 101 that nobody asked for ends the connection."""
    there = provider(says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"))
    assert refused(upstream(there.url)).code == "upstream_not_stream"
    assert there.closed.wait(5)


def test_a_redirect_is_not_followed(provider: MakeProvider, upstream: MakeUpstream) -> None:
    """The key does not travel, and the body is not waited for, as requests would."""
    elsewhere = provider(says(WHOLE))
    fields = f"Location: {elsewhere.url}\r\nContent-Length: 99".encode()
    there = provider(says(b"HTTP/1.1 307 Over there\r\n%b\r\n\r\nhalf" % fields))
    assert refused(upstream(there.url)).code == "upstream_not_stream"
    assert there.closed.wait(5)
    assert elsewhere.peers == []


def test_a_rate_limit_says_when_to_come_back(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """The provider's Retry-After is handed on; see test_faults for what is none."""
    there = provider(says(answer("429 Slow down", "Retry-After: 7")))
    assert refused(upstream(there.url)).retry_after == "7"


def test_a_rejection_says_what_the_provider_said(
    provider: MakeProvider, upstream: MakeUpstream
) -> None:
    """The sentence in its body; see test_faults for what is none."""
    there = provider(says(answer("400 Bad", JSON, body=REJECTED)))
    assert refused(upstream(there.url)).message == "max_tokens is too large"


def test_a_slow_rejection_is_not_waited_for(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 400 whose body does not come is a 400 all the same, after a bounded time."""
    monkeypatch.setattr("chatstream.upstream.provider._ERROR_PATIENCE", 0.1)
    there = provider(says(answer("400 Bad", JSON, body=REJECTED)[:-1]))
    assert refused(upstream(there.url)).code == "upstream_rejected"


@pytest.mark.parametrize("status", ["401 No", "403 No", "500 Oops"])
def test_what_a_provider_says_of_the_key_is_not_shown(
    provider: MakeProvider, upstream: MakeUpstream, caplog: pytest.LogCaptureFixture, status: str
) -> None:
    """An auth error's body often repeats the key: neither is in the message, detail or log."""
    caplog.set_level(logging.DEBUG)
    body = b'{"error":{"message":"Incorrect API key provided: sk-very-secret"}}'
    there = provider(says(answer(status, JSON, body=body)))
    error = refused(upstream(there.url))
    shown = f"{error.message} {error.detail} {error} {caplog.text}"
    assert "secret" not in shown
    assert "Incorrect" not in shown


# The environment


def test_a_proxy_is_sent_the_whole_address(reached: ReachedBy, upstream: MakeUpstream) -> None:
    """And the key, and the payload: it is the provider's request."""
    proxy, url = reached("proxy", says(WHOLE))
    assert whole_call(upstream(url)) == EVENT + DONE
    [request] = proxy.requests
    assert request.line == "POST http://provider.test/v1/chat HTTP/1.1"
    assert (request.headers["authorization"], request.body) == (f"Bearer {KEY}", PAYLOAD)


def test_the_environment_is_looked_at_once(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set after the first call is for the next process: a look costs more than a call."""
    there, proxy = provider(always_says(WHOLE)), provider(says())
    us = upstream(there.url)
    whole_call(us)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    assert whole_call(us) == EVENT + DONE
    assert (len(there.requests), proxy.peers) == (2, [])


def test_a_proxy_that_refuses_is_a_connect_error(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 407 to the CONNECT: `upstream_connect`."""
    proxy = provider(says(answer("407 Who are you")))
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    assert refused(upstream("https://provider.test/v1/chat")).code == "upstream_connect"
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    assert refused(upstream("http://provider.test/v1/chat")).code == "upstream_connect"


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS4"])
def test_a_socks_proxy_is_refused(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A stop could not reach a connection through SOCKS: neither proxy nor provider is called."""
    there = provider(says(WHOLE))
    proxy = provider(says())
    monkeypatch.setenv("all_proxy", f"{scheme}://127.0.0.1:{proxy.address[1]}")
    error = refused(upstream(there.url))
    assert error.code == "upstream_connect"
    assert "SOCKS proxies are not supported" in str(error.__cause__)
    assert (there.peers, proxy.peers) == ([], [])


def test_no_proxy_is_obeyed(
    provider: MakeProvider, upstream: MakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address in NO_PROXY is called directly."""
    there = provider(says(WHOLE))
    proxy = provider(says())
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.address[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert whole_call(upstream(there.url)) == EVENT + DONE
    assert proxy.peers == []
