"""What an app may say for itself: who asks, who is an admin, what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Prepare = Callable[[dict[str, Any], str], Any]
"""The app's word on what is sent: `prepare(payload, owner)`.

Called in the view, so with the app's and the request's contexts, before the stream has a slot.
`payload` is the request's JSON with `sessionId` and `streamId` filled in, which are the stream's
whatever becomes of them there. It may be changed, or another dict returned in its place; a response
is sent instead, and `Refused` is raised to refuse in the route's own words.
"""

Identify = Callable[[], Any]
"""Names the caller of the present request: a str or an int. A response is sent as it is; None is
answered with 401."""

Admin = Callable[[], bool]
"""Whether the caller of the present request may see and stop everybody's streams. A database's 0, 1
and None are good as well; all else is a TypeError, since a mistake's value is mostly true."""
