"""Starts the built-in provider and gunicorn; prints what to open and type. Ctrl-C ends both."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

GUIDE = """
chatstream is running, with a provider that needs no key.

  open {address}/
     to chat, to stop, and to see what the provider counts meanwhile.

Or, in another terminal:

  1. stream an answer (two thousand words, twenty a second):
     curl -N {chat}/stream -H 'Content-Type: application/json' -d '{body}'

  2. stop it (or press Ctrl-C in the first terminal: a client that leaves is a stop too):
     curl -X POST {chat}/cancel/demo

  3. see that the provider stopped generating ("generated", "closed_by"):
     curl {provider}/requests/demo

Ctrl-C here ends both servers. What they log:
"""

BODY = (
    '{"sessionId": "demo", "messages": [{"role": "user", "content": "Tell me a story."}],'
    ' "simulate": {"id": "demo", "tokens": 2000}}'
)


def free_port(wanted: int) -> int:
    """`wanted`, or another one where that is taken."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", wanted))
        except OSError:
            sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(*command: str, ready: str, **environ: str) -> tuple[subprocess.Popen[str], str]:
    """Starts `python -m command`; returns it and the address it says it listens at."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if match := re.search(ready, line):
            return process, match[1]
    sys.exit(f"{command[0]} did not start:\n{seen}")


def main() -> None:
    provider, origin = start(
        "chatstream.simulator", "--port", "0", ready=r"listening on (http://[^/]+)"
    )
    with ending(provider):
        service, address = start(
            "gunicorn",
            "wsgi:app",
            ready=r"Listening at: (\S+)",
            CHATSTREAM_UPSTREAM_URL=f"{origin}/v1/chat/completions",
            CHATSTREAM_API_KEY="no-key-needed",
            CHATSTREAM_PAGE="/",
            CHATSTREAM_METER="1",
            CHATSTREAM_BIND=f"127.0.0.1:{free_port(8000)}",
            PYTHONUNBUFFERED="1",
        )
        with ending(service, shown=True), contextlib.suppress(KeyboardInterrupt):
            chat = f"{address}/api/chat"
            print(GUIDE.format(address=address, chat=chat, provider=origin, body=BODY), flush=True)
            show(service)


@contextlib.contextmanager
def ending(process: subprocess.Popen[str], *, shown: bool = False):  # type: ignore[no-untyped-def]
    """Ends exactly this process; where it is `shown`, with its last words."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # it is ending already
            signal.signal(number, signal.SIG_IGN)
        process.send_signal(signal.SIGTERM)
        if shown:
            show(process)  # how its streams ended
        process.wait(40)


def show(process: subprocess.Popen[str]) -> None:
    """Prints what the process says, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        print("  " + line, end="", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a shell's background
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with contextlib.suppress(KeyboardInterrupt):  # before it has begun
        main()
