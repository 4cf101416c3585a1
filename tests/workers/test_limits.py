"""limits: whose route a target is, until when, and which settings say so."""

from __future__ import annotations

import pytest

from chatstream.settings.table import Settings
from chatstream.workers import draining
from chatstream.workers.arrival import Arrival
from chatstream.workers.limits import LONG_BODY, LONG_HEAD, TIMED_OUT, Limits


class Service:
    """What has streams, as far as its settings count."""

    def __init__(self, **settings: object) -> None:
        config = {f"CHATSTREAM_{key.upper()}": value for key, value in settings.items()}
        self.settings = Settings.load(config, {})

    def drain(self, *, at_once: bool = False) -> None:
        """Nothing: it has none."""


def asked(target: bytes) -> Arrival:
    """A request for that."""
    arrival = Arrival(100)
    arrival.feed(b"GET %b HTTP/1.1\r\n\r\n" % target)
    return arrival


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """Those of this process."""
    services: list[Service] = []
    monkeypatch.setattr(draining, "services", lambda: services)
    return services


@pytest.mark.parametrize(
    "target",
    [
        b"/api/chat/stream",
        b"/api/chat/stream?a=b",
        b"/api/chat/stream#a",
        b"/api/chat/cancel",
        b"/api/chat/cancel/s",
        b"/api/chat/cancel/a/b?streamId=c",
        b"/api/chat/cancel/a%0Ab",
        b"/mounted/here/api/chat/stream",
        b"http://host:80/api/chat/stream",
        b"/api/chat/%73tream",
        b"/api%2Fchat/cancel%2fs",
        b"/%3F/api/chat/stream",
    ],
)
def test_our_routes(services: list[Service], target: bytes) -> None:
    """Wherever they are mounted, and however they are written."""
    services.append(Service())
    assert Limits.load().ours(asked(target))


@pytest.mark.parametrize(
    "target",
    [
        b"",
        b"*",
        b"/",
        b"/upload",
        b"/upload?to=/api/chat/stream",
        b"/upload#/api/chat/stream",
        b"/api/chat",
        b"/api/chat/",
        b"/api/chat/streams",
        b"/api/chat/stream/",
        b"/api/chat/cancelled",
        b"/apiXchat/stream",
        b"/other/stream",
    ],
)
def test_other_routes(services: list[Service], target: bytes) -> None:
    """A query is no path, and a prefix is no pattern."""
    services.append(Service())
    assert not Limits.load().ours(asked(target))


def test_a_target_is_looked_at_once(services: list[Service]) -> None:
    """However often its request is asked about: its body may come byte by byte."""
    services.append(Service())
    limits = Limits.load()
    arrival = asked(b"/upload")
    assert not limits.ours(arrival)
    arrival.target = b"/api/chat/stream"
    assert not limits.ours(arrival)


def test_every_service_has_its_prefix(services: list[Service]) -> None:
    """A process may have several; a prefix may have characters that mean something in patterns."""
    services += [Service(url_prefix="/a.b"), Service(url_prefix="/c")]
    limits = Limits.load()
    assert limits.ours(asked(b"/a.b/stream"))
    assert limits.ours(asked(b"/c/cancel/d"))
    assert not limits.ours(asked(b"/aXb/stream"))
    assert not limits.ours(asked(b"/api/chat/stream"))


@pytest.mark.parametrize(("prefix", "at"), [("/v1", b"/v1"), ("/", b"")])
def test_openais_chat_is_ours_where_it_is(services: list[Service], prefix: str, at: bytes) -> None:
    """It takes a body as the chat's own route does; without a prefix it is a host's."""
    services.append(Service())
    assert not Limits.load().ours(asked(at + b"/chat/completions"))
    services[:] = [Service(openai_prefix=prefix)]
    limits = Limits.load()
    assert limits.ours(asked(at + b"/chat/completions?a=b"))
    assert limits.ours(asked(b"/mounted" + at + b"/chat/completions"))
    assert limits.ours(asked(b"/api/chat/stream"))
    assert not limits.ours(asked(at + b"/chat/completions/x"))
    assert not limits.ours(asked(at + b"/models"))


def test_our_requests_have_a_deadline_others_have_to_go_on(services: list[Service]) -> None:
    """Ours count from their first byte, others from their last."""
    services.append(Service(request_timeout=10))
    limits = Limits.load()
    ours, other, head = Arrival(100), Arrival(100), Arrival(100)
    ours.feed(b"POST /api/chat/stream HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
    other.feed(b"POST /upload HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
    head.feed(b"POST /upload")
    for new in (True, False):
        assert limits.due(ours, first_byte=100, now=107, due=105, new=new) == 110
        assert limits.due(other, first_byte=100, now=107, due=105, new=new) == 117
    assert limits.due(head, first_byte=100, now=107, due=105, new=True) == 105
    assert limits.due(head, first_byte=100, now=107, due=112, new=True) == 110
    assert limits.due(head, first_byte=100, now=107, due=105, new=False) == 110


def test_the_apps_settings_count(services: list[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in `app.config` is not in the environment, and wins."""
    monkeypatch.setenv("CHATSTREAM_REQUEST_TIMEOUT", "99")
    services.append(Service(request_timeout=1, headers_timeout=2, keepalive_timeout=3, max_body=4))
    limits = Limits.load()
    assert (limits.request, limits.first, limits.kept, limits.body) == (1, 2, 3, 4)


def test_of_several_services_the_most(services: list[Service]) -> None:
    """In whatever order they were made: until its head is there, a request is nobody's."""
    few = Service(request_timeout=1, headers_timeout=2, keepalive_timeout=3, max_body=4)
    many = Service(request_timeout=5, headers_timeout=6, keepalive_timeout=7, max_body=8)
    for order in ([few, many], [many, few]):
        services[:] = order
        limits = Limits.load()
        assert (limits.request, limits.first, limits.kept, limits.body) == (5, 6, 7, 8)


def test_without_a_service_the_environment_counts(
    services: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our workers serve any WSGI app."""
    monkeypatch.setenv("CHATSTREAM_KEEPALIVE_TIMEOUT", "7")
    limits = Limits.load()
    assert limits.kept == 7
    assert limits.request == Settings().request_timeout


@pytest.mark.parametrize("refusal", [TIMED_OUT, LONG_BODY, LONG_HEAD])
def test_refusals_are_whole_answers(refusal: bytes) -> None:
    """Without a body, and the last of their connection."""
    head, _, body = refusal.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0].split()[1] in (b"408", b"413", b"431")
    assert {b"Connection: close", b"Content-Length: 0"} == set(lines[1:])
    assert body == b""
