"""plan: what a request may ask for, and what is refused."""

from __future__ import annotations

import pytest

from tests.simulator.client import Client


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonsense", 1),
        ("tokens", "5"),
        ("tokens", 1.5),
        ("tokens", True),
        ("tokens", -1),
        ("tokens", None),
        ("rate", "fast"),
        ("rate", 1e9),
        ("status", 99),
        ("chunked", 1),
        ("no_done", None),
        ("id", 5),
        ("split", 0),
        ("queue_interval", 0),
        ("content_type", "a\r\nb: c"),
        ("retry_after", True),
        ("raw", "\ud800"),
        ("message", []),
    ],
)
def test_bad_scenarios(client: Client, key: str, value: object) -> None:
    """400, naming the key; the connection stays."""
    answer = client.post({"stream": True, "simulate": {key: value}})
    assert answer.status == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (f"simulate.{key}", "invalid_request_error")
    assert f"simulate.{key} " in error["message"]
    assert client.chat(tokens=1, rate=0).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"\xff",
        b'{"stream": 1}',
        b'{"simulate": 5}',
        b'{"simulate": {"tokens": 1000000, "pad": 1000}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_bad_bodies(client: Client, body: bytes) -> None:
    """400 in OpenAI's shape; the connection stays."""
    answer = client.post(body)
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.chat(tokens=1, rate=0).status == 200
