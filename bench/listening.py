"""The standalone app, with somebody who listens to the end of its streams, and so to their text."""

from __future__ import annotations

from flask import Flask

from chatstream import Outcome, stream_ended
from wsgi import app

__all__ = ["app"]


@stream_ended.connect_via(app)
def heard(sender: Flask, outcome: Outcome) -> None:
    """What a listener does with it is its own."""
    assert outcome.text is not None
