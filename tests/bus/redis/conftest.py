"""What the tests of the Redis bus share: a service of it, a bus in this process, what is said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from chatstream.bus.messages import Action, Answer, Request
from chatstream.bus.redis.redis_bus import RedisBus
from tests.bus.conftest import Service, Services, Worker
from tests.conftest import eventually
from tests.redis_server import RedisServer

AWAY, BACK = "[bus] redis is away", "[bus] redis is back"


@pytest.fixture
def service(services: Services) -> Service:
    return services.make("redis")


@pytest.fixture
def own(services: Services, redis_server: RedisServer) -> Service:
    """A service whose server the test may stop."""
    return services.make("redis", redis_server)


class Member:
    """A bus in this process, and what is asked of it."""

    def __init__(self, service: Service) -> None:
        url, prefix = service.settings["bus"], service.settings["bus_prefix"]
        self.bus = RedisBus(self._receive, url, prefix=prefix, ttl=45.0)
        self.asked: list[Action] = []

    def _receive(self, request: Request) -> Answer:
        self.asked.append(request.action)
        return Answer.LIVE if request.action is Action.PROBE else Answer.STOPPED


@contextlib.contextmanager
def joining(service: Service) -> Iterator[Member]:
    """One that has reached its Redis."""
    member = Member(service)
    try:
        member.bus.start()
        eventually(lambda: member.bus._listener.up, "its arrival")
        yield member
    finally:
        member.bus.close()


@pytest.fixture
def member(service: Service) -> Iterator[Member]:
    """One that has yet to start."""
    member = Member(service)
    yield member
    member.bus.close()


def changes(member: Worker) -> list[str]:
    """What a worker has said of its server."""
    known = (AWAY, BACK)
    return [next((text for text in known if text in line), line) for line in member.log()]


def assert_stays_away(member: Worker) -> None:
    eventually(lambda: changes(member) == [AWAY], "the line of a server that is away")


def assert_is_back(*members: Worker) -> None:
    for member in members:
        eventually(lambda member=member: changes(member)[-1] == BACK, "the line of its return")
        assert changes(member) == [AWAY, BACK]


def only(keys: set[str]) -> str:
    (key,) = keys
    return key


def places(service: Service) -> list[str]:
    """What stands for the places of the one owner there is."""
    with contextlib.closing(service.client()) as client:
        return [value.decode() for value in client.hvals(only(service.keys("places:*")))]
