"""Who asks: the present request's owner, and whether it is an admin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flask import Response, current_app

from chatstream.errors import Refused, StreamError

if TYPE_CHECKING:
    from chatstream.service.service import Service


def service() -> Service:
    """The app's."""
    found: Service = current_app.extensions["chatstream"]
    return found


def owner(refuse: Callable[[StreamError], Response]) -> Any:
    """The caller's name, a str; else the response to give instead.

    Args:
        refuse: Puts it into the route's words that the caller has none.

    Raises:
        TypeError: `identify` returned something else than it may.
    """
    identify = service().identify
    if identify is None:
        return ""
    name = identify()
    if name is None:
        return _unknown(refuse)
    if is_response(name):
        return name
    if isinstance(name, (str, int)) and not isinstance(name, bool):
        return str(name)  # a plain one, also of a LocalProxy
    raise TypeError(
        f"identify must return a str, an int, a response or None, not {type(name).__name__}"
    )


def _unknown(refuse: Callable[[StreamError], Response]) -> Response:
    challenge = service().challenge
    how = "Please log in." if challenge is None else "Send a token: Authorization: Bearer TOKEN"
    response = refuse(Refused(f"Who are you? {how}", code="unauthenticated", status=401))
    if challenge is not None:
        response.headers["WWW-Authenticate"] = challenge
    return response


def is_response(value: object) -> bool:
    """Whether a hook of the app's returned what Flask can send."""
    return isinstance(value, (Response, tuple)) or hasattr(value, "get_wsgi_response")


def is_admin() -> bool:
    """The app's word on the caller. Not whatever is true: a coroutine is, a method, a refusal."""
    admin = service().admin
    said = admin() if admin is not None else False
    if not isinstance(said, (bool, int, type(None))):
        raise TypeError(f"admin must return True or False, not {type(said).__name__}")
    return bool(said)
