"""liveness: what the kernel is asked to notice, and what it says. Real sockets."""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from chatstream.service import lookout
from chatstream.sockets import liveness
from chatstream.sockets.liveness import has_vanished, notice_vanished, restore
from chatstream.upstream import dialling
from tests.conftest import eventually, fill

OPTIONS = {
    "SO_KEEPALIVE": (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    "TCP_KEEPIDLE": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    "TCP_KEEPINTVL": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    "TCP_KEEPCNT": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    "TCP_USER_TIMEOUT": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 7_500),
}


def options(sock: socket.socket | _socket.socket) -> dict[str, int]:
    """What a socket has of what `notice_vanished` sets."""
    return {name: sock.getsockopt(level, option) for name, (level, option, _) in OPTIONS.items()}


WANTED = {name: value for name, (_, _, value) in OPTIONS.items()}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection; the second one's receive buffer is small."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            yield server, client


def backoff(sock: socket.socket) -> int:
    """How many probes of its shut window the connection has sent (tcpi_backoff)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[4]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_tcp_socket_has_every_option(family: socket.AddressFamily) -> None:
    """Keepalive and the user timeout, in seconds and milliseconds, before a connect or after."""
    with socket.socket(family) as sock:
        notice_vanished(sock, 7.5)
        assert options(sock) == WANTED


def test_a_raw_socket_has_them_too(pair: tuple[socket.socket, socket.socket]) -> None:
    """The loop uses the C class, and a second descriptor: the options are the connection's."""
    raw = _socket.socket(fileno=os.dup(pair[0].fileno()))
    notice_vanished(raw, 7.5)
    raw.close()
    assert options(pair[0]) == WANTED


def test_what_was_set_before_comes_back(pair: tuple[socket.socket, socket.socket]) -> None:
    """A server that has options of its own gets its connection back with them."""
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pair[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
    before = options(pair[0])
    saved = notice_vanished(pair[0], 7.5)
    assert options(pair[0]) == WANTED != before
    restore(pair[0], saved)
    assert options(pair[0]) == before


def test_a_unix_socket_stays_as_it_is() -> None:
    """Whoever is at its other end is on this machine: nothing is set, nothing is watched."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert notice_vanished(ours, 7.5) == []
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert not has_vanished(ours)


def test_what_the_kernel_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown option is passed over, and those after it are set."""
    unknown = (socket.IPPROTO_TCP, 9999, 1)
    monkeypatch.setattr(liveness, "_KEEPALIVE", (unknown, *liveness._KEEPALIVE))
    with socket.socket() as sock:
        notice_vanished(sock, 7.5)
        assert options(sock) == WANTED


def test_any_other_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that the kernel refuses is a fault of ours."""
    bad = (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, -1)
    monkeypatch.setattr(liveness, "_KEEPALIVE", (bad,))
    with socket.socket() as sock, pytest.raises(OSError, match="Invalid argument"):
        notice_vanished(sock, 7.5)


def test_a_client_keeps_its_user_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    """It would end one that is there and does not read."""
    notice_vanished(pair[0])
    assert options(pair[0]) == {**WANTED, "TCP_USER_TIMEOUT": 0}


def test_who_was_just_heard_is_there(pair: tuple[socket.socket, socket.socket]) -> None:
    """It cannot have been silent for 25 s before these have passed, whatever is in flight."""
    fill(pair[0])
    assert not has_vanished(pair[0])


def test_data_that_nobody_acknowledges_is_a_peer_that_vanished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Something is in flight, and nothing was heard for so long. Here: a SYN without an answer."""
    monkeypatch.setattr(liveness, "SILENCE", 0.0)
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        socks = [stack.enter_context(socket.socket()) for _ in range(4)]
        for sock in socks:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        eventually(lambda: not has_vanished(socks[0]), "the first one's acknowledgement")
        assert has_vanished(socks[-1])


def test_silence_with_nothing_in_flight_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Nobody was asked anything yet: the keepalive will."""
    monkeypatch.setattr(liveness, "SILENCE", 0.0)
    assert not has_vanished(pair[0])


def test_a_shut_window_is_no_reason(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A client that is there and does not read answers the probes, however much is queued."""
    monkeypatch.setattr(liveness, "SILENCE", 0.0)
    fill(pair[0])
    # The second comes too soon: within 500 ms the peer answers one (tcp_invalid_ratelimit).
    eventually(lambda: backoff(pair[0]) >= 3, "three probes")
    eventually(lambda: not has_vanished(pair[0]), "the third one's answer", 0.5)


def test_the_times_fit() -> None:
    """All is over after 45 s."""
    assert liveness.SILENCE + liveness.KEEPALIVE_IDLE < 45
    assert liveness.SILENCE + lookout.LOOK < 45
    assert dialling.USER_TIMEOUT + liveness.KEEPALIVE_INTERVAL < 45
