"""The examples' pages in a real browser: cookies, tokens, and tabs that are closed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration import test_conversations, test_login
from tests.integration.browser import SOON, Chromium, expect
from tests.integration.processes import Provider

SLOW = {"rate": 20, "tokens": 10_000}


class Visit:
    """A browser's profile of its own, and what its page asks."""

    def __init__(self, chromium: Chromium, url: str, provider: Provider) -> None:
        self.profile = chromium.browser.new_context()
        self.url = url
        self.provider = provider
        self.page = self.open()

    def open(self) -> Any:
        page = self.profile.new_page()
        page.goto(self.url)
        return page

    def log_in(self, name: str) -> None:
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(test_login.PASSWORD)
        self.page.get_by_role("button", name="Log in").click()
        expect(self.page.get_by_label("Message")).to_be_focused()
        self.page.wait_for_load_state()  # its script is there

    def ask(self, question: str = "Tell me a story.", page: Any = None) -> str:
        """Returns the answer's name, at the provider too: the page does not send it there."""
        page = page or self.page
        known = self.provider.names()
        page.get_by_label("Message").fill(question)
        page.get_by_role("button", name="Send").click()
        deadline = time.monotonic() + 10
        while not (new := self.provider.names() - known):
            assert time.monotonic() < deadline
            page.wait_for_timeout(10)
        (name,) = new
        return name

    def close(self) -> None:
        self.profile.close()


def told(provider: Provider, name: str, since_ns: int) -> None:
    """Asserts that the provider was told of the stop, and soon."""
    figure = provider.request(name, "closed", after=since_ns)
    assert figure["closed_by"] in ("client", "reset")
    assert figure["closed_ns"] - since_ns < SOON * 1e9


@pytest.fixture(scope="module")
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[test_login.Example]:
    folder = tmp_path_factory.mktemp("login")
    with test_login.serving(folder, "gthread", defaults=SLOW) as example:
        yield example


@pytest.fixture
def ada(chromium: Chromium, login: test_login.Example) -> Iterator[Visit]:
    visit = Visit(chromium, login.url, login.provider)
    visit.log_in("ada")
    yield visit
    visit.close()
    login.close_browsers()


def words(page: Any) -> Any:
    return page.locator(".answer").last


def test_a_stop_from_the_page(ada: Visit, login: test_login.Example) -> None:
    """With CSRF protection on: the cancel has the token, and what had come stays."""
    name = ada.ask()
    expect(words(ada.page)).to_have_text(re.compile("^A stop button"))
    since_ns = time.monotonic_ns()
    with ada.page.expect_response("**/cancel/**") as cancel:
        ada.page.get_by_role("button", name="Stop").click()
    assert cancel.value.status in (200, 404)
    told(login.provider, name, since_ns)
    expect(words(ada.page)).to_have_attribute("data-outcome", "stopped")
    expect(words(ada.page)).to_have_text(re.compile("^A stop button"))
    expect(ada.page.get_by_role("alert")).to_be_empty()
    expect(ada.page.get_by_role("button", name="Stop")).to_be_hidden()


def test_the_next_question_knows_of_it(ada: Visit, login: test_login.Example) -> None:
    """The page sends what was seen."""
    ada.ask("One?")
    expect(words(ada.page)).to_have_text(re.compile("^A stop button"))
    ada.page.get_by_role("button", name="Stop").click()
    seen = words(ada.page).text_content()
    name = ada.ask("Two?")
    messages = login.provider.request(name)["body"]["messages"]
    assert [message["content"] for message in messages] == ["One?", seen, "Two?"]
    ada.page.get_by_role("button", name="Stop").click()


@pytest.mark.parametrize("way", ["close", "leave"])
def test_a_tab_that_goes(ada: Visit, login: test_login.Example, way: str) -> None:
    """The provider is told; and the cancel that is posted on the way out is let in."""
    other = ada.open()
    name = ada.ask(page=other)
    expect(words(other)).to_have_text(re.compile("^A stop button"))
    session = login.server.log().rpartition(" started stream=")[0].rpartition(" ")[2]
    since_ns = time.monotonic_ns()
    if way == "close":
        other.close()
    else:
        other.goto("about:blank")
    told(login.provider, name, since_ns)
    assert "aborted by client/cancel" in login.server.ending_of(session)
    assert "The CSRF" not in login.server.log()


def test_logged_out_in_another_tab(ada: Visit, login: test_login.Example) -> None:
    """What streams here ends; the next question leads to the login."""
    other = ada.open()
    name = ada.ask()
    since_ns = time.monotonic_ns()
    other.get_by_role("button", name="Log out").click()
    told(login.provider, name, since_ns)
    expect(words(ada.page)).to_have_attribute("data-outcome", "ended")
    ada.page.get_by_label("Message").fill("Hello?")
    ada.page.get_by_role("button", name="Send").click()
    expect(ada.page.get_by_label("Password")).to_be_visible()


def test_a_token_that_is_good_no_more(ada: Visit, login: test_login.Example) -> None:
    """The page says what to do: the refusal is JSON, and has a sentence."""
    ada.profile.clear_cookies()
    known = login.provider.names()
    ada.page.get_by_label("Message").fill("Hello?")
    ada.page.get_by_role("button", name="Send").click()
    expect(ada.page.get_by_role("alert")).to_have_text(
        "This page is out of date. Please load it again."
    )
    assert login.provider.names() == known


@pytest.fixture(scope="module", params=["abort", "finish"])
def conversations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[test_conversations.Example]:
    folder = tmp_path_factory.mktemp("conversations")
    environ = {"CHATSTREAM_ON_DISCONNECT": request.param}
    with test_conversations.serving(folder, "gthread", defaults=SLOW, **environ) as example:
        yield example


@pytest.fixture
def visit(chromium: Chromium, conversations: test_conversations.Example) -> Iterator[Visit]:
    visit = Visit(chromium, f"http://127.0.0.1:{conversations.port}/", conversations.provider)
    yield visit
    visit.close()


def test_a_stopped_answer_is_there_again(
    visit: Visit, conversations: test_conversations.Example
) -> None:
    """As it was seen, after a reload; and the page sends the next question alone."""
    name = visit.ask("One?")
    expect(words(visit.page)).to_have_text(re.compile("^A stop button"))
    since_ns = time.monotonic_ns()
    visit.page.get_by_role("button", name="Stop").click()
    told(conversations.provider, name, since_ns)
    expect(words(visit.page)).to_have_attribute("data-state", "stopped")
    seen = words(visit.page).text_content()
    visit.page.reload()
    expect(words(visit.page)).to_have_attribute("data-state", "stopped")
    kept = words(visit.page).text_content()
    assert kept.startswith(seen)  # the service may have sent a word more than the page showed
    with visit.page.expect_request("**/stream") as request:
        name = visit.ask("Two?")
    assert request.value.post_data_json["messages"] == [{"role": "user", "content": "Two?"}]
    asked = conversations.provider.request(name)["body"]["messages"]
    assert [message["content"] for message in asked[1:]] == ["One?", kept, "Two?"]
    visit.page.get_by_role("button", name="Stop").click()
    expect(visit.page.get_by_role("listitem")).to_have_text(["One?"])


def test_a_closed_tab(visit: Visit, conversations: test_conversations.Example) -> None:
    """It stops its answer, or the answer goes on: as the service is set, and the page told."""
    page = visit.open()
    name = visit.ask("One?", page=page)
    expect(words(page)).to_have_text(re.compile("^A stop button"))
    address, since_ns = page.url, time.monotonic_ns()
    finishes = page.locator("body").get_attribute("data-finish") == "yes"
    page.close()
    if not finishes:
        told(conversations.provider, name, since_ns)
    again = visit.profile.new_page()
    again.goto(address)
    state = "answering" if finishes else "stopped"
    expect(words(again)).to_have_attribute("data-state", state)
    if finishes:
        assert not conversations.provider.request(name)["closed_by"]
        since_ns = time.monotonic_ns()
        again.get_by_role("button", name="Stop").click()
        told(conversations.provider, name, since_ns)
        expect(words(again)).to_have_attribute("data-state", "stopped")
    expect(words(again)).to_have_text(re.compile("^A stop button"))
