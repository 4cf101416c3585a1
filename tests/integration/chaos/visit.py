"""A script carried out: one client, and what it saw."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from chatstream.sockets.framing import BadFraming, Chunked
from tests.integration.chaos.plan import Script
from tests.integration.chaos.stage import Stage
from tests.integration.client import Client

WHOLE_S = 25.0
"""Seconds in which an answer ends by itself."""

STOPPED_S = 8.0
"""Seconds in which a stopped one ends for a client that reads it."""

PRESSES = 4
"""How often a client presses stop while the answer is that it is not known."""

STALL_BUFFER = 131_072  # bytes
_PAUSES = (0.1, 0.4, 0.9)  # seconds between two presses


class Reader:
    """One connection and what came over it. Counts, and keeps no whole answers.

    Attributes:
        began_ns: When its headers had come.
        blocks: How many of each kind came: "token", "done", "error", "ping", "other".
        rest: Bytes after the last whole event; of a refusal, its body.
        end: "open"; "whole" for a body that ended as it should; "closed", "reset" or "unframed".
    """

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.client = Client(port, receive_buffer=receive_buffer)
        self.status = 0
        self.began_ns: int | None = None
        self.worker = 0
        self.blocks: Counter[str] = Counter()
        self.rest = b""
        self.end = "open"
        self._head = b""
        self._length: int | None = None
        self._chunked = Chunked()

    @property
    def tokens(self) -> int:
        return self.blocks["token"]

    def read(self, enough: Callable[[], bool] | None, seconds: float) -> bool:
        """Reads until `enough`, the end or the time's; returns whether it was enough."""
        deadline = time.monotonic() + seconds
        while not (enough and enough()):
            left = deadline - time.monotonic()
            if self.end != "open" or left <= 0:
                return enough is None and self.end != "open"
            self.client.sock.settimeout(left)
            try:
                data = self.client.sock.recv(262_144)
            except TimeoutError:
                continue
            except OSError:
                self.end = "reset"
                continue
            self._take(data)
        return True

    def empty(self) -> None:
        """Takes what is in the kernel's buffer."""
        with contextlib.suppress(OSError):
            self.client.sock.settimeout(0)
            while self.end == "open" and (data := self.client.sock.recv(262_144)):
                self._take(data)

    def _take(self, data: bytes) -> None:
        if not data:
            self.end = "closed"
        elif self.status:
            self._body(data)
        else:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if separator:
                self._begin(head.decode("latin-1"))
                self._body(data)

    def _begin(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        headers = {key.lower(): value for key, _, value in (li.partition(": ") for li in lines)}
        self.began_ns = time.monotonic_ns()
        self.status = int(first.split()[1])
        self.worker = int(headers.get("x-worker", 0))
        if "content-length" in headers:
            self._length = int(headers["content-length"])

    def _body(self, data: bytes) -> None:
        if self._length is not None:
            self.rest += data
            if len(self.rest) >= self._length:
                self.end = "whole"
            return
        try:
            self.rest += self._chunked.feed(data)
        except BadFraming:
            self.end = "unframed"
        *blocks, self.rest = self.rest.split(b"\n\n")
        self.blocks.update(map(_kind, blocks))
        if self._chunked.finished:
            self.end = "whole"

    def reason(self) -> str:
        """Of a refusal."""
        with contextlib.suppress(ValueError, TypeError):
            return str(json.loads(self.rest)["reason"])
        return ""


def _kind(block: bytes) -> str:
    if block == b"data: [DONE]":
        return "done"
    if block.startswith(b":"):
        return "ping"
    if block.startswith(b"event: error"):
        return "error"
    return "token" if b'"finish_reason":null' in block else "other"


@dataclass(frozen=True)
class Press:
    """A cancel and its answer. Status 0: its connection broke."""

    status: int
    reason: str
    named: bool
    begin_ns: int
    end_ns: int


@dataclass
class Visit:
    """What became of a script.

    Attributes:
        readers: Its connections; two where one supersedes.
        stopped_ns: From then on nothing may be generated any more: the cancel's 200, the newer
            stream's headers.
        pressed_ns: When the client wanted that.
        acted_ns: When what it did had been answered; what comes later changes nothing any more.
        left_ns: The same as `stopped_ns`, of a client that left: the instant before.
        gave_up: It left, since what it waited for did not come.
        trouble: An exception of the driver's own.
    """

    script: Script
    begin_ns: int = 0
    end_ns: int = 0
    readers: list[Reader] = field(default_factory=list)
    presses: list[Press] = field(default_factory=list)
    stopped_ns: int | None = None
    pressed_ns: int | None = None
    acted_ns: int | None = None
    left_ns: int | None = None
    gave_up: bool = False
    trouble: str = ""


def visit(script: Script, stage: Stage) -> Visit:
    """Carries a script out. Blocks until its connections are closed."""
    made = Visit(script, begin_ns=time.monotonic_ns())
    try:
        _ACTS[script.act](made, stage)
    except Exception as error:
        made.trouble = repr(error)
    finally:
        for reader in made.readers:
            reader.client.close()
        made.end_ns = time.monotonic_ns()
    return made


# The acts


def _ask(made: Visit, stage: Stage, which: int = 0) -> Reader:
    """Sends the question."""
    script = made.script
    buffer = STALL_BUFFER if script.stalls else None
    reader = Reader(stage.hosts[script.hosts[which]].server.port, receive_buffer=buffer)
    made.readers.append(reader)
    simulate = {"id": script.stream(which), **script.simulate}
    if which:
        simulate |= {"rate": 50, "tokens": 20}
    with contextlib.suppress(OSError):  # a worker that is killed; the reader will see it
        reader.client.post(script.session, script.stream(which), simulate=simulate)
    return reader


def _until_the_moment(made: Visit, stage: Stage) -> Reader:
    """Asks, and reads until the client acts."""
    script = made.script
    reader = _ask(made, stage)
    if script.tokens and not reader.read(lambda: reader.tokens >= script.tokens, STOPPED_S):
        return reader
    if script.stalls:
        time.sleep(script.after)  # it reads nothing in this time
    else:
        reader.read(lambda: False, script.after)
    return reader


def _read(made: Visit, stage: Stage) -> None:
    _finish(made, _until_the_moment(made, stage), WHOLE_S)


def _finish(made: Visit, reader: Reader, seconds: float) -> None:
    """Reads to the end; leaves when there is none."""
    if not reader.read(None, seconds):
        made.gave_up = True
        _close(made, reader)


def _close(made: Visit, reader: Reader) -> None:
    reader.empty()
    made.left_ns = time.monotonic_ns()
    # A close with unread bytes would be a RST.
    with contextlib.suppress(OSError):
        reader.client.half_close()
    reader.client.close()


def _reset(made: Visit, reader: Reader) -> None:
    reader.empty()
    made.left_ns = time.monotonic_ns()
    with contextlib.suppress(OSError):
        reader.client.reset()


def _fin(made: Visit, stage: Stage) -> None:
    _close(made, _until_the_moment(made, stage))


def _rst(made: Visit, stage: Stage) -> None:
    _reset(made, _until_the_moment(made, stage))


def _half(made: Visit, stage: Stage) -> None:
    reader = _until_the_moment(made, stage)
    reader.empty()
    made.left_ns = time.monotonic_ns()
    with contextlib.suppress(OSError):
        reader.client.half_close()
    _finish(made, reader, STOPPED_S)


def _cancel(made: Visit, stage: Stage) -> None:
    reader = _until_the_moment(made, stage)
    made.pressed_ns = time.monotonic_ns()
    for pause in (*_PAUSES, 0.0)[:PRESSES]:
        press = _press(made, stage)
        if press.status == 200:
            made.stopped_ns = press.end_ns
        if press.status == 200 or (press.status == 404 and press.named):
            break
        if reader.read(None, pause):
            break
    made.acted_ns = time.monotonic_ns()
    _finish(made, reader, STOPPED_S)


def _early(made: Visit, stage: Stage) -> None:
    _press(made, stage)
    reader = _ask(made, stage)
    reader.read(lambda: reader.status != 0, STOPPED_S)
    made.acted_ns = time.monotonic_ns()
    _finish(made, reader, STOPPED_S)


def _press(made: Visit, stage: Stage) -> Press:
    """Cancels, as often as the script has it, at once. Returns the answer that says most."""
    script = made.script
    port = stage.hosts[script.hosts[1]].server.port
    pressers = [
        threading.Thread(target=_press_once, args=(made, port)) for _ in range(script.presses - 1)
    ]
    before = len(made.presses)
    for presser in pressers:
        presser.start()
    _press_once(made, port)
    for presser in pressers:
        presser.join()
    return min(made.presses[before:], key=lambda press: press.status or 999)


def _press_once(made: Visit, port: int) -> None:
    script = made.script
    path = f"/api/chat/cancel/{script.session}"
    path += f"?streamId={script.stream()}" if script.named else ""
    begin, status, reason = time.monotonic_ns(), 0, ""
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as to:
            to.request("POST", path)
            response = to.getresponse()
            body = json.loads(response.read())
            status, reason = response.status, str(body.get("reason", body.get("cancelled")))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = repr(error)
    made.presses.append(Press(status, reason, script.named, begin, time.monotonic_ns()))


def _supersede(made: Visit, stage: Stage) -> None:
    first = _until_the_moment(made, stage)
    first.read(lambda: first.status != 0, STOPPED_S)  # else the second may be there first
    made.pressed_ns = time.monotonic_ns()
    second = _ask(made, stage, 1)
    if second.read(lambda: second.status != 0, STOPPED_S):
        made.stopped_ns = time.monotonic_ns()
    made.acted_ns = time.monotonic_ns()
    _finish(made, first, STOPPED_S)
    _finish(made, second, WHOLE_S)


def _raw(made: Visit, stage: Stage) -> None:
    data, statuses = made.script.raw
    reader = Reader(stage.hosts[made.script.hosts[0]].server.port)
    made.readers.append(reader)
    with contextlib.suppress(OSError):
        reader.client.sock.sendall(data.encode("latin-1"))
    if statuses != (0,):
        reader.read(None, STOPPED_S)
    with contextlib.suppress(OSError):
        reader.client.sock.shutdown(socket.SHUT_RDWR)


_ACTS: dict[str, Callable[[Visit, Stage], None]] = {
    "read": _read,
    "cancel": _cancel,
    "early": _early,
    "fin": _fin,
    "rst": _rst,
    "half": _half,
    "stuck": _read,
    "supersede": _supersede,
    "raw": _raw,
}
