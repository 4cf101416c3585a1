"""The commands: `flask chatstream …`, and `python -m chatstream …` for the standalone service.

Each command's room is imported when it runs: `chat` (with `answer` and `interrupt`), `sessions`
(with cancel), `doctor`; what they share of a terminal is in `terminal`. The group is known
to Flask as a plugin, too, so that `doctor` can say what is wrong where the app itself cannot be
loaded.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from flask import Flask
from flask.cli import NoAppException, ScriptInfo

from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from chatstream.service.service import Service


group = click.Group("chatstream", help="Streams of an LLM provider that stop when told to.")

_OWNER = click.option("--owner", metavar="NAME", help="Only streams of this owner.")


def main(create_app: Callable[[], Flask]) -> None:
    """Runs the command line for one app. Does not return.

    Args:
        create_app: Makes the app, where a command needs it.
    """
    # With a name of its own, or Flask would look for an app in the current directory.
    group(obj=ScriptInfo(create_app=create_app), prog_name="python -m chatstream")


@group.command("simulate", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Runs the built-in provider; --help lists its options."""
    from chatstream import simulator  # not needed by an app that serves

    raise SystemExit(simulator.main(list(arguments)))


@group.command("chat")
@click.argument("question", nargs=-1)
@click.option("--model", help="In the place of CHATSTREAM_MODEL.")
@click.option("--session", "session_id", metavar="ID", help="The session's id; else made up.")
@click.option("--system", metavar="TEXT", help="The system's message.")
@click.option("--verbose", "-v", is_flag=True, help="Leave the log on.")
@click.pass_context
def chat(
    ctx: click.Context,
    question: tuple[str, ...],
    model: str | None,
    session_id: str | None,
    system: str | None,
    verbose: bool,
) -> None:
    """Asks the provider; Ctrl-C stops the answer.

    With a QUESTION, or one that comes over a pipe, there is one answer and nothing else.
    """
    from chatstream.cli.chat import Options, converse, once
    from chatstream.cli.terminal import Terminal

    service = _service(ctx)
    _check_id(session_id)
    options = Options(model, session_id, system)
    text = " ".join(question)
    if not text and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise click.UsageError("There is no question: neither an argument nor over the pipe.")
    with contextlib.nullcontext() if verbose else _quiet():
        if text:
            code = once(service, Terminal(), text, options)
        else:
            code = converse(service, Terminal(), options)
    ctx.exit(code)


@group.command("sessions")
@_OWNER
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def sessions(ctx: click.Context, owner: str | None, as_json: bool) -> None:
    """Lists what lives in all workers of the app."""
    from chatstream.cli.sessions import show
    from chatstream.cli.terminal import Terminal

    service = _service(ctx)
    with _quiet():
        code = show(service.settings, service.name, Terminal(), owner=owner, as_json=as_json)
    ctx.exit(code)


@group.command("cancel")
@click.argument("session", required=False)
@click.option("--stream", metavar="ID", help="Only this stream of the session.")
@click.option("--all", "everything", is_flag=True, help="All that lives, in the place of SESSION.")
@_OWNER
@click.pass_context
def cancel(
    ctx: click.Context, session: str | None, stream: str | None, everything: bool, owner: str | None
) -> None:
    """Stops a session's stream, in whichever worker it is; or all that live.

    Exits with 1 where there is no such session, with 2 where that cannot be found out.
    """
    from chatstream.cli.sessions import stop, stop_all
    from chatstream.cli.terminal import Terminal

    if everything is (session is not None) or (everything and stream is not None):
        raise click.UsageError("Name a SESSION, and a --stream of it if you like; or say --all.")
    service = _service(ctx)
    app = (service.settings, service.name, Terminal())
    with _quiet():
        if session is None:
            code = stop_all(*app, owner=owner)
        else:
            code = stop(*app, session, stream_id=stream, owner=owner)
    ctx.exit(code)


@group.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--gunicorn",
    "arguments",
    metavar="ARGUMENTS",
    default="",
    help="What gunicorn is started with, such as '-c other.conf.py --threads 8'.",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, arguments: str) -> None:
    """Looks at settings, provider, server and bus, and says what to change.

    Costs no tokens. Exits with 1 where something is wrong.
    """
    from chatstream.cli.doctor import examine
    from chatstream.cli.terminal import Terminal

    service: Service | None = None
    config: Mapping[str, object] = {}
    fault = ""
    with _quiet():
        try:
            app = _app(ctx)
            config = app.config
            service = _service_of(app)
        except click.ClickException as error:
            fault = error.format_message()
        except SystemExit:  # an app that has said by itself why it does not start
            fault = "The app does not start; the sentence above says why."
        except Exception as error:
            fault = f"The app cannot be loaded: {type(error).__name__}: {error}"
        code = examine(service, config, fault, arguments, Terminal(), as_json=as_json)
    ctx.exit(code)


def _service(ctx: click.Context) -> Service:
    """The app's service.

    Raises:
        click.ClickException: The app cannot be loaded, or has none.
    """
    return _service_of(_app(ctx))


def _app(ctx: click.Context) -> Flask:
    try:
        return ctx.ensure_object(ScriptInfo).load_app()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    except NoAppException as error:
        raise click.ClickException(error.format_message()) from None


def _service_of(app: Flask) -> Service:
    service: Any = app.extensions.get("chatstream")
    if service is None:
        raise click.ClickException(f"{app.import_name} has no ChatStream: ChatStream(app)")
    found: Service = service
    return found


def _check_id(session_id: str | None) -> None:
    from chatstream.stream.stream import ID

    if session_id is not None and not ID.fullmatch(session_id):
        raise click.UsageError("--session takes 1-128 of A-Za-z0-9._:-")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines among what the command says."""
    log = logging.getLogger("chatstream")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)
