"""Networks of a test's own: what they are made of is gone with the last descriptor of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require

NEAR = "192.0.2.1"
"""The address of the near namespace, as the far one sees it (RFC 5737: in nobody's use)."""

FAR = "198.51.100.1"
"""The address of the far namespace, as the near one sees it."""

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace without a name (network_namespaces(7)), with its loopback up.

    Sockets and processes made while it is `entered` are in it, and stay.
    """

    def __init__(self) -> None:
        with _here() as here:
            _call("unshare", _CLONE_NEWNET)
            self._fd = _current()
            _call("setns", here, _CLONE_NEWNET)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.ip("link set lo up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within it, the calling thread is in the namespace."""
        with _here() as here:
            _call("setns", self._fd, _CLONE_NEWNET)
            try:
                yield
            finally:
                _call("setns", here, _CLONE_NEWNET)

    def ip(self, command: str) -> None:
        """Runs ip(8) in the namespace."""
        with self.entered():
            subprocess.run(["ip", *command.split()], check=True, timeout=10)

    def write(self, path: str, value: str) -> None:
        with self.entered():
            Path(path).write_text(value)

    def packets_sent(self) -> int:
        """IPv4 packets that it forwarded or made itself (proc_net_snmp)."""
        with self.entered():
            lines = Path("/proc/self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Ip:"))
        figures = dict(zip(names, values, strict=True))
        return int(figures["ForwDatagrams"]) + int(figures["OutRequests"])

    def close(self) -> None:
        os.close(self._fd)


class Road:
    """Two namespaces, and a router between them that can lose the far one without a word.

    near 192.0.2.1 ── 192.0.2.2 router 198.51.100.2 ── 198.51.100.1 far
    """

    def __init__(self) -> None:
        self.near, self.router, self.far = Namespace(), Namespace(), Namespace()
        self._lay(self.near, NEAR, "192.0.2.2", "near")
        self._lay(self.far, FAR, "198.51.100.2", "far")
        # What has no way any more is dropped. Without this, the router would say so (ICMP).
        self.router.ip("route add blackhole default")
        self.router.write("/proc/sys/net/ipv4/ip_forward", "1")

    def _lay(self, end: Namespace, address: str, gateway: str, name: str) -> None:
        self.router.ip(f"link add {name} type veth peer name road netns {end.path}")
        self.router.ip(f"address add {gateway}/24 dev {name}")
        self.router.ip(f"link set {name} up")
        end.ip(f"address add {address}/24 dev road")
        end.ip("link set road up")
        end.ip(f"route add default via {gateway}")

    def cut(self) -> None:
        """The far namespace's link goes down. In the near one, no link, route or neighbour does."""
        self.router.ip("link set far down")

    def close(self) -> None:
        for namespace in (self.near, self.router, self.far):
            namespace.close()


def require_namespaces() -> None:
    """Skips where network namespaces cannot be made; in CI that is a failure."""
    require("ip")
    try:
        Road().close()
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"no network namespaces here ({error}); they need root"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@contextlib.contextmanager
def _here() -> Iterator[int]:
    fd = _current()
    try:
        yield fd
    finally:
        os.close(fd)


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(name: str, *arguments: int) -> None:
    # os.unshare and os.setns came with Python 3.12.
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
