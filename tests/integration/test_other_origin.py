"""A page of another origin in a real browser: with CHATSTREAM_CORS_ORIGINS it has an answer.

Without, the browser keeps it from both the module and the routes, and nobody is asked.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.browser import SOON, Chromium, Tab, expect
from tests.integration.processes import ROOT, Provider, Server

MODULE = (ROOT / "chatstream" / "web" / "page" / "chatstream.js").read_bytes()

PAGE = """<!doctype html>
<title>Another origin's page</title>
<link rel="icon" href="data:,">
<button id="stop">Stop</button>
<p id="answer"></p>
<p role="alert" id="failure"></p>
<script type="module">
  const ids = ["stop", "answer", "failure"];
  const [stop, shown, failure] = ids.map((id) => document.getElementById(id));
  try {
    const { stream } = await import("%(module)s");
    const answer = stream({
      url: "%(service)s/api/chat/stream",
      headers: { "Authorization": "Bearer s3cret" },
      messages: [{ role: "user", content: "Hello?" }],
      simulate: { id: "%(name)s", tokens: 10000, rate: 20 },
    });
    stop.onclick = async () => (failure.textContent = JSON.stringify(await answer.stop()));
    for await (const { content } of answer.deltas()) shown.append(content);
    shown.dataset.outcome = answer.outcome;
  } catch (error) {
    failure.textContent = `${error.name}: ${error.code}`;
  }
</script>
"""


@dataclass
class Site:
    """Another origin: a page at any path, which asks `service`; and a copy of the module."""

    port: int
    service: str = ""

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def page(self, path: str) -> bytes:
        """`/copy/<name>` has the module from here, `/import/<name>` from the service."""
        _, how, name = path.split("/")
        module = f"{self.service}/api/chat/chatstream.js" if how == "import" else "/chatstream.js"
        return (PAGE % {"service": self.service, "module": module, "name": name}).encode()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script = self.path == "/chatstream.js"
            body = MODULE if script else made.page(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/javascript" if script else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Site(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def services(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[bool], tuple[Server, Provider]]]:
    """The standalone service, where that page may use it or may not."""
    made: dict[bool, tuple[Server, Provider]] = {}
    with contextlib.ExitStack() as stack:

        def service(open: bool) -> tuple[Server, Provider]:
            if open not in made:
                provider = stack.enter_context(contextlib.closing(Provider()))
                log: Path = tmp_path_factory.mktemp("service") / "server.log"
                server = Server(
                    log,
                    app="wsgi:app",
                    CHATSTREAM_UPSTREAM_URL=provider.url,
                    CHATSTREAM_TOKENS="ada:s3cret",
                    CHATSTREAM_CORS_ORIGINS=site.origin if open else None,
                )
                stack.callback(server.stop)
                made[open] = (server, provider)
            server, _ = made[open]
            site.service = f"http://127.0.0.1:{server.port}"
            return made[open]

        yield service


@pytest.fixture
def tab(chromium: Chromium) -> Iterator[Tab]:
    with contextlib.closing(chromium.browser.new_context()) as profile:
        yield Tab(profile.new_page())


@pytest.mark.parametrize("how", ["import", "copy"])
def test_it_streams_and_stops(tab: Tab, site: Site, services: Any, how: str) -> None:
    """With a token, which a preflight has to allow, on both routes."""
    server, provider = services(True)
    tab.page.goto(f"{site.origin}/{how}/streams-{how}")
    expect(tab.page.locator("#answer")).to_contain_text("A stop button")
    since_ns = time.monotonic_ns()
    tab.page.get_by_role("button", name="Stop").click()
    figure = provider.request(f"streams-{how}", "closed", after=since_ns)
    assert figure["closed_by"] in ("client", "reset")
    assert figure["closed_ns"] - since_ns < SOON * 1e9
    expect(tab.page.locator("#answer")).to_have_attribute("data-outcome", "stopped")
    expect(tab.page.get_by_role("alert")).to_contain_text('"confirmed":true')
    assert server.errors() == []


def test_a_closed_tab(tab: Tab, site: Site, services: Any) -> None:
    _, provider = services(True)
    tab.page.goto(f"{site.origin}/import/closed")
    expect(tab.page.locator("#answer")).to_contain_text("A stop button")
    since_ns = time.monotonic_ns()
    tab.page.close()
    figure = provider.request("closed", "closed", after=since_ns)
    assert figure["closed_by"] in ("client", "reset")
    assert figure["closed_ns"] - since_ns < SOON * 1e9


def test_without_it_the_module_cannot_be_imported(tab: Tab, site: Site, services: Any) -> None:
    _, provider = services(False)
    tab.page.goto(f"{site.origin}/import/refused")
    expect(tab.page.get_by_role("alert")).to_have_text("TypeError: undefined")
    assert [line for line in tab.complaints if "CORS policy" in line]
    assert provider.names() == set()


def test_without_it_nothing_is_asked(tab: Tab, site: Site, services: Any) -> None:
    """The browser's preflight is not answered as it should be: the question stays in the page."""
    server, provider = services(False)
    tab.page.goto(f"{site.origin}/copy/refused")
    expect(tab.page.get_by_role("alert")).to_have_text("StreamError: network")
    assert [line for line in tab.complaints if "CORS policy" in line]
    assert provider.names() == set()
    assert " started " not in server.log()
