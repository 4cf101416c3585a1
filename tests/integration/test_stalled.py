"""A client that stops reading: the stream ends, and meanwhile little is held for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chatstream.sockets.client import UNSENT
from chatstream.upstream.dialling import UNREAD
from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import MODES, Rig

SEND_TIMEOUT = 1.0
FLOOD: dict[str, object] = {"rate": 2000, "tokens": 100_000, "pad": 16384}
WRITE = 128 * 1024
"""More than the most that the server writes at once."""


@pytest.fixture(params=MODES)
def worker_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def impatient(rigs: Callable[..., Rig], worker_class: str) -> Iterator[Rig]:
    rig = rigs("plain", worker_class, CHATSTREAM_SEND_TIMEOUT=str(SEND_TIMEOUT))
    yield rig
    rig.check_leaks()


def flooded(rig: Rig, session: str, **simulate: object) -> Client:
    """A stream whose client has begun to read, and does so no more."""
    client = rig.client(receive_buffer=4096)
    client.post(session, simulate={"id": session, **FLOOD, **simulate})
    client.until(b'"content"')
    return client


def queues(*, local: int | None = None, remote: int) -> list[tuple[int, int]]:
    """Bytes that wait in the kernel, of each connection: to be sent, to be read (proc_net_tcp)."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, _, waiting, *_ = line.split()
        ports = [int(end.rpartition(":")[2], 16) for end in (here, there)]
        if ports[1] == remote and local in (None, ports[0]):
            to_send, to_read = (int(number, 16) for number in waiting.split(":"))
            found.append((to_send, to_read))
    return found


def test_a_stalled_client_is_aborted(impatient: Rig) -> None:
    """Case 12: no byte taken for CHATSTREAM_SEND_TIMEOUT, and its socket is shut down."""
    client = flooded(impatient, "stalled")
    assert impatient.provider.request("stalled", "closed")["closed_by"] == "client"
    ending = impatient.server.ending_of("stalled")
    assert " aborted by stalled cause=stalled " in ending
    assert float(ending.partition("duration=")[2].partition("s")[0]) >= SEND_TIMEOUT
    assert b"event: error" not in client.to_the_end()  # its socket was shut down


def test_a_slow_client_is_not_stalled(impatient: Rig) -> None:
    """As long as it takes some bytes now and then, it may take its time."""
    client = flooded(impatient, "slow")
    until = time.monotonic() + 3 * SEND_TIMEOUT
    while time.monotonic() < until:
        assert client.sock.recv(8192)
        client.sock.settimeout(5)
        time.sleep(SEND_TIMEOUT / 20)  # its pace
    assert impatient.server.cancel("slow")[0] == 200
    assert " cause=cancel " in impatient.server.ending_of("slow")


def test_a_silent_stream_is_not_stalled(impatient: Rig) -> None:
    """A client that has taken all there is has nothing to take."""
    client = impatient.client().post("quiet", simulate={"id": "quiet", "silent_after": 2})
    client.until(b'"content"')
    stalled = flooded(impatient, "beside")
    assert " cause=stalled " in impatient.server.ending_of("beside")
    stalled.close()
    assert impatient.server.cancel("quiet")[0] == 200
    assert " cause=cancel " in impatient.server.ending_of("quiet")


def test_an_answer_that_is_whole_but_not_taken(impatient: Rig) -> None:
    """It was paid for, and is `completed`; but it must not hold its slot for ever."""
    client = impatient.client(receive_buffer=4096)
    worker = impatient.server.worker
    simulate = {"id": "untaken", "headers_after": 0.3, "tokens": 1, "rate": 0, "pad": 100_000}
    client.post("untaken", simulate=simulate)
    provider = impatient.provider
    provider.request("untaken")
    os.kill(worker, signal.SIGSTOP)  # when it goes on, all is there, and goes out in one write
    eventually(lambda: provider.request("untaken")["finished"], "the whole answer")
    os.kill(worker, signal.SIGCONT)
    eventually(lambda: not impatient.server.debug()["slots"], "its slot")
    assert " completed " in impatient.server.ending_of("untaken")
    assert b"[DONE]" not in client.to_the_end()


def test_a_cancel_of_a_stuck_stream(impatient: Rig) -> None:
    """The provider is told at once, whatever the client does."""
    flooded(impatient, "stuck")
    impatient.provider.request("stuck", "delivered", count=8)
    assert impatient.server.cancel("stuck")[0] == 200
    assert impatient.provider.request("stuck", "closed")["closed_by"] == "client"
    assert " cause=cancel " in impatient.server.ending_of("stuck")


def test_what_is_held_for_a_client_that_does_not_read(rig: Rig) -> None:
    """Some 400 KB in the kernel at most, as docs/wire.md says, however much the provider sends."""
    client = rig.client().post("held", simulate={**FLOOD, "rate": 100_000})
    taken = 0
    while taken < 20_000_000:  # by then the kernel would have grown its buffers
        taken += len(client.sock.recv(1024 * 1024))
    provider = rig.provider.port

    def at_rest() -> bool:
        """Whether both directions are full: a moment later nothing has changed."""
        before = queues(remote=provider), queues(local=rig.server.port, remote=client.port)
        time.sleep(0.3)
        after = queues(remote=provider), queues(local=rig.server.port, remote=client.port)
        return before == after and any(to_read for _, to_read in after[0])

    eventually(at_rest, "full buffers")
    ((to_send, _),) = queues(local=rig.server.port, remote=client.port)
    unread = [to_read for _, to_read in queues(remote=provider)]
    assert 0 < max(unread) <= UNREAD
    assert 0 < to_send <= UNSENT + WRITE
    rig.server.cancel("held")
