"""`doctor`: what is wrong with a service, before its users say so. Costs no tokens.

A `check` is one thing looked at: of the `settings`, the `provider`, the `server`, the `bus`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from chatstream.cli.doctor.bus import check_bus
from chatstream.cli.doctor.check import Check, State
from chatstream.cli.doctor.provider import check_provider
from chatstream.cli.doctor.server import (
    Gunicorn,
    check_gunicorn,
    check_kernel,
    check_reach,
    read_gunicorn,
)
from chatstream.cli.doctor.settings import check_app, check_key, check_keys, given_keys
from chatstream.cli.terminal import Terminal
from chatstream.settings.table import Settings

if TYPE_CHECKING:
    from chatstream.service.service import Service


STYLES = {State.OK: "green", State.NOTE: "cyan", State.WARN: "yellow", State.FAIL: "bold red"}

_WIDTHS = (6, 12)
"""Columns of a check's state and of its name."""


def examine(
    service: Service | None,
    config: Mapping[str, object],
    fault: str,
    arguments: str,
    terminal: Terminal,
    *,
    as_json: bool,
) -> int:
    """Looks at everything, and says so as it goes.

    Args:
        service: The app's; None where the app cannot be loaded: then the environment is looked at.
        config: The app's.
        fault: Why it cannot.
        arguments: gunicorn's, beside its file.
        terminal: Where it is said.
        as_json: Whether a program reads it.

    Returns:
        The exit code: 1 where something fails.
    """
    checks = []
    for check in _checks(service, config, fault, arguments, terminal):
        checks.append(check)
        if not as_json:
            _say(check, terminal)
    failed = any(check.state is State.FAIL for check in checks)
    if as_json:
        said = [{**check._asdict(), "state": check.state.value} for check in checks]
        terminal.line(json.dumps({"ok": not failed, "checks": said}))
    return int(failed)


def _say(check: Check, terminal: Terminal) -> None:
    terminal.write(check.state.value.ljust(_WIDTHS[0]), STYLES[check.state])
    terminal.write(check.name.ljust(_WIDTHS[1]))
    terminal.paragraph(check.says, sum(_WIDTHS))


def _checks(
    service: Service | None,
    config: Mapping[str, object],
    fault: str,
    arguments: str,
    terminal: Terminal,
) -> Iterator[Check]:
    settings, faults = Settings.survey(config, os.environ)
    yield from check_keys(faults, given_keys(config, os.environ))
    if fault and not faults:
        yield Check("app", State.FAIL, fault)
    yield check_key(settings, os.environ)
    if service is not None:
        yield from check_app(
            settings,
            identifies=service.identify is not None,
            listened=service.has_readers(),
        )
    # In the place of a wrong address there is the default here, which is nobody's.
    if not any(fault.startswith("CHATSTREAM_UPSTREAM_URL ") for fault in faults):
        with terminal.waiting("asking the provider"):
            provider = list(_guarded("provider", lambda: check_provider(settings)))
        yield from provider
    yield from _look_around(settings, service, arguments)
    yield check_kernel()


def _look_around(settings: Settings, service: Service | None, arguments: str) -> Iterator[Check]:
    """Server and bus."""
    app = service.name if service else ""
    gunicorn = read_gunicorn(arguments)
    workers = gunicorn.workers if isinstance(gunicorn, Gunicorn) else None
    if isinstance(gunicorn, Gunicorn):
        yield from check_gunicorn(gunicorn, settings)
        if service is not None:
            yield from check_reach(gunicorn, settings, identifies=service.identify is not None)
    else:
        yield gunicorn
    yield from _guarded("bus", lambda: check_bus(settings, app, workers))


def _guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """What a look finds; that it fails in a way nobody foresaw is a finding, and not the end."""
    try:
        yield from look()
    except Exception as error:
        yield Check(name, State.FAIL, f"Could not be looked at: {type(error).__name__}: {error}")
