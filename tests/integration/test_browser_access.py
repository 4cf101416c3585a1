"""The page in a real browser, in front of a service that asks for a token, and in a guarded app."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.browser import LONG, Chromium, Standalone, Tab, Tabs, expect

TOKEN, OTHER = "tok-ann-1", "tok-bob-2"
REFUSED = "status of 401 "


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    rig = Standalone.start(
        tmp_path_factory.mktemp("closed") / "server.log",
        token=TOKEN,
        CHATSTREAM_TOKENS=f"ann:{TOKEN},bob:{OTHER}",
    )
    yield rig
    rig.stop()


@pytest.fixture
def shut(chromium: Chromium, closed: Standalone) -> Iterator[Tabs]:
    """Tabs in front of a service that asks for a token; none of them has one."""
    tabs = Tabs(chromium.profile, closed)
    yield tabs
    for page in tabs.context.pages:
        page.evaluate("sessionStorage.clear()")
        page.goto("about:blank")
    tabs.close()
    closed.check_leaks()
    assert not re.search(f"{TOKEN}|{OTHER}|Bearer", closed.server.log())


def form(tab: Tab) -> Any:
    return tab.page.get_by_role("dialog", name="This service asks for a token")


def field(tab: Tab) -> Any:
    return form(tab).get_by_label("Token", exact=True)


def forget(tab: Tab) -> Any:
    return tab.page.get_by_role("button", name="Forget the token")


def refused(tab: Tab, **simulate: Any) -> None:
    """Asks without a token, and is asked for one."""
    tab.intend(REFUSED)
    tab.ask(**simulate)
    expect(form(tab)).to_be_visible()


def let_in(tab: Tab, token: str = TOKEN) -> Any:
    """Gives a token: the question that goes out, and its headers."""
    field(tab).fill(token)
    with tab.page.expect_request("**/stream") as request:
        field(tab).press("Enter")
    return request.value


def test_a_token_is_asked_for_and_the_question_asked_again(shut: Tabs) -> None:
    """Without it being typed again; then the page goes on as if nothing had been."""
    tab = shut.open()
    expect(forget(tab)).to_be_hidden()
    refused(tab, tokens=5, rate=100)
    expect(field(tab)).to_be_focused()
    assert field(tab).get_attribute("type") == "password"
    expect(form(tab).get_by_role("alert")).to_be_hidden()
    request = let_in(tab)
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.post_data_json["messages"] == [{"role": "user", "content": "Tell me."}]
    expect(tab.state).to_have_text("The answer is complete.")
    expect(form(tab)).to_be_hidden()
    expect(tab.turns).to_have_count(1)
    expect(tab.failure).to_have_count(0)
    assert len(tab.words()) == 5
    expect(tab.message).to_be_focused()
    assert tab.figure("Tokens delivered") == 5
    tab.ask("And then?", tokens=2, rate=100)
    expect(tab.state).to_have_text("The answer is complete.")
    expect(form(tab)).to_be_hidden()
