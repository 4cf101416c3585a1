"""Bearer tokens: who may ask, where no app says so. RFC 6750, section 2.1."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import TYPE_CHECKING

from flask import request

if TYPE_CHECKING:
    from chatstream.settings.table import Settings


CHALLENGE = 'Bearer realm="chatstream"'
"""What goes with a 401 (RFC 9110, section 15.5.2)."""


class Tokens:
    """The tokens of the settings. Safe from any thread.

    Each request is compared with all of them, digest by digest: how long that takes says nothing
    of any.
    """

    def __init__(self, settings: Settings) -> None:
        admins = settings.admin_tokens
        self._known = [
            *((_digest(token.secret), token.owner, False) for token in settings.tokens),
            *((_digest(token.secret), token.owner, True) for token in admins),
        ]

    def identify(self) -> str | None:
        """The owner that the present request's token stands for; None without a good one."""
        return self._match()[0]

    def is_admin(self) -> bool:
        """Whether the present request's token is an admin's."""
        return self._match()[1]

    def _match(self) -> tuple[str | None, bool]:
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        given = _digest(secret.strip())
        found: tuple[str | None, bool] = (None, False)
        for digest, owner, admin in self._known:
            if hmac.compare_digest(digest, given):
                found = (owner, admin)
        return found if scheme.lower() == "bearer" else (None, False)


def _digest(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()
