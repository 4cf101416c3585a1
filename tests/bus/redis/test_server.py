"""redis.server: which servers can be a bus, and how they are reached."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from chatstream.bus.redis.server import check
from chatstream.errors import BusUnavailable, ConfigError
from tests.bus.conftest import Services, Worker
from tests.bus.redis.conftest import assert_stays_away
from tests.conftest import eventually
from tests.redis_server import RedisServer


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class OtherServer(RedisServer):
    """A server that is not started as `RedisServer` does it. `{port}` stands for its port."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._command = command
        super().__init__(folder)

    def start(self) -> None:
        while self.port > 50_000:  # a Cluster's server has another one, 10,000 above
            self.port = free_port()
        command = [word.format(port=self.port) for word in self._command]
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            eventually(self._answers, command[0])
        except BaseException:
            self.stop()
            raise


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., OtherServer]]:
    """Starts a server by its command."""
    with contextlib.ExitStack() as stack:

        def serve(*command: str) -> OtherServer:
            if shutil.which(command[0]) is None:
                pytest.skip(f"no {command[0]} here")
            server = OtherServer(tmp_path, *command)
            stack.callback(server.stop)
            return server

        yield serve


def test_a_good_server_passes(shared_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said of it."""
    check(shared_redis.url)
    assert caplog.records == []


@pytest.mark.parametrize("credentials", [":wrong@", "nobody:secret@", ""])
def test_a_wrong_password_is_a_fault_of_the_settings(
    redis_server: RedisServer, credentials: str
) -> None:
    """So is none where one is needed. The sentence does not tell it."""
    redis_server.command("CONFIG", "SET", "requirepass", "secret")
    check(f"redis://:secret@127.0.0.1:{redis_server.port}/0")
    with pytest.raises(ConfigError, match="refused the name or password") as caught:
        check(f"redis://{credentials}127.0.0.1:{redis_server.port}/0")
    assert "wrong" not in str(caught.value)


def test_a_cluster_is_refused(serve: Callable[..., OtherServer], tmp_path: Path) -> None:
    """A sentence says that one ordinary server is needed."""
    options = ["--port", "{port}", "--dir", str(tmp_path), "--save", ""]
    server = serve("redis-server", *options, "--cluster-enabled", "yes")
    with pytest.raises(ConfigError, match=r"runs as cluster.*one ordinary server"):
        check(server.url)


def test_a_sentinel_is_refused(serve: Callable[..., OtherServer], tmp_path: Path) -> None:
    """A sentence says what address to give in its place."""
    (tmp_path / "sentinel.conf").touch()
    server = serve(
        "redis-server", str(tmp_path / "sentinel.conf"), "--sentinel", "--port", "{port}"
    )
    with pytest.raises(ConfigError, match=r"runs as sentinel.*behind a Sentinel: of its master"):
        check(server.url)


def test_an_option_that_does_not_exist_is_refused() -> None:
    """At start-up, with its name, not with the first stream."""
    with pytest.raises(ConfigError, match="no_such_option"):
        check("redis://127.0.0.1:1/0?no_such_option=1")


def test_a_server_that_is_not_there_yet_may_come(caplog: pytest.LogCaptureFixture) -> None:
    """It is a warning: workers and their Redis may be started in any order."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        check(f"redis://127.0.0.1:{unused.getsockname()[1]}/0")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot be reached yet" in record.getMessage()


def test_valkey_is_as_good(
    services: Services, serve: Callable[..., OtherServer], tmp_path: Path
) -> None:
    """The same commands do the same there."""
    server = serve("valkey-server", "--port", "{port}", "--dir", str(tmp_path), "--save", "")
    check(server.url)
    one, other = services.make("redis", server).join(2)
    assert_two_workers_meet(one, other)


def test_tls(services: Services, tmp_path: Path) -> None:
    """rediss:// with a certificate of one's own authority; not with another's."""
    authority, foreign = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    foreign.cert_pem.write_to_path(tmp_path / "foreign.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    for option, name in (("cert", "cert"), ("key", "key"), ("ca-cert", "authority")):
        options += [f"--tls-{option}-file", str(tmp_path / f"{name}.pem")]
    server = RedisServer(tmp_path, *options)
    try:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={tmp_path}"
        check(f"{url}/authority.pem")
        service = services.make("redis", server, bus=f"{url}/authority.pem")
        one, other = service.join(2)
        assert_two_workers_meet(one, other)
        (stranger,) = services.make("redis", server, bus=f"{url}/foreign.pem").join(1, settle=False)
        assert_stays_away(stranger)
        assert stranger.claim("s", "c") is False
        with pytest.raises(BusUnavailable):
            stranger.cancel("z")
        services.end()
    finally:
        server.stop()


def assert_two_workers_meet(one: Worker, other: Worker) -> None:
    assert one.cancel("s", "a0") is False
    assert other.claim("s", "a0") is True
    one.claim("s", "a1")
    one.claim("z", "b")
    other.claim("s", "a2")
    assert one.ending("a1") == "superseded"
    assert one.cancel("s") is True
    assert other.cancel("z", "b") is True
    assert other.cancel("z") is False
    assert one.log() == other.log() == []
