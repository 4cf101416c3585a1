"""What a provider may be at when a stop comes, and streams in the middle of it."""

from __future__ import annotations

import json

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Rig

SCENES: dict[str, dict[str, object]] = {
    "headers": {"headers_after": 60},
    "chatty": {"rate": 20, "tokens": 5000},
    "silent": {"rate": 20, "tokens": 5000, "silent_after": 2},
    "silent at once": {"rate": 20, "tokens": 5000, "silent_after": 0},
    "queued": {"queue": 60, "queue_interval": 0.05},
    "unchunked": {"rate": 20, "tokens": 5000, "silent_after": 2, "chunked": False},
    "blocked": {"rate": 500, "tokens": 100_000, "pad": 16384},
}

MOMENTS = ("headers", "chatty", "silent")
"""Where what lies between is tested: before the answer, in it, and in a silence of it."""


def begin(rig: Rig, scene: str, session: str) -> Client:
    """A stream in the middle of its scene."""
    blocked = {"receive_buffer": 4096} if scene == "blocked" else {}
    client = rig.client(**blocked)
    client.post(session, simulate={"id": session, **SCENES[scene]})
    rig.provider.request(session)
    if scene in ("chatty", "silent", "unchunked"):
        client.until(b"data: ")
        rig.provider.request(session, "delivered", count=2)
    elif scene == "queued":
        client.until(b": keep-alive")
    elif scene == "silent at once":
        rig.provider.request(session, "headers")
    elif scene == "blocked":
        eventually(lambda: blocked_at(rig, client), "a full send queue")
    return client


def blocked_at(rig: Rig, client: Client) -> bool:
    """Whether the relay is stuck in its write: a send queue that is there and does not move."""

    def queue() -> int:
        return json.loads(rig.server.get(f"/debug/send-queue/{client.port}")[1]) or 0

    def delivered() -> int:
        return sum(f["delivered"] for f in rig.provider.get("/requests") if f["open"])

    before = (queue(), delivered())
    return before[0] > 0 and all((queue(), delivered()) == before for _ in range(5))
