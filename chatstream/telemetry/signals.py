"""What an app can listen to. Signals of blinker's, which Flask has too; each carries one value.

    from chatstream import stream_ended

    @stream_ended.connect_via(app)
    def keep(app, outcome):
        ...

The sender is the Flask app. A listener is called in the thread that served the stream, with an app
context of its own and no request: by then there may be none. What it raises is logged, and harms
neither the stream nor other listeners. It should be quick: it has a thread of the server's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from blinker import Namespace

_names = Namespace()

_Listener = TypeVar("_Listener", bound=Callable[..., Any])

stream_started = _names.signal(
    "stream-started",
    doc="""A stream has its slot and its names; the provider is about to be called.

    `started`: a `Started`.
    """,
)

stream_ended = _names.signal(
    "stream-ended",
    doc="""A stream is over: exactly once for each that was started.

    `outcome`: an `Outcome`. Its text is collected where somebody listened when it began.
    """,
)

cancel_answered = _names.signal(
    "cancel-answered",
    doc="""A cancel has its answer, in the worker that it reached.

    `cancel`: a `Cancelled`.
    """,
)


def usage_only(listener: _Listener) -> _Listener:
    """Says of a listener of `stream_ended` that it needs no text. A decorator.

    Where no other listens, an outcome has its `usage` and neither `text`, `reasoning` nor `model`:
    that takes a fraction of the time, and no memory.
    """
    listener.text_unneeded = True  # type: ignore[attr-defined]
    return listener


def needs_text(listener: Callable[..., Any]) -> bool:
    """Whether a listener was not said to need none."""
    return not getattr(listener, "text_unneeded", False)
