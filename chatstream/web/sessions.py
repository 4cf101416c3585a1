"""What lives, and its end: the routes for those who watch over a service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import request
from flask.blueprints import BlueprintSetupState

from chatstream.bus.messages import Listing, Live, Worker
from chatstream.errors import Refused, StreamError
from chatstream.web.caller import is_admin, owner, service
from chatstream.web.health import healthz, readyz
from chatstream.web.replies import as_json, other_method, refuse
from chatstream.web.request import argument
from chatstream.web.routing import add_routes


def routes(prefix: str, health: str | None) -> Callable[[BlueprintSetupState], None]:
    """What enters the routes.

    Args:
        prefix: Where the chat's are.
        health: Where healthz and readyz are, from the app's root on; None for nowhere.
    """

    def add(state: BlueprintSetupState) -> None:
        listed = (f"{prefix}/sessions", "sessions", sessions)
        add_routes(state, (listed, (f"{prefix}/cancel-all", "cancel_all", cancel_all)))
        if health is not None:
            at = health.rstrip("/")
            add_routes(
                state, ((f"{at}/healthz", "healthz", healthz), (f"{at}/readyz", "readyz", readyz))
            )

    return add


def sessions() -> Any:
    """GET /sessions: what lives in all workers, of one's own; of others, for an admin."""
    if request.method not in ("GET", "HEAD"):
        return other_method("GET, HEAD, OPTIONS")
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    try:
        whose = _whose(name)
        listing = service().sessions(whose)
    except StreamError as error:
        return refuse(error)
    found = [
        _shown(live, None if whose == name else each.worker)
        for each in listing.workers
        for live in each.streams
    ]
    return as_json({"ok": True, "complete": _complete(listing), "sessions": found}, 200)


def cancel_all() -> Any:
    """POST /cancel-all: stops what lives in all workers, of one's own; of others, for an admin."""
    if request.method != "POST":
        return other_method()
    name = owner(refuse)
    if not isinstance(name, str):
        return name
    try:
        listing = service().cancel_all(_whose(name))
    except Refused as error:
        return refuse(error)
    except StreamError as error:
        return as_json({"ok": False, "reason": error.code}, error.status)
    stopped = sum(len(each.streams) for each in listing.workers)
    if not _complete(listing):
        return as_json({"ok": False, "reason": "unconfirmed", "cancelled": stopped}, 504)
    return as_json({"ok": True, "cancelled": stopped}, 200)


def _whose(name: str) -> str | None:
    """Whose streams a request is about; None for everybody's.

    Raises:
        Refused: 403, they are not the caller's.
        TypeError: `admin` returned something else than it may.
    """
    everybody = argument("all") not in (None, "", "0")
    whose = None if everybody else argument("owner")
    if not everybody and whose in (None, name):
        return name
    if not is_admin():
        raise Refused("Only an admin may do that.", code="forbidden", status=403)
    return whose


def _complete(listing: Listing) -> bool:
    return not listing.cut and all(each.answered for each in listing.workers)


def _shown(live: Live, worker: Worker | None) -> dict[str, Any]:
    """A stream as its owner sees it; with `worker`, as an admin does."""
    stream = {
        "sessionId": live.name.session_id,
        "streamId": live.name.stream_id,
        "phase": live.phase,
        "seconds": round(live.seconds, 3),
        "events": live.events,
    }
    if worker is None:
        return stream
    return {**stream, "owner": live.name.owner, "host": worker.host, "pid": worker.pid}
