"""The provider's side, scripted on real sockets; and calls to it, as a server makes them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from chatstream.errors import StreamError
from chatstream.stream.forms import EventStream
from chatstream.stream.sides import Body
from chatstream.stream.stream import Stream
from chatstream.upstream import dialling
from chatstream.upstream.provider import Upstream
from tests.conftest import eventually

KEY = "sk-very-secret"
PAYLOAD = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = HEAD + b"Connection: close\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE = CHUNKED + chunk(EVENT) + chunk(DONE) + chunk(b"")

SSE = "Content-Type: text/event-stream"
JSON = "Content-Type: application/json"
REJECTED = b'{"error":{"message":"max_tokens is too large","type":"invalid_request_error"}}'


def answer(status: str, *fields: str, body: bytes = b"") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*head, "", ""]).encode() + body


# The other side


@dataclass
class Request:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, provider: Provider, sock: socket.socket, number: int) -> None:
        self.number = number
        self.sock = sock
        self.provider = provider
        self.got = b""
        sock.settimeout(10)

    def request(self) -> Request | None:
        """The next whole request; None when the other side has closed."""
        while b"\r\n\r\n" not in self.got:
            if not self._more():
                return None
        head, _, self.got = self.got.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (f.partition(": ") for f in fields)}
        length = int(headers.get("content-length", 0))
        while len(self.got) < length:
            if not self._more():
                return None
        body, self.got = self.got[:length], self.got[length:]
        request = Request(line, headers, body)
        self.provider.requests.append(request)
        return request

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            return False
        self.got += data
        return bool(data)

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_closed(self) -> None:
        """Returns when the other side has closed; the provider's `closed` is set."""
        while self._more():
            pass
        self.provider.closed.set()


Script = Callable[[Peer], None]


class Provider:
    """A server that does as its script says, a thread for each connection."""

    def __init__(self, script: Script) -> None:
        self.requests: list[Request] = []
        self.peers: list[Peer] = []
        self.closed = threading.Event()
        self.errors: list[BaseException] = []
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}/v1/chat"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.peers.append(Peer(self, sock, len(self.peers) + 1))
            thread = threading.Thread(target=self._serve, args=(self.peers[-1],))
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        try:
            self._script(peer)
        except ConnectionError:
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            peer.sock.close()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        assert self.errors == []


def says(*pieces: bytes) -> Script:
    """Answers one request with `pieces`, then waits for the other side to close."""

    def script(peer: Peer) -> None:
        if peer.request():
            peer.send(*pieces)
            peer.wait_closed()

    return script


def says_and_closes(*pieces: bytes) -> Script:
    def script(peer: Peer) -> None:
        if peer.request():
            peer.send(*pieces)

    return script


def always_says(answer: bytes) -> Script:
    """Answers every request of a connection."""

    def script(peer: Peer) -> None:
        while peer.request():
            peer.send(answer)
        peer.wait_closed()

    return script


def on_a_sign(
    first: list[bytes], *rest: bytes, stays: bool = True
) -> tuple[Script, threading.Event]:
    """Answers with what is first; with the rest when told to; then waits for the close."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(*first)
        assert go_on.wait(10)
        peer.send(*rest)
        if stays:
            peer.wait_closed()

    return script, go_on


def floods(head: bytes, piece: bytes) -> Script:
    """Sends as fast as it can, for at most three seconds."""

    def script(peer: Peer) -> None:
        peer.request()
        peer.send(head)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            peer.send(piece)

    return script


class BlackHole:
    """An address that never answers a SYN: a listener whose queue is full."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.address: tuple[str, int] = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}/v1/chat"
        self._fillers = [socket.socket() for _ in range(4)]
        for filler in self._fillers:
            filler.setblocking(False)
            filler.connect_ex(self.address)
        eventually(lambda: states_to(self.address[1]).count("02") >= 2)
        self._own = states_to(self.address[1]).count("02")

    def dialled(self) -> bool:
        """Whether a SYN that is not one of our own is on its way here."""
        return states_to(self.address[1]).count("02") > self._own

    def close(self) -> None:
        for sock in (*self._fillers, self._listener):
            sock.close()


def states_to(port: int) -> list[str]:
    """The TCP states of the connections towards `port`, as the kernel numbers them.

    Without TIME_WAIT, where an earlier test's connections lie whose port this may have been.
    """
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    return [row[3] for row in rows if row[2].endswith(f":{port:04X}") and row[3] != "06"]


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """Makes every name have these addresses, in this order."""
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: infos)


def gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the kernel say ETIMEDOUT as soon as a peer does not take what it is sent."""
    monkeypatch.setattr(dialling, "USER_TIMEOUT", 0.001)


# Our side


class Call(threading.Thread):
    """`Upstream.open` in a thread of its own, as in a server."""

    def __init__(self, upstream: Upstream, stream: Stream) -> None:
        super().__init__()
        self._upstream, self._stream = upstream, stream
        self._body: Body | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._body = self._upstream.open(PAYLOAD, self._stream)
        except BaseException as error:
            self._error = error

    def error(self) -> BaseException | None:
        """What `open` raised, within a time that no timeout of ours is as short as."""
        self.join(5)
        assert not self.is_alive()
        return self._error


def opened(upstream: Upstream, stream: Stream | None = None) -> Body:
    return upstream.open(PAYLOAD, stream or EventStream("s", "t"))


def rest_of(body: Body) -> bytes:
    return b"".join(iter(lambda: body.receive(5), b""))


def whole_call(upstream: Upstream, stream: Stream | None = None) -> bytes:
    """One stream from the request to its completion."""
    stream = stream or EventStream("s", "t")
    body = opened(upstream, stream)
    try:
        data = rest_of(body)
        stream.complete()
    finally:
        body.close()
    return data


def refused(upstream: Upstream, stream: Stream | None = None) -> StreamError:
    """The error with which a call ends. Ends its stream, too, as the caller has to."""
    stream = stream or EventStream("s", "t")
    with pytest.raises(StreamError) as caught:
        upstream.open(PAYLOAD, stream)
    stream.fail(caught.value)
    return caught.value


MakeProvider = Callable[[Script], Provider]
MakeUpstream = Callable[..., Upstream]
ReachedBy = Callable[[str, Script], tuple[Provider, str]]

WAYS = ("plain", "tls", "proxy", "tunnel")
"""To a provider: see the fixture `reached`."""
