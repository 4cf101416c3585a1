"""Apps for our workers that have nothing to do with chatstream, or little."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask

from chatstream import ChatStream


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Plain WSGI: says how long the body was. What it is to know of errors is in its path."""
    length = _carelessly(environ) if environ["PATH_INFO"] == "/careless" else _length(environ)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d\n" % length]


def _length(environ: dict[str, Any]) -> int:
    return len(environ["wsgi.input"].read())


def _carelessly(environ: dict[str, Any]) -> int:
    """Reads on after an error, and knows no other end than none."""
    for _ in range(3):
        try:
            return _length(environ)
        except OSError:
            continue
    return 0


configured = Flask("configured")
configured.config["CHATSTREAM_REQUEST_TIMEOUT"] = 0.5
configured.config["CHATSTREAM_HEADERS_TIMEOUT"] = 1
configured.config["CHATSTREAM_KEEPALIVE_TIMEOUT"] = 0.7
configured.config["CHATSTREAM_URL_PREFIX"] = "/mine"
ChatStream(configured)
