"""A machine without settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings, proxies or configuration of this machine's."""
    for name in list(os.environ):
        if name.startswith(("CHATSTREAM_", "DEEPSEEK_", "GUNICORN_")) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    monkeypatch.chdir(tmp_path)
