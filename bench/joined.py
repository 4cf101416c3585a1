"""Workers of a service that hold some streams and wait: `python -m bench.joined BUS COUNT`.

Prints a line once all have joined. They end when standard input is closed.
"""

from __future__ import annotations

import os
import sys

from chatstream.bus import create
from chatstream.bus.base import Bus
from chatstream.bus.messages import Action, Answer, Claim, Name, Request
from chatstream.settings.table import Settings
from chatstream.sockets.loop import Loop

STREAMS = 25
"""Streams of each worker."""


def answer(request: Request) -> Answer:
    """What a worker says whose streams live, and are never asked to stop."""
    return Answer.LIVE if request.action is Action.PROBE else Answer.ABSENT


def join(url: str) -> tuple[Bus, Loop]:
    """A worker's bus, started."""
    loop = Loop()
    bus = create(Settings(bus=url), answer, loop)
    bus.start()
    return bus, loop


def _work(url: str, worker: int, ready: int, end: int) -> None:
    bus, loop = join(url)
    for number in range(STREAMS):
        bus.claim(
            Claim(Name("", f"s-{worker}-{number}", f"a-{worker}-{number}"), number), reject=False
        )
    os.write(ready, b"x")
    os.read(end, 1)  # until it is closed
    bus.close()
    loop.stop()


def main() -> None:
    """Forks the workers before anything of the bus is there."""
    url, count = sys.argv[1], int(sys.argv[2])
    ready, tell = os.pipe()
    end, keep = os.pipe()
    children = []
    for worker in range(count):
        if not (child := os.fork()):
            os.close(keep)
            _work(url, worker, tell, end)
            os._exit(0)
        children.append(child)
    for _ in children:
        os.read(ready, 1)
    print("ready", flush=True)
    sys.stdin.read()
    os.close(keep)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
