"""The command: `python -m chatstream.simulator`, and `flask chatstream simulate`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from chatstream.simulator.server import Simulator


def _setting(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chatstream.simulator", description="A provider to try and test with."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=9911, help="0 takes a free one (default: %(default)s)")
    add("--rate", type=float, help="tokens per second (default: 20)")
    add("--tokens", type=int, help="tokens of an answer (default: 200)")
    add("--set", type=_setting, action="append", default=[], metavar="KEY=JSON",
        help="a default of simulate, such as silent_after=10")  # fmt: skip
    add("--certfile", help="PEM file; turns TLS on")
    add("--keyfile", help="PEM file, unless the key is in --certfile")
    add("--handshake-delay", type=float, default=0, metavar="SECONDS", help="before TLS begins")
    add("--quiet", action="store_true", help="no line for every request that has ended")
    return parser


def _say(line: str) -> None:
    # A pipe that nobody empties must not stop the clock, so the line is dropped if it would block.
    # A writable pipe takes PIPE_BUF bytes at once (pipe(7)).
    data = f"chatstream simulator: {line}\n".encode("utf-8", "replace")[: select.PIPE_BUF]
    with suppress(OSError, ValueError):
        if select.select([], [1], [], 0)[1]:
            os.write(1, data)


def _raise_file_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 after SIGTERM or SIGINT, 2 if it cannot serve."""
    parser = _parser()
    options = parser.parse_args(argv)
    given = {"rate": options.rate, "tokens": options.tokens, **dict(options.set)}
    _raise_file_limit()
    try:
        simulator = Simulator(
            options.host,
            options.port,
            certfile=options.certfile,
            keyfile=options.keyfile,
            handshake_delay=options.handshake_delay,
            defaults={key: value for key, value in given.items() if value is not None},
            say=None if options.quiet else _say,
        )
    except (OSError, ValueError, OverflowError) as error:
        print(f"chatstream simulator: {_explain(error, options)}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: simulator.close())
    print(f"chatstream simulator: listening on {simulator.url}", flush=True)
    simulator.serve_forever()
    return 0


def _explain(error: Exception, options: argparse.Namespace) -> str:
    if not isinstance(error, OSError):
        return str(error)
    address = f"{options.host}:{options.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{address} is in use; stop the other program or choose another --port"
    return f"cannot listen on {address}: {error.strerror or error}"
