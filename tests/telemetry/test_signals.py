"""signals: what a listener can say of itself."""

from __future__ import annotations

from chatstream.telemetry.signals import needs_text, usage_only


def test_a_listener_needs_the_text() -> None:
    """Unless it says that it does not; it stays the function that it was."""

    def listen() -> str:
        return "heard"

    assert needs_text(listen)
    assert usage_only(listen) is listen
    assert not needs_text(listen)
    assert listen() == "heard"


def test_a_method_can_say_so_too() -> None:
    """blinker keeps bound ones, which have what their function has."""

    class Counter:
        @usage_only
        def count(self) -> None: ...

    assert not needs_text(Counter().count)
