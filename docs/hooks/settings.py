"""Writes the table of settings into docs/settings.md: `python -m docs.hooks.settings`.

What it says is what chatstream/settings/table.py says: a row for each field of `Settings`. The
table is the first one that has the keys' defaults.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from chatstream.settings.table import PREFIX, Settings

PAGE = Path(__file__).resolve().parents[1] / "settings.md"

_HEAD = "| key | default | |\n|---|---|---|\n"

_TABLE = re.compile(rf"{re.escape(_HEAD)}(?:\| `{PREFIX}.*\n)*")

MORE = {
    "page": "page.md",
    "openai_prefix": "openai.md",
    "health": "operate.md#health",
    "log_format": "operate.md#log",
    "metrics": "operate.md#figures-and-alerts",
    "meter": "page.md#the-meter",
    "on_conflict": "wire.md#what-a-client-can-count-on",
    "on_disconnect": "mount.md#when-the-client-leaves",
    "allowed_models": "mount.md#what-is-sent",
    "max_tokens": "mount.md#what-is-sent",
    "tokens": "operate.md#who-may-use-it",
    "admin_tokens": "operate.md#who-may-use-it",
    "cors_origins": "mount.md#other-origins",
    "max_streams": "operate.md#slots",
    "max_streams_per_owner": "mount.md#how-much",
    "bus": "operate.md#workers-and-hosts",
    "detach": "operate.md#slots",
    "drain": "operate.md#deploys",
    "request_timeout": "operate.md#deadlines",
}
"""Where a page says more of a setting."""


def table() -> str:
    """The table, in Markdown."""
    return _HEAD + "".join(map(_row, dataclasses.fields(Settings)))


def renewed(text: str) -> str:
    """The page with the table as it is now.

    Raises:
        ValueError: The page has no place for it.
    """
    made, number = _TABLE.subn(lambda _: table(), text, count=1)
    if not number:
        raise ValueError(f"{PAGE.name} has no table of settings")
    return made


def _row(setting: dataclasses.Field[Any]) -> str:
    key = PREFIX + setting.name.upper()
    help = setting.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
    more = f" ([more]({MORE[setting.name]}))" if setting.name in MORE else ""
    return f"| `{key}` | {_shown(setting.default)} | {help}{more} |\n"


def _shown(default: Any) -> str:
    """As it stands in the environment. What is none, or nothing, has no value there."""
    if default is None or default in ("", ()):
        return ""
    if isinstance(default, bool):
        return f"`{int(default)}`"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
