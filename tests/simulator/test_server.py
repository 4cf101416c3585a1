"""server: many at once, how it begins and how it ends."""

from __future__ import annotations

import http.client
import os
import select
import socket
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from chatstream.simulator import Simulator
from tests.conftest import PATIENCE
from tests.simulator.client import CHAT, LONG, Client, Tls, post, raw_socket


def test_defaults_of_the_server() -> None:
    """A request's own simulate comes first."""
    with (
        Simulator(defaults={"tokens": 3, "rate": 0}) as provider,
        closing(Client(provider)) as client,
    ):
        assert len(client.chat().text().split()) == 3
        assert len(client.chat(tokens=2).text().split()) == 2


def test_defaults_can_be_set_anew() -> None:
    """From the next request on, in the place of the old ones; a wrong one changes nothing."""
    with (
        Simulator(defaults={"tokens": 3, "rate": 0}) as provider,
        closing(Client(provider)) as client,
    ):
        provider.behave({"tokens": 2, "rate": 0, "text": "ho "})
        assert client.chat().text() == "ho ho "
        with pytest.raises(ValueError, match=r"simulate\.tokens"):
            provider.behave({"rate": 1, "tokens": "many"})
        assert client.chat().text() == "ho ho "
        provider.behave({"status": 429})
        assert client.chat().status == 429


@pytest.mark.parametrize("defaults", [{"nonsense": 1}, {"tokens": "many"}, {"rate": float("nan")}])
def test_bad_defaults(defaults: dict[str, Any]) -> None:
    """Fail when the server is made, and leave no socket."""
    with pytest.raises(ValueError, match=rf"simulate\.{next(iter(defaults))}"):
        Simulator(defaults=defaults)


def test_two_hundred_streams(provider: Simulator, desk: Client) -> None:
    """All whole, at the same time."""
    streams, tokens = 200, 20
    names = [f"load-{number}" for number in range(streams)]
    with ExitStack() as stack, select.epoll() as poll:
        bodies = {}
        for name in names:
            simulate = {"id": name, "tokens": tokens, "rate": 40}
            sock = stack.enter_context(
                raw_socket(provider, post({"stream": True, "simulate": simulate}))
            )
            poll.register(sock, select.EPOLLIN)
            bodies[sock.fileno()] = (sock, bytearray())
        deadline = time.monotonic() + PATIENCE
        while not all(body.endswith(b"\r\n0\r\n\r\n") for _, body in bodies.values()):
            assert time.monotonic() < deadline
            for fd, _ in poll.poll(PATIENCE):
                sock, body = bodies[fd]
                body += sock.recv(65_536)
        assert {body.count(b"data: ") for _, body in bodies.values()} == {tokens + 2}
        figures = [desk.figure(name) for name in names]
    assert {figure["delivered"] for figure in figures} == {tokens}
    assert max(figure["started_ns"] for figure in figures) < min(
        figure["closed_ns"] for figure in figures
    ), "they did not overlap"


def test_a_certificate_that_cannot_be_read(tmp_path: Path) -> None:
    """Says what to look at."""
    with pytest.raises(ValueError, match="certfile"):
        Simulator(certfile=str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match="certfile"):
        Simulator(keyfile="key.pem")


def test_close_leaves_nothing_behind(tls: Tls) -> None:
    """No thread, no descriptor; clients see the end. More than once does no harm."""
    descriptors, threads = os.listdir("/proc/self/fd"), threading.enumerate()
    provider = Simulator(certfile=tls.certfile, handshake_delay=60).start()
    plain = Simulator().start()
    with raw_socket(provider), closing(Client(plain)) as client, closing(Client(plain)) as desk:
        client.begin(id="a", tokens=LONG)
        desk.figure("a", "delivered")
        for simulator in (provider, plain, plain):
            simulator.close()
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            client.getresponse().read()
    assert threading.enumerate() == threads
    assert os.listdir("/proc/self/fd") == descriptors


def test_close_without_start() -> None:
    """The port is free again."""
    simulator = Simulator()
    simulator.close()
    again = Simulator(port=simulator.port)
    again.close()


def test_serve_forever_in_a_thread_of_ones_own() -> None:
    """close() waits for it."""
    simulator = Simulator()
    thread = threading.Thread(target=simulator.serve_forever)
    thread.start()
    with closing(Client(simulator)) as client:
        assert client.stats()["requests"] == 0
    simulator.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_port_in_use(provider: Simulator) -> None:
    """Is the caller's to handle."""
    with pytest.raises(OSError, match="in use"):
        Simulator(port=provider.port)


def test_ipv6() -> None:
    """The address is written as URLs want it."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        simulator = Simulator("::1")
    except OSError:
        pytest.skip("no IPv6")
    assert simulator.url == f"http://[::1]:{simulator.port}{CHAT}"
    simulator.close()
