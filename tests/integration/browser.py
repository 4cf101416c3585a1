"""Chromium, the standalone service, and the page in it as its user has it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)

from tests.conftest import PATIENCE, eventually, require
from tests.integration.processes import Provider, Server, descriptors, ends

__all__ = ["LONG", "Asked", "Chromium", "Route", "Standalone", "Tab", "Tabs", "expect"]

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LONG = {"rate": 40, "tokens": 20_000}
"""An answer that does not end by itself."""

SOON = PATIENCE / 5
"""Seconds from before a click until the provider knows, on a machine that does much else.

Most of it is the browser's and its driver's: the meter says how long the stop itself took.
"""

expect.set_options(timeout=PATIENCE * 1000)


def chromium() -> str:
    """The browser's path; without one the test is skipped, see `require`."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        require("chromium")
    return str(found)


class Chromium:
    """A browser without a window. Playwright has the thread's event loop until `close`."""

    def __init__(self, **profile: Any) -> None:
        """
        Args:
            profile: What `profile` shall be like, see Playwright's `Browser.new_context`.
        """
        path = chromium()
        self._like = profile
        # As root there is no sandbox; /dev/shm may be small in a container.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        with contextlib.ExitStack() as begun:
            playwright = begun.enter_context(sync_playwright())
            self.browser: Browser = playwright.chromium.launch(executable_path=path, args=arguments)
            begun.callback(self.browser.close)
            self._stack = begun.pop_all()
        self._profile: BrowserContext | None = None

    @property
    def profile(self) -> BrowserContext:
        """What tests share: a tab that is there already is much quicker than a new one."""
        if self._profile is None:
            self._profile = self.browser.new_context(**self._like)
        return self._profile

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Asked:
    """A question as it went out."""

    session: str
    stream: str
    body: dict[str, Any]

    @property
    def messages(self) -> list[tuple[str, str]]:
        return [(one["role"], one["content"]) for one in self.body["messages"]]


class Tab:
    """One tab with the page. It notes what the browser complains of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.intended: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", self._note_error)

    def ready(self) -> None:
        """Waits until the page does what one asks of it."""
        expect(self.message).to_be_focused()

    def unlisten(self) -> None:
        self.page.remove_listener("console", self._note)
        self.page.remove_listener("pageerror", self._note_error)

    def _note_error(self, error: Error) -> None:
        self.complaints.append(f"raised {error}")

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} {message.location.get('url', '')}")

    def intend(self, *patterns: str) -> None:
        """The browser may complain of these: refusals that the test brings about."""
        self.intended += patterns

    def unintended(self) -> list[str]:
        # The service saw the connection end before the cancel came, and says so with a 404.
        late = r"status of 404 .*/cancel/"
        expected = [late, *self.intended]
        return [one for one in self.complaints if not any(re.search(e, one) for e in expected)]

    # What is on the page, by what it is to those who do not see it.

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def stop(self) -> Locator:
        return self.page.get_by_role("button", name="Stop AI")

    @property
    def state(self) -> Locator:
        return self.page.get_by_role("status")

    @property
    def turns(self) -> Locator:
        return self.page.locator(".turn")

    @property
    def answer(self) -> Locator:
        """The last answer's text."""
        return self.turns.last.locator(".text")

    @property
    def mark(self) -> Locator:
        return self.turns.last.locator(".mark")

    @property
    def failure(self) -> Locator:
        return self.turns.last.locator(".failure")

    def behave(self, **simulate: Any) -> None:
        """Has the provider's next answers be like this."""
        self.page.get_by_label("The next answer").evaluate(
            "(select, plan) => select.add(new Option('as the test says', plan, true, true))",
            json.dumps(simulate),
        )

    def ask(self, question: str = "Tell me.", **simulate: Any) -> Asked:
        """Types a question and sends it with Enter."""
        if simulate:
            self.behave(**simulate)
        self.message.fill(question)
        return self.sent(lambda: self.message.press("Enter"))

    def sent(self, act: Any) -> Asked:
        """The question that goes out because of `act`."""
        with self.page.expect_request("**/stream") as request:
            act()
        body = request.value.post_data_json
        return Asked(body["sessionId"], body["streamId"], body)

    def words(self) -> list[str]:
        return self.answer.inner_text().split()

    def meter(self, what: str) -> str:
        row = self.page.get_by_role("complementary", name="Provider").locator("dl > div")
        return row.filter(has_text=what).locator("dd").inner_text()

    def figure(self, what: str) -> int:
        """A number of the meter's, once there is one."""

        def number() -> re.Match[str] | None:
            return re.match(r"(?:under )?(\d+)", self.meter(what))

        match = self.eventually(number, what)
        return int(match[1])

    def eventually(self, condition: Any, what: str = "") -> Any:
        """As `tests.conftest.eventually`, but the browser's events are seen meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what}; last seen: {value!r}"
            self.page.wait_for_timeout(10)
        return value


@dataclass
class Standalone:
    """`gunicorn wsgi:app`, with the built-in provider, the page and its meter."""

    server: Server
    provider: Provider
    place: str = "/"
    prefix: str = "/api/chat"
    token: str = ""
    _baseline: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        log: Path,
        worker_class: str = "gthread",
        defaults: dict[str, Any] | None = None,
        token: str = "",
        app: str = "wsgi:app",
        **environ: str,
    ) -> Standalone:
        """
        Args:
            log: Where its log goes.
            worker_class: gthread or gevent.
            defaults: How the provider's answers are.
            token: One that the service takes, if it asks for one.
            app: Another in the place of the service's own.
            environ: Its environment.
        """
        provider = Provider(defaults=defaults or {})
        try:
            settings = {"CHATSTREAM_UPSTREAM_URL": provider.url, "CHATSTREAM_METER": "1", **environ}
            server = Server(log, app=app, CHATSTREAM_WORKER_CLASS=worker_class, **settings)
        except BaseException:
            provider.close()
            raise
        prefix = environ.get("CHATSTREAM_URL_PREFIX", "/api/chat")
        made = cls(server, provider, environ.get("CHATSTREAM_PAGE", "/"), prefix, token)
        made._stream_through()
        made._baseline = made._descriptors()
        return made

    def _stream_through(self) -> None:
        """Has everything made that is made once: the loop, the pool, a reusable connection.

        And what was idle for half a minute is closed: the pool does so when one comes back to it.
        """
        session = f"warm-up-{uuid.uuid4().hex}"
        body = {"messages": [{"role": "user", "content": "hi"}], "sessionId": session}
        body["simulate"] = {"tokens": 1, "rate": 0}
        kind = {"Content_Type": "application/json", "Authorization": f"Bearer {self.token}"}
        assert self.server.ask("POST", f"{self.prefix}/stream", json.dumps(body).encode(), **kind)
        self.server.ending_of(session)

    def _descriptors(self) -> dict[int, int]:
        but = (self.provider.port, self.server.port)
        return descriptors(self.server.workers, but=but)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}{self.place}"

    def halted(self, asked: Asked, since_ns: int, rate: float = 40) -> dict[str, Any]:
        """Asserts that the provider was told, and soon: the figures, and the one line in the log.

        Args:
            asked: What was stopped.
            since_ns: An instant of the monotonic clock, just before the stop.
            rate: Tokens in a second.
        """
        figure = self.provider.request(asked.stream, "closed", after=since_ns)
        assert figure["closed_by"] in ("client", "reset")
        assert figure["finished"] is False
        assert figure["closed_ns"] - since_ns < SOON * 1e9
        assert figure["generated_after"] <= SOON * rate + 1
        again = self.provider.request(asked.stream, "closed")
        assert again["generated"] == figure["generated"], "it went on"
        return figure

    def aborted(self, asked: Asked, by: str = "client/cancel") -> None:
        """Asserts that the log says once how it ended, and that it was not whole."""
        assert f"aborted by {by} " in self.server.ending_of(asked.session, asked.stream)

    def check_leaks(self) -> None:
        """Nothing generates, every stream has its one end, no descriptor is left."""
        eventually(lambda: self.provider.stats()["generating"] == 0, "no generation")
        eventually(lambda: not self._endless(), "an end for each stream")
        if self._more():
            self._stream_through()
        eventually(lambda: not self._more(), f"descriptors as before; more: {self._more()}")
        assert self.server.errors() == []

    def _endless(self) -> list[str]:
        """The streams that have begun and not ended."""
        lines = [line for line in self.server.log().splitlines() if "[SSE]" in line]
        begun = [_stream_of(line) for line in lines if " started " in line]
        ended = [_stream_of(line) for line in lines if ends(line)]
        assert len(ended) == len(set(ended)), "two ends for one stream"
        return [name for name in begun if name not in ended]

    def _more(self) -> dict[int, int]:
        now = self._descriptors()
        return {pid: n for pid, n in now.items() if n > self._baseline.get(pid, n)}

    def stop(self) -> None:
        try:
            self.server.stop()
        finally:
            self.provider.close()


def _stream_of(line: str) -> str:
    found = re.search(r" stream=(\S+)", line)
    return found[1] if found else line


@dataclass
class Tabs:
    """The tabs of one test. The first may have been another test's; it has no chat yet."""

    context: BrowserContext
    rig: Standalone
    opened: list[Tab] = field(default_factory=list)

    def open(self, *, anew: bool = False) -> Tab:
        """A tab with the page and no chat; loaded `anew` only if it has to be, which is slow."""
        spare = [page for page in self.context.pages if page not in self._pages()]
        page = spare[0] if spare else self.context.new_page()
        tab = self._noted(Tab(page))
        if anew or page.url != self.rig.url:
            page.goto(self.rig.url)
            tab.ready()
        tab.page.get_by_role("button", name="New chat").click()
        tab.ready()
        return tab

    def duplicate(self, tab: Tab) -> Tab:
        """Another tab with what the first has in its sessionStorage: the same session."""
        with tab.page.expect_popup() as popup:
            tab.page.evaluate("window.open(location.href)")
        other = self._noted(Tab(popup.value))
        other.ready()
        return other

    def _pages(self) -> list[Page]:
        return [tab.page for tab in self.opened]

    def _noted(self, tab: Tab) -> Tab:
        self.opened.append(tab)
        return tab

    def close(self) -> None:
        """Leaves one tab, as it was at first, for the next test."""
        self.context.set_offline(False)
        for tab in self.opened:
            tab.unlisten()
        for page in self.context.pages[1:]:
            page.close()
        for page in self.context.pages:
            page.set_viewport_size({"width": 1280, "height": 720})
            page.emulate_media(color_scheme=None, reduced_motion=None)
        assert [tab.unintended() for tab in self.opened if tab.unintended()] == []
