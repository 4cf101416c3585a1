"""An app with some live streams, and who looks at them."""

from __future__ import annotations

from typing import Any

import flask
from flask.testing import FlaskClient

from chatstream import Cause, ChatStream, Service, Stream

PAYLOAD = b'{"messages":[{"role":"user","content":"hi"}]}'


class Desk:
    """An app with some live streams, and who looks at them."""

    def __init__(self, **settings: Any) -> None:
        self.caller: Any = "7"
        self.admin = False
        app = flask.Flask("watching")
        app.config.from_mapping(
            CHATSTREAM_UPSTREAM_URL="http://127.0.0.1:9/", CHATSTREAM_HEALTH="/", **settings
        )
        app.config["CHATSTREAM_MAX_STREAMS"] = 8
        ChatStream(app, identify=lambda: self.caller, admin=lambda: self.admin)
        self.service: Service = app.extensions["chatstream"]
        self.client: FlaskClient = app.test_client()
        self._opened = [
            self.service.open(PAYLOAD, session_id=name, stream_id=f"{name}-1", owner=owner)
            for owner, name in (("7", "a"), ("7", "b"), ("8", "a"), ("", "c"))
        ]

    @property
    def streams(self) -> list[Stream]:
        return [iterable.stream for iterable in self._opened]

    @property
    def causes(self) -> list[Cause | None]:
        return [stream.cause for stream in self.streams]

    def close(self) -> None:
        for iterable in self._opened:
            iterable.close()
        self.service.stop()
