"""What the owner of an app needs to test that a stop reaches the provider: a pytest plugin.

    def test_a_stop_reaches_my_provider(chatstream_provider, chatstream_live):
        live = chatstream_live(create_app())
        answer = live.ask("Tell me a story.")
        answer.stop()
        assert chatstream_provider.told(answer).stop_ms < 1000

pytest loads this module in every run on a machine that has chatstream, so it brings nothing along:
what the fixtures need is imported when a test asks for one. All names of fixtures begin with
`chatstream_`. Without the fixtures, `Provider` and `Live` are context managers.

`provider` is scripted (`script`), `live` serves an app, `browser` asks it and gets an `answer`;
`threads` says which of them are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flask import Flask

    from chatstream.testing.answer import Answer, Event, Reply
    from chatstream.testing.browser import Browser
    from chatstream.testing.live import Live
    from chatstream.testing.provider import Figure, Provider


__all__ = ["Answer", "Browser", "Event", "Figure", "Live", "Provider", "Reply"]

_ROOMS = {
    "Browser": "browser",
    "Figure": "provider",
    "Live": "live",
    "Provider": "provider",
}  # else answer


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chatstream.testing' has no attribute {name!r}")
    value = getattr(import_module(f"chatstream.testing.{_ROOMS.get(name, 'answer')}"), name)
    globals()[name] = value  # from now on Python finds it by itself
    return value


@pytest.fixture
def chatstream_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    """A provider on a socket of this machine, which does what the test's script says.

    An app that is made by the test finds it through the environment (CHATSTREAM_UPSTREAM_URL and
    CHATSTREAM_API_KEY, unless `app.config` has them); one that has been made before is pointed at
    it with `chatstream_provider.attach(app)`, as `chatstream_live` does by itself. See `Provider`.
    """
    from chatstream.testing.provider import Provider, without_proxy
    from chatstream.testing.threads import ended_threads

    with ended_threads(), Provider() as provider:
        monkeypatch.setenv("CHATSTREAM_UPSTREAM_URL", provider.url)
        monkeypatch.setenv("CHATSTREAM_API_KEY", provider.key)
        for name, value in without_proxy().items():
            monkeypatch.setenv(name, value)
        yield provider


@pytest.fixture
def chatstream_live(chatstream_provider: Provider) -> Iterator[Callable[[Flask], Live]]:
    """Serves an app on a socket of this machine until the test's end, with the test's provider.

    `chatstream_live(app)` returns a `Live`: the server, and a browser to ask it with.
    """
    from chatstream.testing.live import Live

    with ExitStack() as served:

        def serve(app: Flask) -> Live:
            __tracebackhide__ = True
            chatstream_provider.attach(app)
            return served.enter_context(Live(app))

        yield serve
