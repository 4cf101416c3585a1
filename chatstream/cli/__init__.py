"""The `flask chatstream` commands."""

from __future__ import annotations

import click

group = click.Group("chatstream", help="Streams of an LLM provider that stop when told to.")


@group.command("simulate", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Runs the built-in provider; --help lists its options."""
    from chatstream import simulator  # not needed by an app that serves

    raise SystemExit(simulator.main(list(arguments)))
