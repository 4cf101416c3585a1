"""A simulator for the tests of a file, and who asks it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import closing

import pytest
import trustme

from chatstream.simulator import Simulator
from tests.conftest import eventually
from tests.simulator.client import Client, Tls


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator
        with closing(Client(simulator)) as client:
            eventually(lambda: not client.stats()["connections_open"], "all connections gone")
            assert client.stats()["internal_errors"] == 0


@pytest.fixture
def desk(provider: Simulator) -> Iterator[Client]:
    """A connection that asks for figures."""
    with closing(Client(provider)) as client:
        yield client


@pytest.fixture
def client(provider: Simulator) -> Iterator[Client]:
    with closing(Client(provider)) as client:
        yield client


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An id for the test's request."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    authority = trustme.CA()
    certfile = tmp_path_factory.mktemp("tls") / "server.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(certfile)
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return Tls(str(certfile), context)


@pytest.fixture
def secure(tls: Tls) -> Iterator[Simulator]:
    with Simulator(certfile=tls.certfile) as simulator:
        yield simulator
