"""The page in a real browser: what it shows, in words, to whom, and what it never lets in."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatstream.web.openapi import refusals
from tests.integration.browser import LONG, Chromium, Standalone, Tab, Tabs, expect

# Errors, in words


def refused(tab: Tab, status: int, /, **simulate: Any) -> None:
    """Asks, and is refused. The browser's console may say so; the page does it in words."""
    tab.intend(f"status of {status} ")
    tab.ask(**simulate)


def again(tab: Tab) -> Any:
    return tab.failure.get_by_role("button", name=re.compile("^Try again"))


@pytest.mark.parametrize(
    ("status", "simulate", "words"),
    [
        (502, {"status": 500}, "The provider failed."),
        (502, {"status": 401}, "The provider refused the key of this service."),
        (502, {"reset_after": 0}, "The provider hung up without an answer."),
        (
            400,
            {"status": 400, "message": "No such <b>model</b>."},
            "take it: No such <b>model</b>.",
        ),
        (502, {"content_type": "text/html", "raw": "<p>"}, "something that is no answer"),
    ],
)
def test_refusals_in_words(tabs: Tabs, status: int, simulate: dict[str, Any], words: str) -> None:
    """What happened, in a sentence that is also announced, with a way to try again."""
    tab = tabs.open()
    refused(tab, status, **simulate)
    expect(tab.failure).to_contain_text(words)
    expect(tab.state).to_contain_text(words)
    expect(tab.stop).to_be_hidden()
    tab.behave(tokens=2, rate=100)
    asked = tab.sent(lambda: again(tab).click())
    assert asked.messages == [("user", "Tell me.")]
    expect(tab.state).to_have_text("The answer is complete.")
    expect(tab.failure).to_have_count(0)
    expect(tab.turns).to_have_count(1)


@pytest.mark.parametrize(
    ("simulate", "words"),
    [({"error_after": 5}, "The provider failed."), ({"truncate_after": 5}, "broke off")],
)
def test_an_answer_that_breaks_off(tabs: Tabs, simulate: dict[str, Any], words: str) -> None:
    """What had come stays, and the next question carries it."""
    tab = tabs.open()
    tab.ask(rate=100, tokens=50, **simulate)
    expect(tab.failure).to_contain_text(words)
    seen = tab.words()
    assert len(seen) == 5
    asked = tab.ask("Go on.", tokens=2, rate=100)
    assert asked.messages[1][1].split() == seen
    expect(tab.state).to_have_text("The answer is complete.")


def test_a_failure_after_a_reload(tabs: Tabs) -> None:
    """What went wrong, and the way to try again, are still there."""
    tab = tabs.open()
    tab.ask(rate=100, tokens=50, error_after=5)
    expect(tab.failure).to_contain_text("The provider failed.")
    tab.page.reload()
    tab.ready()
    expect(tab.failure).to_contain_text("The provider failed.")
    assert len(tab.words()) == 5
    tab.behave(tokens=2, rate=100)
    again(tab).click()
    expect(tab.state).to_have_text("The answer is complete.")
    assert len(tab.words()) == 2


def test_a_pause_is_counted_down(tabs: Tabs) -> None:
    """With the provider's Retry-After; the button can be reached, and does nothing before."""
    tab = tabs.open()
    refused(tab, 429, status=429, retry_after=2)
    expect(tab.failure).to_contain_text("asks for a pause")
    expect(again(tab)).to_have_text(re.compile(r"^Try again in [12] s$"))
    expect(tab.state).to_contain_text("Try again in 2 s.")
    tab.behave(tokens=2, rate=100)
    again(tab).click(force=True)
    expect(tab.failure).to_be_visible()
    expect(again(tab)).to_have_text("Try again in 1 s")
    expect(again(tab)).to_have_text("Try again")
    expect(tab.state).to_have_text("You can try again.")
    again(tab).click()
    expect(tab.state).to_have_text("The answer is complete.")


def test_somebody_who_is_not_logged_in(tabs: Tabs) -> None:
    """401 is the host's `identify`; the page asks for a login."""
    tab = tabs.open()
    body = {"ok": False, "reason": "unauthenticated", "message": "Who are you?"}
    tab.page.route("**/stream", lambda route: route.fulfill(status=401, json=body))
    refused(tab, 401)
    expect(tab.failure).to_contain_text("You are not logged in.")
    tab.page.unroute("**/stream")


def test_every_refusal_has_its_words(tabs: Tabs) -> None:
    """Each reason that the routes can give, but for mistakes that the page does not make."""
    reasons = {code for _, codes in refusals.BEFORE.values() for code in codes} | {*refusals.AFTER}
    reasons |= {"network", "not_stream", "http"}  # the module's own
    reasons -= {"bad_json", "bad_messages", "bad_id", "bad_number", "unsupported_media_type"}
    words = tabs.open().page.evaluate(
        """async (codes) => {
            const { inWords } = await import("./api/chat/failures.js");
            return codes.map((code) => [code, inWords({ code, message: "from outside" })]);
        }""",
        sorted(reasons),
    )
    assert [code for code, said in words if said in ("from outside", "Something went wrong.")] == []
    assert len({said for _, said in words}) == len(reasons)


def test_an_outage(chromium: Chromium, tmp_path: Path) -> None:
    """The provider goes in the middle, then it is away, then the service is."""
    rig = Standalone.start(tmp_path / "server.log")
    tabs = Tabs(chromium.profile, rig)
    try:
        tab = tabs.open()
        tab.intend("status of 502 ", "ERR_CONNECTION_REFUSED")
        tab.ask(**LONG)
        tab.eventually(lambda: len(tab.words()) >= 3, "words")
        rig.provider.close()
        expect(tab.failure).to_contain_text("The provider broke off.")
        assert len(tab.words()) >= 3
        again(tab).click()
        expect(tab.failure).to_contain_text("The provider cannot be reached just now.")
        rig.server.stop()
        again(tab).click()
        expect(tab.failure).to_contain_text("This service cannot be reached.")
        tabs.close()
    finally:
        rig.stop()


# A service of another shape: elsewhere, one slot, a provider that has no meter


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    rig = Standalone.start(
        tmp_path_factory.mktemp("small") / "server.log",
        defaults=LONG,
        CHATSTREAM_METER="0",
        CHATSTREAM_MAX_STREAMS="1",
        CHATSTREAM_PAGE="/my/chat",
        CHATSTREAM_URL_PREFIX="/my/api/v1",
    )
    yield rig
    rig.stop()


def test_a_real_provider_has_no_meter(chromium: Chromium, small: Standalone) -> None:
    """Nothing of it is seen, asked for or sent, wherever the page is."""
    tabs = Tabs(chromium.profile, small)
    tab = tabs.open()
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    body = tab.ask().body
    assert set(body) == {"messages", "sessionId", "streamId"}
    tab.eventually(lambda: len(tab.words()) > 2, "words")
    tab.stop.click()
    expect(tab.mark).to_have_text("Stopped")
    expect(tab.page.get_by_role("complementary")).to_be_hidden()
    assert [url for url in asked if "meter" in url] == []
    assert "aborted by client/cancel" in small.server.ending_of(body["sessionId"])
    tabs.close()
    small.check_leaks()


def test_busy(chromium: Chromium, small: Standalone) -> None:
    """Whoever comes when every place is taken is told; whose answer it is goes on."""
    tabs = Tabs(chromium.profile, small)
    one, other = tabs.open(), tabs.open()
    first = one.ask()
    one.eventually(lambda: len(one.words()) > 2, "words")
    refused(other, 503)
    expect(other.failure).to_contain_text("every place is taken")
    count = len(one.words())
    one.eventually(lambda: len(one.words()) > count, "more words")
    one.page.bring_to_front()
    one.stop.click()
    small.server.ending_of(first.session)
    other.page.bring_to_front()
    expect(again(other)).to_have_text("Try again")
    again(other).click()
    other.eventually(lambda: len(other.words()) > 2, "words")
    expect(other.mark).to_have_count(0)  # what went wrong before is no longer said
    other.page.keyboard.press("Escape")
    expect(other.mark).to_have_text("Stopped")
    tabs.close()
    small.check_leaks()


# What is shown, and how


def test_reasoning_is_shown_apart(tabs: Tabs) -> None:
    """Open while there is nothing else, then folded; it is not told again to the provider."""
    tab = tabs.open()
    tab.ask(tokens=12, rate=100, reasoning=5, silent_after=5, silent_for=0.5)
    thoughts = tab.turns.first.locator("details")
    expect(thoughts.locator("summary")).to_have_text("Thinking")
    expect(thoughts).to_have_attribute("open", "")
    expect(thoughts.locator(".thoughts")).to_have_text("A stop button is a ")
    expect(tab.state).to_have_text("The answer is complete.")
    expect(thoughts).not_to_have_attribute("open", "")
    expect(tab.answer).to_have_text("promise. Whoever presses it has already decided,")
    asked = tab.ask("Go on.", tokens=2, rate=100)
    assert asked.messages[1][1].startswith("promise.")
    expect(tab.state).to_have_text("The answer is complete.")


def test_reasoning_stays_as_one_has_it(tabs: Tabs) -> None:
    """Whoever unfolds it reads on while the answer comes."""
    tab = tabs.open()
    tab.ask(**LONG, reasoning=2)
    thoughts = tab.turns.first.locator("details")
    tab.eventually(lambda: len(tab.words()) > 2, "words")
    expect(thoughts).not_to_have_attribute("open", "")
    thoughts.locator("summary").click()
    count = len(tab.words())
    tab.eventually(lambda: len(tab.words()) > count + 2, "more words")
    expect(thoughts).to_have_attribute("open", "")
    tab.page.keyboard.press("Escape")
    expect(tab.mark).to_have_text("Stopped")


DISTANCE = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight"


def test_the_view_follows_only_from_the_end(tabs: Tabs) -> None:
    """Whoever scrolls up is left there, and can come back."""
    tab = tabs.open()
    tab.page.set_viewport_size({"width": 600, "height": 420})
    talk = tab.page.locator("#talk")
    at_end = f"(e) => ({DISTANCE})(e) < 48"
    tab.ask(rate=200, tokens=20_000)
    tab.eventually(lambda: talk.evaluate("(e) => e.scrollTop > 100"), "scrolling")
    assert talk.evaluate(at_end)
    latest = tab.page.get_by_role("button", name="Latest")
    expect(latest).to_be_hidden()
    talk.evaluate("(e) => e.scrollTo(0, 20)")
    expect(latest).to_be_visible()
    count = len(tab.words())
    tab.eventually(lambda: len(tab.words()) > count + 20, "more words")
    assert talk.evaluate("(e) => e.scrollTop") == 20
    latest.click()
    tab.eventually(lambda: talk.evaluate(at_end), "the end")
    expect(latest).to_be_hidden()
    tab.page.keyboard.press("Escape")
    expect(tab.mark).to_have_text("Stopped")


def test_a_window_that_is_turned(tabs: Tabs) -> None:
    """The end that was in sight stays in sight, also when nothing comes any more."""
    tab = tabs.open()
    tab.page.set_viewport_size({"width": 1000, "height": 700})
    tab.ask(rate=0, tokens=600)
    expect(tab.state).to_have_text("The answer is complete.")
    talk = tab.page.locator("#talk")
    assert talk.evaluate(DISTANCE) == 0
    tab.page.set_viewport_size({"width": 320, "height": 560})
    tab.eventually(lambda: talk.evaluate(DISTANCE) < 2, "the end")
    tab.page.wait_for_timeout(100)  # a scroll that the browser brings comes with a later frame
    expect(tab.page.get_by_role("button", name="Latest")).to_be_hidden()


LONG_WORDS = (
    f"# {'Long' * 40}\n\n{'x' * 300}\n\nhttps://x.example/{'y' * 200}\n\n```\n{'z' * 300}\n```\n"
)

OVERFLOW = """() => [document.documentElement, document.querySelector("#talk"),
    document.querySelector("#meter"), document.querySelector("#composer")]
    .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.id || e.localName)"""


def test_narrow_screens(tabs: Tabs) -> None:
    """320 px: nothing sticks out, whatever is asked and answered; Stop is in reach."""
    tab = tabs.open()
    tab.page.set_viewport_size({"width": 320, "height": 560})
    tab.ask("Q" * 200, text=LONG_WORDS, tokens=500, rate=50, silent_after=8)
    expect(tab.answer.get_by_role("group", name="Code")).to_contain_text("zzz")
    assert tab.page.evaluate(OVERFLOW) == []
    expect(tab.stop).to_be_in_viewport(ratio=1)
    expect(tab.message).to_be_in_viewport(ratio=1)
    assert tab.message.evaluate("(e) => e.clientWidth") > 200
    tab.stop.click()
    refused(tab, 429, status=429, retry_after=300)
    expect(again(tab)).to_have_text(re.compile(r"^Try again in (5 min 0|4 min 59) s$"))
    assert tab.page.evaluate(OVERFLOW) == []


def test_low_windows(tabs: Tabs) -> None:
    """A window at 400 %: some of the answer, and Stop, are in sight; the rest by scrolling."""
    tab = tabs.open()
    tab.page.set_viewport_size({"width": 320, "height": 256})
    tab.ask(**LONG)
    tab.eventually(lambda: len(tab.words()) > 5, "words")
    expect(tab.stop).to_be_in_viewport(ratio=1)
    expect(tab.message).to_be_in_viewport(ratio=1)
    line = """() => {
        const last = document.querySelector(".turn:last-child .text > :last-child");
        const { left, bottom } = last.getBoundingClientRect();
        return document.elementFromPoint(left + 9, bottom - 9) === last;
    }"""
    tab.eventually(lambda: tab.page.evaluate(line), "the last line, with nothing above it")
    tab.page.get_by_label("The next answer").scroll_into_view_if_needed()
    assert tab.page.evaluate("scrollY") > 0
    assert tab.page.evaluate(OVERFLOW) == []
    tab.stop.click()
    expect(tab.mark).to_have_text("Stopped")


def test_from_right_to_left(tabs: Tabs) -> None:
    """Each block, and each question, as it is written; code never."""
    tab = tabs.open()
    text = "مرحبا code\n\n1. أولا\n\n> اقتباس\n\nhello مرحبا\n\n```\nx = 'مرحبا'\n```"
    tab.ask("ما هو؟", text=text, tokens=13, rate=0)
    expect(tab.state).to_have_text("The answer is complete.")
    ways = "(all) => all.map((e) => [e.localName, getComputedStyle(e).direction])"
    assert tab.answer.locator("> *").evaluate_all(ways) == [
        ["p", "rtl"], ["ol", "rtl"], ["blockquote", "rtl"], ["p", "ltr"], ["pre", "ltr"]
    ]  # fmt: skip
    assert tab.page.locator(".question p").evaluate_all(ways) == [["p", "rtl"]]


CONTRAST = """() => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045
        ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) =>
        sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const [r, g, b, a = 1] = parts(getComputedStyle(e).backgroundColor);
            if (a === 1) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && !e.closest(".unseen");
    const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const texts = [...document.body.querySelectorAll("*")].filter((e) => seen(e) && own(e));
    const ratios = texts.map((e) => {
        const [one, two] = [light(parts(getComputedStyle(e).color)), light(ground(e))];
        const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        return [Math.round(ratio * 100) / 100, e.localName, e.textContent.slice(0, 30)];
    });
    return { count: texts.length, low: ratios.filter(([ratio]) => ratio < 4.5) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(tabs: Tabs, scheme: Any) -> None:
    """Every text on the page against what is behind it: at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    tab = tabs.open()
    tab.page.emulate_media(color_scheme=scheme)
    text = "# A\n\n[b](https://x.example) `c`\n\n> d\n\n```python\ne\n```\n"
    tab.ask(text=text, tokens=12, rate=100, reasoning=2)
    expect(tab.state).to_have_text("The answer is complete.")
    tab.turns.last.locator("summary").click()
    refused(tab, 429, status=429, retry_after=60)
    expect(tab.failure).to_be_visible()
    tab.ask(**LONG)
    tab.eventually(lambda: len(tab.words()) > 2, "words")
    found = tab.page.evaluate(CONTRAST)
    assert found["low"] == []
    assert found["count"] > 25
    tab.stop.click()
    expect(tab.mark).to_be_visible()
    assert tab.page.evaluate(CONTRAST)["low"] == []


# Without a mouse, without a screen


def test_by_keyboard_alone(tabs: Tabs) -> None:
    """Type, send, reach Stop, stop, and be back where one types. The focus is always seen."""
    tab = tabs.open()
    keys = tab.page.keyboard
    expect(tab.message).to_be_focused()
    tab.behave(**LONG)
    keys.type("One")
    keys.press("Shift+Enter")
    keys.type("two")
    asked = tab.sent(lambda: keys.press("Enter"))
    assert asked.messages == [("user", "One\ntwo")]
    expect(tab.message).to_have_value("")
    keys.press("Tab")
    expect(tab.stop).to_be_focused()
    assert tab.stop.evaluate("(e) => getComputedStyle(e).outlineStyle") == "solid"
    since_ns = time.monotonic_ns()
    keys.press("Space")
    tabs.rig.halted(asked, since_ns)
    expect(tab.mark).to_have_text("Stopped")
    expect(tab.message).to_be_focused()
    keys.press("Tab")
    expect(tab.page.get_by_role("button", name="Send")).to_be_focused()


def test_keys_that_do_not_send(tabs: Tabs) -> None:
    """An empty box; Enter and Escape that belong to somebody's input method."""
    tab = tabs.open()
    sent: list[str] = []
    tab.page.on("request", lambda request: sent.append(request.method))
    tab.message.fill("  \n ")
    tab.message.press("Enter")
    tab.page.get_by_role("button", name="Send").click()
    composing = """(e, key) => e.dispatchEvent(new KeyboardEvent("keydown",
        { key, isComposing: true, bubbles: true, cancelable: true }))"""
    tab.message.fill("日本")
    tab.message.evaluate(composing, "Enter")
    assert "POST" not in sent
    asked = tab.ask("日本語", **LONG)
    tab.message.evaluate(composing, "Escape")
    tab.eventually(lambda: len(tab.words()) > 2, "words")
    expect(tab.stop).to_be_visible()
    tab.page.keyboard.press("Escape")
    tabs.rig.aborted(asked)


def test_what_is_announced(tabs: Tabs) -> None:
    """The state, once for each: not the answer, word by word."""
    tab = tabs.open()
    tab.state.evaluate(
        """(e) => { window.said = []; new MutationObserver(() => window.said.push(e.textContent))
            .observe(e, { childList: true, characterData: true, subtree: true }); }"""
    )
    tab.ask(tokens=30, rate=200)
    expect(tab.state).to_have_text("The answer is complete.")
    tab.ask(**LONG)
    tab.eventually(lambda: len(tab.words()) > 2, "words")
    assert tab.turns.last.locator(".answer").get_attribute("aria-busy") == "true"
    tab.page.keyboard.press("Escape")
    expect(tab.state).to_have_text("Stopped. What had come stays.")
    assert tab.turns.last.locator(".answer").get_attribute("aria-busy") == "false"
    said = tab.page.evaluate("window.said")
    assert said == ["Answering.", "The answer is complete.", "Answering.",
                    "Stopped. What had come stays."]  # fmt: skip
    assert tab.answer.evaluate("(e) => e.closest('[aria-live], [role=log], [role=status]')") is None


NAMELESS = """() => [...document.querySelectorAll("button, a, input, select, textarea, summary")]
    .filter((e) => e.checkVisibility({ visibilityProperty: true }))
    .filter((e) => !(e.labels?.[0]?.textContent ?? e.ariaLabel ?? e.textContent).trim())
    .map((e) => e.outerHTML)"""


def test_what_it_is_to_those_who_do_not_see_it(tabs: Tabs) -> None:
    """Landmarks, headings, names: one of each where there is to be one."""
    tab = tabs.open()
    page = tab.page
    tab.ask(tokens=3, rate=100)
    expect(tab.state).to_have_text("The answer is complete.")
    for role, name in (
        ("banner", None),
        ("main", "Conversation"),
        ("complementary", "Provider"),
        ("textbox", "Message"),
        ("combobox", "The next answer"),
        ("button", "Send"),
        ("button", "New chat"),
        ("status", None),
    ):
        expect(page.get_by_role(role, name=name)).to_have_count(1)  # type: ignore[arg-type]
    assert page.get_by_role("heading").all_inner_texts() == ["Chat", "You", "Answer", "Provider"]
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_reduced_motion(tabs: Tabs) -> None:
    """Nothing moves for those who do not want it."""
    tab = tabs.open()
    asked = tab.ask(**LONG, headers_after=60)
    dot = tab.turns.last.locator(".waiting span").first
    moves = "(e) => getComputedStyle(e).animationName"
    assert dot.evaluate(moves) == "breathe"
    tab.page.emulate_media(reduced_motion="reduce")
    assert dot.evaluate(moves) == "none"
    tab.page.keyboard.press("Escape")
    tabs.rig.provider.request(asked.stream, "closed")


# The policy


OTHERS: dict[str, str] = {
    "an image of another host": "new Image().src = 'http://127.0.0.1:9/x.png'",
    "a request to another host": "fetch('http://127.0.0.1:9/').catch(() => {})",
    "a style": "document.body.setAttribute('style', 'color: red')",
    "a frame": "document.body.append(Object.assign(document.createElement('iframe'), {src: '/'}))",
    "markup": "try { document.body.innerHTML = '<p>' } catch {}",
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_policy_lets_nothing_in(tabs: Tabs, what: str) -> None:
    """And what it keeps out is seen by these tests: in all others there was none."""
    tab = tabs.open(anew=True)
    tab.page.evaluate(f"() => {{ {OTHERS[what]} }}")
    tab.eventually(lambda: tab.complaints, "a complaint")
    refused = ["Content Security Policy", "TrustedHTML"]
    assert all(any(word in one for word in refused) for one in tab.complaints), tab.complaints
    tab.intend(*refused)
