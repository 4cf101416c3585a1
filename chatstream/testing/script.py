"""How the provider is to behave, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatstream.simulator import Plan


def checked(script: Mapping[str, Any]) -> Mapping[str, Any]:
    """The script itself. Raises ValueError where a key is not known or its value wrong."""
    __tracebackhide__ = True
    try:
        Plan.parse(script)
    except ValueError as error:  # it speaks of the field in which requests have the keys
        raise ValueError(str(error).replace("simulate.", "", 1)) from None
    return script
