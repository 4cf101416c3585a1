"""`sessions` and `cancel`: what lives in all workers of an app, and its end by an operator."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from chatstream import bus
from chatstream.bus.base import MOST, Bus
from chatstream.bus.messages import Found, Listing, Live, Worker
from chatstream.bus.unix.directory import default_base, living
from chatstream.cli.terminal import Terminal
from chatstream.errors import BusUnavailable, StreamError, Unconfirmed
from chatstream.settings.table import Settings

UNKNOWN = 1
"""The exit code where nothing of that name lives."""

UNSURE = 2
"""The exit code where that cannot be found out."""

COLUMNS = ("SESSION", "STREAM", "OWNER", "PHASE", "SECONDS", "EVENTS", "WORKER", "HOST")


class NotFound(Exception):
    """No service could be asked; the message says what to do."""


class Sighting(NamedTuple):
    """A live stream, and where it was seen."""

    bus: Bus
    worker: Worker
    live: Live


class Sight(NamedTuple):
    """What was seen of an app's services.

    Attributes:
        streams: All that live.
        workers: All workers, also the silent ones.
        cut: Whether there are more than were asked for.
        buses: The services.
    """

    streams: list[Sighting]
    workers: list[Found]
    cut: bool
    buses: list[Bus]

    @property
    def silent(self) -> list[Worker]:
        """Those that do not answer."""
        return [found.worker for found in self.workers if not found.answered]


def show(
    settings: Settings, app: str, terminal: Terminal, *, owner: str | None, as_json: bool
) -> int:
    """`sessions`.

    Args:
        settings: The app's.
        app: Its name on the bus.
        terminal: Where the list goes.
        owner: Whose; None for everybody's.
        as_json: Whether a program reads it.

    Returns:
        The exit code: 0 or `UNSURE`.
    """
    with _answered_in_words(terminal), _sight(settings, app, _list_of(owner)) as sight:
        if as_json:
            terminal.line(json.dumps(_facts(sight)))
        elif sight.streams or not terminal.interactive:
            terminal.table(COLUMNS, [_row(each) for each in sight.streams])
        else:
            terminal.line("Nothing lives.")
        _complain_of(sight, terminal)
        return 0
    return UNSURE


def stop(
    settings: Settings,
    app: str,
    terminal: Terminal,
    session_id: str,
    *,
    stream_id: str | None,
    owner: str | None,
) -> int:
    """`cancel`: the streams of a session are aborted, cause CANCEL, as by the endpoint.

    Args:
        settings: The app's.
        app: Its name on the bus.
        terminal: Where the answer goes.
        session_id: The chat's.
        stream_id: The one stream's; None for whichever is live.
        owner: Whose; None where only one owner has such a session.

    Returns:
        The exit code: 0 when the provider has been told, `UNKNOWN` or `UNSURE`.
    """
    with _answered_in_words(terminal), _sight(settings, app, _list_of(owner)) as sight:
        found = [
            each
            for each in sight.streams
            if each.live.name.session_id == session_id
            and stream_id in (None, each.live.name.stream_id)
        ]
        if len({each.live.name.owner for each in found}) > 1:
            terminal.complain("Several owners have such a session. Name one: --owner")
            terminal.table(COLUMNS, [_row(each) for each in found])
            return UNKNOWN
        stopped = [each for each in found if each.bus.cancel(*_names(each))]
        _say_stopped(stopped, terminal)
        return 0 if stopped else _not_found(sight, terminal, session_id, stream_id, owner)
    return UNSURE


def stop_all(settings: Settings, app: str, terminal: Terminal, *, owner: str | None) -> int:
    """`cancel --all`: all that lives is aborted, cause CANCEL.

    Args:
        settings: The app's.
        app: Its name on the bus.
        terminal: Where the answer goes.
        owner: Whose; None for everybody's.

    Returns:
        The exit code: 0 when nothing of it lives any more, also where nothing did; or `UNSURE`.
    """
    with _answered_in_words(terminal), _sight(settings, app, _end_of(owner)) as sight:
        _say_stopped(sight.streams, terminal)
        if not sight.silent:
            terminal.complain(f"{len(sight.streams)} stopped.")
            return 0
        _complain_of(sight, terminal)
        terminal.complain("What lives there ends when it does.")
    return UNSURE


def _say_stopped(streams: list[Sighting], terminal: Terminal) -> None:
    for each in streams:
        name = each.live.name
        terminal.line(f"stopped: session {name.session_id}, stream {name.stream_id}")


def _list_of(owner: str | None) -> Callable[[Bus], Listing]:
    return lambda visitor: visitor.list(owner)


def _end_of(owner: str | None) -> Callable[[Bus], Listing]:
    return lambda visitor: visitor.cancel_all(owner)


def _not_found(
    sight: Sight, terminal: Terminal, session_id: str, stream_id: str | None, owner: str | None
) -> int:
    if owner is not None and (sight.silent or sight.cut):
        # By its name alone. Unconfirmed, where a silent one has it: then that one will stop it.
        for each in sight.buses:
            if each.cancel(owner, session_id, stream_id):
                terminal.line(f"stopped: session {session_id}")
                return 0
    if sight.silent or sight.cut:
        _complain_of(sight, terminal)
        hint = "" if owner is not None else " With --owner it is told to stop all the same."
        terminal.complain(f"Whether such a session lives is not known.{hint}")
        return UNSURE
    terminal.complain(f"No such session: {session_id}")
    return UNKNOWN


@contextlib.contextmanager
def _answered_in_words(terminal: Terminal) -> Iterator[None]:
    """Says what kept the services from being asked. What follows in the caller is for that case."""
    try:
        yield
    except Unconfirmed:
        terminal.complain("The worker that has it does not answer. It stops it when it does.")
    except BusUnavailable:
        terminal.complain(
            "The workers cannot be found now: the bus is away, or has just begun. Try again in"
            " some seconds; `doctor` says more."
        )
    except (NotFound, StreamError, OSError) as error:
        terminal.complain(str(error))


@contextlib.contextmanager
def _sight(settings: Settings, app: str, ask: Callable[[Bus], Listing]) -> Iterator[Sight]:
    """Looks into all services of the app.

    Args:
        settings: The app's.
        app: Its name on the bus.
        ask: What each service is asked.

    Raises:
        NotFound: There is none.
        OSError: One cannot be looked into.
        BusUnavailable: One is there, and its workers cannot be found.
    """
    if settings.bus == "local":
        raise NotFound(
            "CHATSTREAM_BUS is local: each process knows its own streams only, and nobody can ask."
            " Leave it out under gunicorn, or set unix:///a/directory or redis://."
        )
    with contextlib.ExitStack() as stack:
        sight = Sight([], [], False, bus.visit(settings, app))
        for visitor in sight.buses:
            stack.callback(visitor.close)
        for visitor in sight.buses:
            listing = ask(visitor)
            sight = sight._replace(cut=sight.cut or listing.cut)
            for found in listing.workers:
                sight.workers.append(found)
                sight.streams.extend(
                    Sighting(visitor, found.worker, live) for live in found.streams
                )
        if not sight.workers:
            raise NotFound(_nobody(settings))
        yield sight


def _nobody(settings: Settings) -> str:
    """Why no worker may have been found, and what to do."""
    where = settings.bus or "unix"
    if where.startswith("redis"):
        return (
            "No worker is registered in this Redis under the prefix"
            f" {settings.bus_prefix!r} (CHATSTREAM_BUS_PREFIX)."
        )
    path = where.removeprefix("unix").removeprefix("://")
    base = Path(path) if path else default_base()
    sentence = f"No worker of this app is running as this user (looked below {base})."
    if living(base, ""):
        sentence += " Others are: is this the same --app, with the same CHATSTREAM_URL_PREFIX?"
    mine = f"chatstream-{os.geteuid()}"
    if users := [p.name[11:] for p in base.glob("chatstream-*") if p.name != mine]:
        sentence += f" There is something of uid {', '.join(sorted(users))}: run this as that user."
    if path:
        return sentence
    return (
        f"{sentence} A service with a bus of its own is found with its CHATSTREAM_BUS; one under"
        " another server than gunicorn needs one: unix:///a/directory."
    )


def _names(each: Sighting) -> tuple[str, str, str]:
    return each.live.name


def _row(each: Sighting) -> list[object]:
    owner, session_id, stream_id = each.live.name
    figures = [each.live.phase, f"{each.live.seconds:.1f}", each.live.events]
    return [session_id, stream_id, owner, *figures, each.worker.pid, each.worker.host]


def _facts(sight: Sight) -> dict[str, object]:
    """The list for programs."""
    sessions = [
        {
            "session": each.live.name.session_id,
            "stream": each.live.name.stream_id,
            "owner": each.live.name.owner,
            "phase": each.live.phase,
            "seconds": round(each.live.seconds, 3),
            "events": each.live.events,
            "pid": each.worker.pid,
            "host": each.worker.host,
        }
        for each in sight.streams
    ]
    workers = [
        {"pid": found.worker.pid, "host": found.worker.host, "answered": found.answered}
        for found in sight.workers
    ]
    return {"sessions": sessions, "workers": workers, "cut": sight.cut}


def _complain_of(sight: Sight, terminal: Terminal) -> None:
    """Names what is missing."""
    for worker in sight.silent:
        terminal.complain(f"Worker {worker.pid} on {worker.host} does not answer.")
    if sight.cut:
        terminal.complain(f"There are more: only some {MOST} were asked for.")
