"""The page in a real browser, in front of a service that asks for a token, and in a guarded app."""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.browser import LONG, Chromium, Route, Standalone, Tab, Tabs, expect
from tests.integration.conftest import Certificate
from tests.integration.processes import Provider, Server

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


def test_a_wrong_token_is_said_to_be_wrong(shut: Tabs) -> None:
    """And not kept; the next one may be right. What cannot be one goes nowhere."""
    tab = shut.open()
    refused(tab, tokens=3, rate=100)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    for odd in ("two words", "žeton", "  "):
        field(tab).fill(odd)
        form(tab).get_by_role("button", name="Use this token").click()
        expect(form(tab).get_by_role("alert")).to_contain_text("no spaces")
    assert [url for url in asked if url.endswith("/stream")] == []
    assert tab.page.evaluate("sessionStorage.getItem('chatstream:token')") is None
    let_in(tab, "tok-ann")
    expect(form(tab).get_by_role("alert")).to_have_text("This token was not accepted.")
    expect(field(tab)).to_have_attribute("aria-invalid", "true")
    expect(field(tab)).to_have_value("")
    assert tab.page.evaluate("sessionStorage.getItem('chatstream:token')") is None
    let_in(tab)
    expect(tab.state).to_have_text("The answer is complete.")
    expect(form(tab)).to_be_hidden()
    expect(tab.turns).to_have_count(1)


@pytest.mark.parametrize("way", ["Escape", "Cancel"])
def test_nobody_has_to_give_one(shut: Tabs, way: str) -> None:
    """The page says what is missing, and asks again when the question is."""
    tab = shut.open()
    refused(tab, tokens=3, rate=100)
    field(tab).fill("half a")
    if way == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        form(tab).get_by_role("button", name="Cancel").click()
    expect(form(tab)).to_be_hidden()
    expect(tab.failure).to_contain_text("This service asks for a token.")
    expect(tab.state).to_have_text("Without a token there is no answer.")
    expect(forget(tab)).to_be_hidden()
    tab.failure.get_by_role("button", name="Try again").click()
    expect(form(tab)).to_be_visible()
    expect(field(tab)).to_have_value("")
    let_in(tab)
    expect(tab.state).to_have_text("The answer is complete.")


def test_where_a_token_is_kept_and_where_it_goes(shut: Tabs) -> None:
    """In this tab's sessionStorage and in the header of what asks who is asking: nowhere else."""
    tab = shut.open()
    refused(tab, tokens=3, rate=100)
    sent: list[tuple[str, str | None]] = []
    tab.page.on("request", lambda r: sent.append((r.url, r.headers.get("authorization"))))
    let_in(tab)
    expect(tab.state).to_have_text("The answer is complete.")
    tab.figure("Tokens delivered")
    assert {given for _, given in sent} == {f"Bearer {TOKEN}"}
    assert [url for url, _ in sent if TOKEN in url] == []
    tab.page.reload()
    tab.ready()
    assert {given for url, given in sent if url.endswith((".js", ".css", "/"))} == {None}
    kept = "[{...sessionStorage}, {...localStorage}, document.cookie, location.href, history.state]"
    session, *others = tab.page.evaluate(kept)
    assert session["chatstream:token"] == TOKEN
    assert TOKEN not in session["chatstream:conversation"]
    assert TOKEN not in repr(others) + tab.page.content()
    expect(forget(tab)).to_be_visible()
    tab.ask("Again.", tokens=2, rate=100)  # it is still known
    expect(tab.state).to_have_text("The answer is complete.")


def test_another_tab_asks_for_itself(shut: Tabs) -> None:
    """A new tab has no token of the first one's."""
    tab = shut.open()
    refused(tab, tokens=3, rate=100)
    let_in(tab)
    expect(tab.state).to_have_text("The answer is complete.")
    other = shut.open()
    refused(other, tokens=3, rate=100)
    other.page.keyboard.press("Escape")


def test_a_token_is_forgotten(shut: Tabs) -> None:
    """At a click; the conversation stays, and the next question asks for a token anew."""
    tab = shut.open()
    refused(tab, tokens=3, rate=100)
    let_in(tab)
    expect(tab.state).to_have_text("The answer is complete.")
    forget(tab).click()
    expect(tab.state).to_have_text("The token is forgotten.")
    expect(forget(tab)).to_be_hidden()
    expect(tab.message).to_be_focused()
    expect(tab.turns).to_have_count(1)
    assert TOKEN not in repr(tab.page.evaluate("({...sessionStorage})"))
    refused(tab, tokens=2, rate=100)
    expect(form(tab).get_by_role("alert")).to_be_hidden()  # none was given, so none was wrong
    request = let_in(tab, OTHER)
    assert request.headers["authorization"] == f"Bearer {OTHER}"
    expect(tab.state).to_have_text("The answer is complete.")


def test_a_stop_has_the_token(shut: Tabs) -> None:
    """Also where it was forgotten meanwhile: the answer is stopped as who asked for it."""
    tab = shut.open()
    refused(tab, **LONG)
    body = let_in(tab).post_data_json
    tab.eventually(lambda: len(tab.words()) > 3, "words")
    forget(tab).click()
    since_ns = time.monotonic_ns()
    with tab.page.expect_response("**/cancel/**") as response:
        tab.stop.click()
    assert response.value.status in (200, 404)  # 404: the closed connection was first
    figure = shut.rig.provider.request(body["streamId"], "closed", after=since_ns)
    assert figure["closed_by"] in ("client", "reset")
    expect(tab.mark).to_have_text("Stopped")
    tab.figure("Stop time")


NOTED = """() => {
    const own = fetch;
    window.fetch = (url, init) => {
        const { keepalive, headers } = init;
        const facts = [keepalive, new Headers(headers).get("Authorization")];
        if (url.includes("/cancel/")) localStorage.setItem("noted", JSON.stringify(facts));
        return own(url, init);
    };
}"""
"""A browser's tools do not show what a page asks for while it is left."""


def test_leaving_the_page_stops_with_the_token(shut: Tabs) -> None:
    """The cancel that outlives the page has the header, too."""
    tab = shut.open()
    tab.page.evaluate(NOTED)
    refused(tab, **LONG)
    body = let_in(tab).post_data_json
    tab.eventually(lambda: len(tab.words()) > 3, "words")
    tab.page.goto("about:blank")
    line = shut.rig.server.ending_of(body["sessionId"], body["streamId"])
    assert "aborted by client/cancel" in line
    tab.page.goto(shut.rig.url)
    noted = tab.page.evaluate("JSON.parse(localStorage.getItem('noted'))")
    tab.page.evaluate("localStorage.clear()")
    assert noted == [True, f"Bearer {TOKEN}"]


def test_a_failure_that_is_no_challenge_asks_for_nothing(shut: Tabs) -> None:
    """A 401 without one is the app's login's."""
    tab = shut.open()
    body = {"ok": False, "reason": "unauthenticated", "message": "Who are you?"}
    for headers in ({}, {"WWW-Authenticate": "Basic realm=bearer"}):
        answer = partial(Route.fulfill, status=401, json=body, headers=headers)
        tab.page.route("**/stream", answer)
        tab.intend(REFUSED)
        tab.ask()
        expect(tab.failure).to_contain_text("You are not logged in.")
        expect(form(tab)).to_be_hidden()
        tab.page.unroute("**/stream")


def test_the_form_to_those_who_do_not_see_it(shut: Tabs) -> None:
    """A modal dialog with a name; the rest of the page cannot be reached meanwhile."""
    tab = shut.open()
    refused(tab, tokens=3, rate=100)
    assert form(tab).evaluate("(e) => e.matches(':modal')")
    for key, name in (("Tab", "Cancel"), ("Tab", "Use this token")):
        tab.page.keyboard.press(key)
        expect(form(tab).get_by_role("button", name=name)).to_be_focused()
    tab.page.keyboard.press("Shift+Tab")
    tab.page.keyboard.press("Shift+Tab")
    expect(field(tab)).to_be_focused()
    expect(field(tab)).to_have_accessible_description(re.compile("kept in this tab"))
    tab.page.set_viewport_size({"width": 320, "height": 560})
    expect(form(tab).get_by_role("button", name="Use this token")).to_be_in_viewport(ratio=1)
    assert tab.page.evaluate("document.documentElement.scrollWidth <= 320")
    tab.page.keyboard.press("Escape")


# An app whose POSTs are guarded against other sites' (Flask-WTF's CSRFProtect)

GUARDED = "tests.integration.guarded:app"
UNGUARDED = "status of 400 "


@contextlib.contextmanager
def guarded(
    chromium: Chromium, log: Path, certificate: Certificate | None = None
) -> Iterator[tuple[Tab, Server]]:
    """A tab with the page of such an app, over HTTPS if there is a certificate."""
    options, trust = [], None
    if certificate is not None:
        options = ["--certfile", certificate.cert, "--keyfile", certificate.cert]
        trust = ssl.create_default_context(cafile=certificate.authority)
    with contextlib.ExitStack() as stack:
        provider = Provider(defaults=LONG)
        stack.callback(provider.close)
        server = Server(log, *options, app=GUARDED, tls=trust, CHATSTREAM_UPSTREAM_URL=provider.url)
        stack.callback(server.stop)
        profile = chromium.browser.new_context(ignore_https_errors=True)
        stack.callback(profile.close)
        tab = Tab(profile.new_page())
        scheme = "http" if trust is None else "https"
        tab.page.goto(f"{scheme}://localhost:{server.port}/talk/to/it")
        tab.ready()
        yield tab, server
        assert tab.unintended() == []
        assert server.errors() == []


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_the_page_in_a_guarded_app(
    chromium: Chromium, log_file: Path, certificate: Certificate, secure: bool
) -> None:
    """Questions and cancels have the app's token. Over HTTPS it wants a referrer, too."""
    with guarded(chromium, log_file, certificate if secure else None) as (tab, server):
        bare = {"Content_Type": "application/json"}
        assert server.ask("POST", "/api/chat/stream", b"{}", **bare)[0] == 400
        assert b"CSRF" in server.ask("POST", "/api/chat/cancel/s")[1]
        asked = tab.ask()
        tab.eventually(lambda: len(tab.words()) > 3, "words")
        with tab.page.expect_response("**/cancel/**") as cancelled:
            tab.stop.click()
        assert cancelled.value.status in (200, 404)  # 404: the closed connection was first
        expect(tab.mark).to_have_text("Stopped")
        assert "aborted by client/cancel" in server.ending_of(asked.session, asked.stream)


def test_a_token_against_csrf_that_is_too_old(chromium: Chromium, log_file: Path) -> None:
    """A page that was open for hours, or through a login: it gets another, once, and asks again."""
    with guarded(chromium, log_file) as (tab, _):
        tab.page.context.clear_cookies()
        tab.intend(UNGUARDED)
        loads: list[str] = []
        tab.page.on("request", lambda request: loads.append(f"{request.method} {request.url}"))
        tab.ask()
        tab.eventually(lambda: len(tab.words()) > 3, "words")
        tab.page.keyboard.press("Escape")
        expect(tab.mark).to_have_text("Stopped")
        asked = [re.sub(r"http://[^/]+", "", one) for one in loads if "/cancel/" not in one]
        assert asked == ["POST /api/chat/stream", "GET /talk/to/it", "POST /api/chat/stream"]
        expect(tab.turns).to_have_count(1)


def test_a_refusal_that_stays(chromium: Chromium, log_file: Path) -> None:
    """With a new token it is asked once more, and then it is a failure as any."""
    with guarded(chromium, log_file) as (tab, _):
        tab.intend(UNGUARDED)
        asked: list[str] = []
        refuse = partial(Route.fulfill, status=400, body="<h1>No</h1>", content_type="text/html")
        tab.page.route("**/stream", refuse)
        tab.page.on("request", lambda request: asked.append(request.method))
        tab.ask()
        expect(tab.failure).to_contain_text("This service answered with an error (400).")
        assert asked == ["POST", "GET", "POST"]
        tab.page.unroute("**/stream")
