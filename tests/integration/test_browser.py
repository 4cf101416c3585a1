"""The page in a real browser: every way in which a user ends an answer, and who is told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from tests.integration.browser import LONG, Asked, Route, Standalone, Tab, Tabs, expect

NOTHING = "\N{EN DASH}"
"""What the meter shows where there is no figure."""

BOTH = pytest.mark.parametrize("tabs", ["gthread", "gevent"], indirect=True)

PHASES = {
    "before the headers": {**LONG, "headers_after": 60},
    "thinking silently": {**LONG, "silent_after": 0},
    "streaming": LONG,
    "fallen silent": {**LONG, "silent_after": 5},
}

WAYS: dict[str, Callable[[Tab], None]] = {
    "click": lambda tab: tab.stop.click(),
    "escape": lambda tab: tab.page.keyboard.press("Escape"),
}


def begin(rig: Standalone, tab: Tab, phase: str = "streaming") -> Asked:
    """A question whose answer is in the middle of a phase."""
    asked = tab.ask("Tell me a story.", **PHASES[phase])
    if phase in ("streaming", "fallen silent"):
        tab.eventually(lambda: len(tab.words()) >= 5, "words")
    elif phase == "thinking silently":
        rig.provider.request(asked.stream, "headers")
    rig.provider.request(asked.stream, "started")
    return asked


def stopped(rig: Standalone, tab: Tab, asked: Asked, since_ns: int) -> None:
    """Asserts all that a stop promises: at the provider, in the log, on the page."""
    rig.halted(asked, since_ns)
    rig.aborted(asked)
    expect(tab.mark).to_have_text("Stopped")
    expect(tab.turns.last.locator("[data-state=stopped]")).to_have_count(1)
    expect(tab.stop).to_be_hidden()
    expect(tab.failure).to_have_count(0)
    expect(tab.state).to_contain_text("Stopped")


@BOTH
def test_an_answer_streams_in_to_its_end(tabs: Tabs) -> None:
    """Word by word; then it is complete, and nothing says that it was stopped."""
    tab = tabs.open()
    asked = tab.ask(tokens=30, rate=15)
    expect(tab.stop).to_be_visible()
    expect(tab.answer).to_have_text(re.compile("^A stop"))
    assert len(tab.words()) < 30
    expect(tab.state).to_have_text("The answer is complete.")
    assert len(tab.words()) == 30
    expect(tab.stop).to_be_hidden()
    expect(tab.mark).to_have_count(0)
    expect(tab.failure).to_have_count(0)
    assert "completed" in tabs.rig.server.ending_of(asked.session, asked.stream)
    assert tab.figure("Tokens delivered") == 30
    assert tab.meter("Tokens after stop") == NOTHING


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", PHASES)
def test_stop(tabs: Tabs, phase: str, way: str) -> None:
    """In every phase: the provider is told, the log says so, what had come stays, no error."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab, phase)
    before, since_ns = tab.words(), time.monotonic_ns()
    WAYS[way](tab)
    stopped(tabs.rig, tab, asked, since_ns)
    assert tab.words()[: len(before)] == before
    expect(tab.message).to_be_focused()


@pytest.mark.parametrize("tabs", ["gevent"], indirect=True)
@pytest.mark.parametrize("phase", ["before the headers", "streaming"])
def test_stop_with_gevent(tabs: Tabs, phase: str) -> None:
    """As with threads."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab, phase)
    since_ns = time.monotonic_ns()
    tab.stop.click()
    stopped(tabs.rig, tab, asked, since_ns)


def test_the_meter_tells_of_the_stop(tabs: Tabs) -> None:
    """It counts while the answer streams; then it has what the provider has, and the time."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab)
    tab.eventually(lambda: tab.meter("Connection") == "open", "an open connection")
    counted = tab.figure("Tokens generated")
    tab.eventually(lambda: tab.figure("Tokens generated") > counted, "more tokens")
    since_ns = time.monotonic_ns()
    tab.stop.click()
    took, after = tab.figure("Stop time"), tab.figure("Tokens after stop")
    figure = tabs.rig.halted(asked, since_ns)
    assert took <= (figure["closed_ns"] - since_ns) / 1e6 + 1
    assert after <= took * LONG["rate"] / 1000 + 1
    assert tab.meter("Connection") == "closed"
    assert tab.figure("Tokens generated") == figure["generated"]
    assert tab.figure("Tokens delivered") == figure["delivered"]


def test_what_the_page_counts_as_after_the_stop(tabs: Tabs) -> None:
    """The instant is that of the click, by the provider's clock: to within some milliseconds."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab)
    tab.figure("Tokens generated")  # the clocks have been compared
    with tab.page.expect_request(re.compile(r"/meter/.*at=")) as request:
        since_ns = time.monotonic_ns()
        tab.stop.click()
        until_ns = time.monotonic_ns()
    found = re.search(r"at=([0-9.]+)", request.value.url)
    assert found
    assert since_ns - 2e7 <= float(found[1]) * 1e6 <= until_ns + 2e7
    tabs.rig.halted(asked, since_ns)


def test_a_second_click_does_nothing(tabs: Tabs) -> None:
    """Not even with the next question written already: nothing moves to where Stop was."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab)
    tab.message.fill("And then?")
    place = tab.message.bounding_box()
    sent: list[str] = []
    tab.page.on("request", lambda request: sent.append(f"{request.method} {request.url}"))
    since_ns = time.monotonic_ns()
    tab.stop.dblclick()
    stopped(tabs.rig, tab, asked, since_ns)
    posts = [one for one in sent if one.startswith("POST")]
    assert [one.partition("/api/chat/")[2].partition("/")[0] for one in posts] == ["cancel"]
    expect(tab.turns).to_have_count(1)
    expect(tab.message).to_have_value("And then?")
    assert tab.message.bounding_box() == place


def test_escape_after_the_end_asks_nothing(tabs: Tabs) -> None:
    """There is nothing to stop, and the answer stays complete."""
    tab = tabs.open()
    tab.ask(tokens=3, rate=100)
    expect(tab.state).to_have_text("The answer is complete.")
    sent: list[str] = []
    tab.page.on("request", lambda request: sent.append(request.method))
    tab.page.keyboard.press("Escape")
    tab.page.evaluate("() => new Promise(requestAnimationFrame)")
    assert "POST" not in sent
    expect(tab.mark).to_have_count(0)


def test_a_new_question_supersedes(tabs: Tabs) -> None:
    """The old answer stops, marked; the new one streams, in the same session."""
    tab = tabs.open()
    old = begin(tabs.rig, tab)
    confirmed: list[float] = []
    tab.page.on("response", lambda response: confirmed.append(time.monotonic()))
    since_ns = time.monotonic_ns()
    new = tab.ask("Another thing.", **LONG)
    asked_at = time.monotonic()
    tabs.rig.halted(old, since_ns)
    assert asked_at - confirmed[-1] < 1, "it waits for no longer than for the stop"
    tabs.rig.aborted(old)
    expect(tab.turns.first.locator(".mark")).to_have_text("Stopped")
    assert (new.session, new.stream != old.stream) == (old.session, True)
    tab.eventually(lambda: len(tab.words()) >= 3, "words of the new answer")
    assert new.messages[-1] == ("user", "Another thing.")
    since_ns = time.monotonic_ns()
    tab.stop.click()
    stopped(tabs.rig, tab, new, since_ns)


SUBMIT = """(questions) => {
    for (const question of questions) {
        document.getElementById("message").value = question;
        document.getElementById("composer").requestSubmit();
    }
}"""


def test_a_question_that_is_overtaken_is_not_asked(tabs: Tabs) -> None:
    """Two in the same moment: the first has to wait for the old answer's stop, and is stopped."""
    tab = tabs.open()
    begin(tabs.rig, tab)
    posted: list[str] = []
    tab.page.on("request", lambda request: posted.append(request.url))
    tab.behave(tokens=3, rate=100)
    asked = tab.sent(lambda: tab.page.evaluate(SUBMIT, ["Two?", "Three?"]))
    assert [words for role, words in asked.messages if role == "user"][1:] == ["Two?", "Three?"]
    expect(tab.state).to_have_text("The answer is complete.")
    expect(tab.turns.nth(1).locator(".mark")).to_have_text("Stopped")
    expect(tab.mark).to_have_count(0)
    assert len([url for url in posted if url.endswith("/stream")]) == 1


def test_a_new_question_waits_for_the_stop(tabs: Tabs) -> None:
    """So there is no conflict where sessions are not superseded; but it does not wait for ever."""
    tab = tabs.open()
    begin(tabs.rig, tab)
    held: list[Route] = []
    posted: list[str] = []
    tab.page.route("**/cancel/**", lambda route: held.append(route))
    tab.page.on("request", lambda request: posted.append(request.url.rpartition("/")[2]))
    tab.page.evaluate(SUBMIT, ["Two?"])
    tab.eventually(lambda: held, "the cancel")
    tab.page.wait_for_timeout(200)
    assert "stream" not in posted
    tab.sent(lambda: held.pop().continue_())
    tab.sent(lambda: tab.page.evaluate(SUBMIT, ["Three?"]))
    assert held, "no cancel"
    tab.page.unroute("**/cancel/**")
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".mark")).to_have_text(["Stopped"] * 3)


def test_a_stopped_answer_goes_on_as_it_was_seen(tabs: Tabs) -> None:
    """The next question carries it; not a word more than was on the screen."""
    tab = tabs.open()
    begin(tabs.rig, tab)
    tab.page.keyboard.press("Escape")
    expect(tab.mark).to_have_text("Stopped")
    seen = tab.words()
    asked = tab.ask("Go on.", tokens=3, rate=100)
    (role, question), (also, answer), last = asked.messages
    assert [(role, question), last] == [("user", "Tell me a story."), ("user", "Go on.")]
    assert (also, answer.split()) == ("assistant", seen)
    expect(tab.state).to_have_text("The answer is complete.")


def test_a_stop_before_a_word_leaves_no_answer(tabs: Tabs) -> None:
    """Of an answer that never began the provider is told nothing."""
    tab = tabs.open()
    begin(tabs.rig, tab, "before the headers")
    tab.stop.click()
    expect(tab.mark).to_have_text("Stopped")
    asked = tab.ask("Once more.", tokens=3, rate=100)
    assert asked.messages == [("user", "Tell me a story."), ("user", "Once more.")]
    expect(tab.state).to_have_text("The answer is complete.")


LEAVES: dict[str, Callable[[Tab], None]] = {
    "closed": lambda tab: tab.page.close(),
    "left": lambda tab: tab.page.goto("about:blank") and None,
}


@BOTH
@pytest.mark.parametrize("way", LEAVES)
def test_a_tab_that_goes_stops_its_answer(tabs: Tabs, way: str) -> None:
    """Nobody has to click."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab)
    since_ns = time.monotonic_ns()
    LEAVES[way](tab)
    tabs.rig.halted(asked, since_ns)
    tabs.rig.aborted(asked)


def test_a_tab_closed_before_the_headers(tabs: Tabs) -> None:
    """Also while the provider has not answered, and nothing could be written to the client."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab, "before the headers")
    since_ns = time.monotonic_ns()
    tab.page.close()
    tabs.rig.halted(asked, since_ns)
    tabs.rig.aborted(asked)


@pytest.mark.parametrize("listeners", [0, 1])
def test_a_reload_stops_and_keeps_what_had_come(tabs: Tabs, listeners: int) -> None:
    """The conversation is there again, the answer marked; it goes on from there.

    With a listener of somebody else's before ours, the connection breaks before we hear why.
    """
    tab = tabs.open()
    if listeners:
        tab.page.add_init_script("addEventListener('pagehide', () => {})")
        tab.page.reload()
        tab.ready()
    asked = begin(tabs.rig, tab)
    before, since_ns = tab.words(), time.monotonic_ns()
    tab.page.reload()
    tabs.rig.halted(asked, since_ns)
    tabs.rig.aborted(asked)
    expect(tab.mark).to_have_text("Stopped")
    assert tab.words()[: len(before)] == before
    expect(tab.failure).to_have_count(0)
    tab.ready()
    again = tab.ask("Go on.", tokens=3, rate=100)
    assert again.session == asked.session
    assert again.messages[1][1].split()[: len(before)] == before
    expect(tab.state).to_have_text("The answer is complete.")


def test_offline(tabs: Tabs) -> None:
    """What still comes is shown; when nothing does, it ends in words, and the provider is told."""
    tab = tabs.open()
    tab.intend("ERR_INTERNET_DISCONNECTED")
    asked = tab.ask("Tell me a story.", **LONG, silent_after=30)
    tab.eventually(lambda: len(tab.words()) >= 5, "words")
    tabs.context.set_offline(True)
    expect(tab.failure).to_contain_text("You are offline.")
    assert len(tab.words()) == 30
    assert tabs.rig.provider.request(asked.stream, "closed")["finished"] is False
    tabs.rig.aborted(asked)
    tab.failure.get_by_role("button", name="Try again").click()
    expect(tab.failure).to_contain_text("You are offline.")
    tabs.context.set_offline(False)
    tab.behave(tokens=3, rate=100)
    tab.failure.get_by_role("button", name="Try again").click()
    expect(tab.state).to_have_text("The answer is complete.")
    assert len(tab.words()) == 3
    expect(tab.turns).to_have_count(1)


def test_two_tabs_on_one_session(tabs: Tabs) -> None:
    """A question in the other supersedes; a stop there stops that one. No error in either."""
    one = tabs.open()
    first = begin(tabs.rig, one)
    other = tabs.duplicate(one)
    since_ns = time.monotonic_ns()
    second = begin(tabs.rig, other)
    assert second.session == first.session
    tabs.rig.halted(first, since_ns)
    tabs.rig.aborted(first, "superseded")
    expect(one.mark).to_have_text("Stopped elsewhere")
    expect(one.turns.last.locator("[data-state=stopped]")).to_have_count(1)
    expect(one.failure).to_have_count(0)
    expect(one.stop).to_be_hidden()
    since_ns = time.monotonic_ns()
    other.stop.click()
    stopped(tabs.rig, other, second, since_ns)


def test_a_stop_leaves_another_tabs_answer_alone(tabs: Tabs) -> None:
    """Sessions of their own: only the one that is meant ends."""
    one, other = tabs.open(), tabs.open()
    first, second = begin(tabs.rig, one), begin(tabs.rig, other)
    assert first.session != second.session
    one.page.bring_to_front()
    since_ns = time.monotonic_ns()
    one.stop.click()
    stopped(tabs.rig, one, first, since_ns)
    other.page.bring_to_front()
    count = len(other.words())
    other.eventually(lambda: len(other.words()) > count + 2, "more words")
    since_ns = time.monotonic_ns()
    other.page.keyboard.press("Escape")
    stopped(tabs.rig, other, second, since_ns)


def test_a_new_chat_stops_the_old_one(tabs: Tabs) -> None:
    """And begins another session, that knows nothing of it."""
    tab = tabs.open()
    asked = begin(tabs.rig, tab)
    since_ns = time.monotonic_ns()
    tab.page.get_by_role("button", name="New chat").click()
    tabs.rig.halted(asked, since_ns)
    tabs.rig.aborted(asked)
    expect(tab.turns).to_have_count(0)
    again = tab.ask("Hello.", tokens=2, rate=100)
    assert again.session != asked.session
    assert again.messages == [("user", "Hello.")]
    expect(tab.state).to_have_text("The answer is complete.")


def test_stops_in_quick_succession(tabs: Tabs) -> None:
    """Ask and stop, again and again, whatever each was at: each ends by the stop, none is whole."""
    tab = tabs.open()
    asked = []
    for number in range(6):
        asked.append(tab.ask(f"Question {number}.", **LONG))
        tab.page.keyboard.press("Escape")
    for one in asked:
        if one.stream in tabs.rig.provider.names():
            assert tabs.rig.provider.request(one.stream, "closed")["finished"] is False
    expect(tab.page.locator(".mark")).to_have_text(["Stopped"] * 6)
    expect(tab.page.locator(".failure")).to_have_count(0)
    ends = [line for line in tabs.rig.server.lines_of(asked[0].session) if "started" not in line]
    assert all("aborted by client/cancel" in line for line in ends), ends
