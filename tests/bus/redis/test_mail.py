"""redis.mail: messages that come early, late, or from somebody else."""

from __future__ import annotations

import contextlib
from time import monotonic

import pytest

from chatstream.bus.messages import Action, Answer, Enquiry, Live, Request, encode
from chatstream.bus.redis.mail import LISTEN
from chatstream.bus.redis.redis_bus import RedisBus
from tests.bus.conftest import Service, Services
from tests.conftest import eventually


@pytest.mark.parametrize("option", ["", "?socket_timeout=0.05", "?socket_timeout=30"])
def test_a_listener_waits_longer_for_the_server_than_the_server_for_mail(option: str) -> None:
    """Whatever an address says of commands: silence is not a fault."""
    bus = RedisBus(lambda request: Answer.ABSENT, f"redis://h/0{option}", prefix="p", ttl=45.0)
    assert bus._mail._mailbox.connection_pool.connection_kwargs["socket_timeout"] > LISTEN


def test_a_message_before_the_listener_listens_is_carried_out(service: Service) -> None:
    """Case 30: what is sent between a claim and the first look into the mailbox is read then."""
    received: list[Request] = []

    def receive(request: Request) -> Answer:
        received.append(request)
        return Answer.STOPPED

    url, prefix = service.settings["bus"], service.settings["bus_prefix"]
    late = RedisBus(receive, url, prefix=prefix, ttl=45.0)
    message = encode(Request(Action.CANCEL, "", "s", "a", origin="0" * 32))
    with contextlib.closing(service.client()) as client:
        client.xadd(f"{prefix}:mail:{late._worker}", {"message": message})
    late.start()
    try:
        (request,) = eventually(lambda: received, "the message")
        assert (request.action, request.session_id, request.stream_id) == (Action.CANCEL, "s", "a")
    finally:
        late.close()


def test_a_stop_of_all_that_is_read_late(services: Services) -> None:
    """It says when it was sent, by the server's clock: what begins later is not meant."""
    us = services.make("redis")
    read: list[Enquiry] = []

    def lives(enquiry: Enquiry) -> list[Live]:
        read.append(enquiry)
        return []

    url, prefix = us.settings["bus"], us.settings["bus_prefix"]
    ours = RedisBus(lambda request: Answer.ABSENT, url, prefix=prefix, ttl=45.0, lives=lives)
    with contextlib.closing(ours):
        sent = monotonic()
        with contextlib.closing(us.client()) as client:
            message = encode(Enquiry("me", 7, "0" * 32, stop=True))
            client.xadd(f"{prefix}:mail:{ours._worker}", {"message": message})
        was_sent = monotonic()
        eventually(lambda: monotonic() > was_sent + 0.2)
        ours.start()
        eventually(lambda: read, "the enquiry")
    (enquiry,) = read
    assert (enquiry.owner, enquiry.after, enquiry.stop) == ("me", 7, True)
    assert enquiry.before is not None
    assert sent - 0.01 <= enquiry.before < was_sent + 0.1


def test_messages_of_a_foreign_shape_are_dropped(service: Service) -> None:
    """What is in the mailbox need not be ours, and no reply can be sent to some origins."""
    one, other = service.join(2)
    one.claim("s", "a")
    mailbox = service.address(one)
    with contextlib.closing(service.client()) as client:
        client.xadd(mailbox, {"other": "field"})
        client.xadd(mailbox, {"message": b'{"chatstream": 1}', "other": "field"})
        for origin in ("", "\\ud800", "a b", "x" * 5000):
            text = f'{{"chatstream":1,"id":"1","origin":"{origin}","action":"probe",'
            client.xadd(mailbox, {"message": text + '"owner":"","session":"s","stream":null}'})
    assert other.cancel("s") is True
    assert one.log() == ["[bus] redis: dropped a message that is none of ours"]
