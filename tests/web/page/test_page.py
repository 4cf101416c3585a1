"""page: what is served of the folder, to whom, and with which headers."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import flask
import pytest
import requests
import responses
from flask.testing import FlaskClient
from flask_wtf import CSRFProtect
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse

from chatstream import ChatStream
from chatstream.simulator import Simulator
from chatstream.web.page import files, meter
from tests.conftest import eventually

FOLDER = Path(files.__file__).parent
ROOT = FOLDER.parents[2]
PREFIX = "/api/chat"
MODULE = f"{PREFIX}/chatstream.js"


def app(identify: Callable[[], Any] | None = None, **settings: Any) -> flask.Flask:
    host = flask.Flask("host")
    host.config.from_mapping({f"CHATSTREAM_{key}": value for key, value in settings.items()})
    ChatStream(host, identify=identify)
    return host


def client(**settings: Any) -> FlaskClient:
    return app(**settings).test_client()


class Addresses(HTMLParser):
    """What a page loads, and what of it would need a weaker policy."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name in ("src", "href"):
                self.found.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def loaded(browser: Client, path: str) -> dict[str, TestResponse]:
    """What a browser gets: the page's files and what their modules import, by address."""
    got: dict[str, TestResponse] = {}
    wanted = [urljoin(path, address) for address in Addresses(browser.get(path).text).found]
    while wanted:
        address = wanted.pop()
        if address not in got:
            got[address] = browser.get(address)
            imports = re.findall(r"(?:from|import\()\s*\"(\./[^\"]+\.js)\"", got[address].text)
            wanted += [urljoin(address, name) for name in imports]
    return got


# Where the page is


@pytest.mark.parametrize(
    ("place", "prefix"),
    [("/", "/api/chat"), ("/chat", "/api/chat"), ("/a/b", "/a/c"), ("/api/chat", "/api/chat/v1")],
)
@pytest.mark.parametrize("mounted", ["", "/mounted"])
def test_the_page_finds_what_it_needs(place: str, prefix: str, mounted: str) -> None:
    """Wherever it is, and wherever its app is mounted: all of it is there, below the prefix."""
    host = app(PAGE=place, URL_PREFIX=prefix)
    browser = Client(
        DispatcherMiddleware(flask.Flask("front"), {mounted: host}) if mounted else host
    )
    got = loaded(browser, f"{mounted}{place}")
    assert {response.status_code for response in got.values()} == {200}
    expected = {f"{mounted}{prefix}/{name}" for name in (*files.PAGE, "chatstream.js")}
    assert set(got) == expected


def test_a_proxy_may_take_a_part_of_the_path_away() -> None:
    """The page's addresses are relative: they hold below any path it is seen at."""
    found = Addresses(client(PAGE="/").get("/").text).found
    styles = [f"{name}.css" for name in ("page", "answer", "access", "meter")]  # in this order
    assert [urljoin("/seen/here/", address) for address in found] == [
        f"/seen/here/api/chat/{name}" for name in ("icon.svg", *styles, "page.js", "icon.svg")
    ]


def test_a_mounted_app_asked_for_without_its_slash() -> None:
    """/mounted is no folder to the browser, so it is sent to /mounted/."""
    both = Client(DispatcherMiddleware(flask.Flask("front"), {"/moun ted": app(PAGE="/")}))
    answer = both.get("/moun%20ted")
    assert (answer.status_code, answer.headers["Location"]) == (308, "http://localhost/moun%20ted/")
    assert both.get("/moun%20ted/").status_code == 200


@pytest.mark.parametrize("settings", [{}, {"PAGE": "off"}])
def test_without_the_page_there_is_the_module(settings: dict[str, str]) -> None:
    """Nothing at /, none of the page's files; chatstream.js and its types for pages of others."""
    browser = client(**settings)
    there = {name for name in (*files.MODULE, *files.PAGE) if _status(browser, name) == 200}
    assert there == set(files.MODULE)
    assert browser.get("/").status_code == 404


def _status(browser: FlaskClient, name: str) -> int:
    return browser.get(f"{PREFIX}/{name}").status_code


@pytest.mark.parametrize(
    "path", ["page.html", "__init__.py", "../page.js", "..%2fconfig.py", "%2fetc%2fpasswd", ""]
)
def test_only_what_is_listed_is_served(path: str) -> None:
    """The names are routes of their own: no path is ever looked up in a folder."""
    assert client(PAGE="/").get(f"{PREFIX}/{path}").status_code == 404


def test_every_file_of_the_folder_has_its_place() -> None:
    """A file that somebody adds is listed, or it is the page itself."""
    there = {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "", ".json")}
    assert there == {*files.MODULE, *files.PAGE, "page.html"}


def test_the_meter_is_the_built_in_providers() -> None:
    """The page knows from its own first line whether there is one."""
    assert 'data-meter="off"' in client(PAGE="/").get("/").text
    assert 'data-meter="on"' in client(PAGE="/", METER="1").get("/").text


# With which headers


def test_the_pages_policy() -> None:
    """Nothing but its own files, no markup out of texts, in nobody's frame."""
    answer = client(PAGE="/").get("/")
    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert answer.content_type == "text/html; charset=utf-8"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"


def test_the_page_needs_no_weaker_policy() -> None:
    """No script or style in it, no address that is another host's."""
    parsed = Addresses(client(PAGE="/").get("/").text)
    assert parsed.inline == []
    assert [address for address in parsed.found if "//" in address] == []
    assert len(parsed.found) > 3


@pytest.mark.parametrize("name", [*files.MODULE, *files.PAGE])
def test_a_files_headers(name: str) -> None:
    """Its type, and no guessing at another; asked for anew each time."""
    answer = client(PAGE="/").get(f"{PREFIX}/{name}")
    assert answer.data == (FOLDER / name).read_bytes()
    kinds = {"js": "text/javascript", "ts": "application/typescript", "css": "text/css"}
    kinds["svg"] = "image/svg+xml"
    assert answer.content_type == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", MODULE])
def test_what_is_unchanged_is_not_sent_again(path: str) -> None:
    """By its ETag, else by its date; a change, or a longer page, has another ETag."""
    browser = client(PAGE="/")
    first = browser.get(path)
    etag, modified = first.headers["ETag"], first.headers["Last-Modified"]
    assert browser.get(path, headers={"If-None-Match": etag}).status_code == 304
    assert browser.get(path, headers={"If-Modified-Since": modified}).status_code == 304
    assert browser.get(path, headers={"If-None-Match": '"another"'}).status_code == 200
    earlier = email.utils.formatdate(0, usegmt=True)
    assert browser.get(path, headers={"If-Modified-Since": earlier}).status_code == 200
    other = client(PAGE="/", METER="1", URL_PREFIX="/x").get("/")
    assert other.headers["ETag"] not in (etag, browser.get("/").headers["ETag"])


@pytest.mark.parametrize("path", ["/", MODULE])
def test_head_is_get_without_the_body(path: str) -> None:
    """Length and all."""
    browser = client(PAGE="/")
    got, head = browser.get(path), browser.head(path)
    assert (head.status_code, head.data) == (200, b"")
    for name in ("Content-Type", "Content-Length", "ETag"):
        assert head.headers[name] == got.headers[name]


def test_the_files_are_in_the_wheel() -> None:
    """Whoever installs the package has the page."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = project["package-data"]["chatstream.web.page"]
    listed = {path.name for pattern in patterns for path in FOLDER.glob(pattern)}
    assert {*files.MODULE, *files.PAGE, "page.html"} <= listed


# In an app that guards its POSTs


def guarded(token: Callable[[], Any] | None = None, **settings: Any) -> flask.Flask:
    """An app with Flask-WTF's CSRFProtect, or with another `csrf_token`."""
    host = flask.Flask("host")
    host.config.from_mapping(
        SECRET_KEY="x", **{f"CHATSTREAM_{key}": value for key, value in settings.items()}
    )
    if token is None:
        CSRFProtect(host)
    else:
        host.jinja_env.globals["csrf_token"] = token
    ChatStream(host)
    return host


def test_a_guarded_apps_token_is_in_the_page() -> None:
    """One that the app then takes, for a visitor's own session; so the page is kept by nobody."""
    browser = guarded(PAGE="/chat").test_client()
    answer = browser.get("/chat")
    (token,) = re.findall(r'<meta name="csrf-token" content="([^"]+)">', answer.text)
    assert browser.post(f"{PREFIX}/cancel/s").status_code == 400
    assert browser.post(f"{PREFIX}/cancel/s", headers={"X-CSRFToken": token}).status_code == 404
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Cookie" in answer.headers["Vary"]
    assert not {"ETag", "Last-Modified"} & set(answer.headers.keys())


def test_a_guarded_app_over_https_is_shown_a_referrer() -> None:
    """Flask-WTF asks for one then; the rest of the policy is as strict as ever."""
    answer, plain = guarded(PAGE="/chat").test_client().get("/chat"), client(PAGE="/").get("/")
    assert answer.headers["Referrer-Policy"] == "same-origin"
    for name in ("Content-Security-Policy", "Cross-Origin-Opener-Policy", "Content-Type"):
        assert answer.headers[name] == plain.headers[name]


def test_a_token_cannot_write_into_the_page() -> None:
    """Whatever makes it."""
    answer = guarded(lambda: '"><b>$csrf', PAGE="/chat").test_client().get("/chat")
    assert '<meta name="csrf-token" content="&quot;&gt;&lt;b&gt;$csrf">' in answer.text


def test_without_a_guard_there_is_no_token() -> None:
    """Nor a cookie."""
    answer = client(PAGE="/").get("/")
    assert '<meta name="csrf-token" content="">' in answer.text
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("name", [*files.MODULE, *files.PAGE])
def test_a_guarded_app_serves_the_files(name: str) -> None:
    """Flask-WTF looks at the name of each view before it lets a request through."""
    browser = guarded(PAGE="/chat", METER="1").test_client()
    assert _status(browser, name) == 200
    assert _status(browser, "meter/..") == 404
    assert browser.head("/chat").data == b""
    assert browser.options("/chat").status_code == 204
    assert browser.post("/chat").status_code == 400


# The meter


@pytest.fixture
def provider() -> Iterator[Simulator]:
    simulator = Simulator().start()
    yield simulator
    simulator.close()


def ask(provider: Simulator, name: str, **simulate: Any) -> requests.Response:
    body = {"stream": True, "simulate": {"id": name, **simulate}}
    return requests.post(provider.url, json=body, stream=True, timeout=20)


def meter_of(provider: Simulator, **settings: Any) -> Callable[..., Any]:
    """Asks the meter for an answer's figures."""
    browser = client(METER="1", UPSTREAM_URL=provider.url, **settings)

    def figures(name: str, **query: str) -> Any:
        answer = browser.get(f"{PREFIX}/meter/{name}", query_string=query)
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.json

    return figures


def test_the_meter_shows_what_the_provider_counts(provider: Simulator) -> None:
    """Nothing before it began; then tokens, and whether the connection is open."""
    figures = meter_of(provider)
    assert figures("one")["known"] is False
    with ask(provider, "one", tokens=5000, rate=200):
        live = eventually(lambda: (f := figures("one"))["delivered"] > 2 and f, "tokens")
        assert live["known"] is live["open"] is live["ok"] is True
        assert live["generated"] >= live["delivered"]
        assert live["closed_by"] is None
        assert "stop_ms" not in live
        assert abs(live["now_ms"] - time.monotonic() * 1e3) < 1e3


def test_the_meter_tells_when_the_provider_was_told(provider: Simulator) -> None:
    """`at` is an instant of the service's clock: the stop is as long as from there to the close."""
    figures = meter_of(provider)
    with ask(provider, "two", tokens=5000, rate=200) as answer:
        eventually(lambda: figures("two")["delivered"], "tokens")
        at = figures("two")["now_ms"]
        before = figures("two", at=f"{at:.3f}")
        assert (before["open"], before["stop_ms"]) == (True, None)
        eventually(lambda: figures("two", at=f"{at:.3f}")["generated_after"] >= 10, "10 tokens")
        answer.close()
        told = figures("two", at=f"{at:.3f}", wait="closed")
    assert told["open"] is False
    assert told["closed_by"] in ("client", "reset")
    assert told["stop_ms"] >= 45
    assert told["stop_ms"] / 5 - 1 <= told["generated_after"] <= told["stop_ms"] / 5 + 1
    late = figures("two", at=f"{at + told['stop_ms'] + 1000:.3f}")
    assert (late["stop_ms"], late["generated_after"]) == (0, 0)


def test_an_answer_that_ended_by_itself_was_not_stopped(provider: Simulator) -> None:
    """Then there is no such time."""
    figures = meter_of(provider)
    with ask(provider, "three", tokens=2, rate=0) as answer:
        assert b"[DONE]" in answer.content
    told = figures("three", at="1.5", wait="closed")
    assert (told["closed_by"], told["stop_ms"], told["generated"]) == ("finished", None, 2)


def test_the_meter_waits_in_vain_for_a_while_only(
    provider: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is never told must not hold a thread for ever."""
    monkeypatch.setattr(meter, "_WAIT", 0.05)
    figures = meter_of(provider)
    with ask(provider, "four", tokens=5000):
        assert figures("four", wait="closed")["open"] is True
    assert figures("never", wait="closed")["known"] is False


def test_the_meter_is_off_unless_asked_for(provider: Simulator) -> None:
    """A real provider has no such figures."""
    browser = client(PAGE="/", UPSTREAM_URL=provider.url)
    assert browser.get(f"{PREFIX}/meter/one").status_code == 404


@pytest.mark.parametrize(
    "name", ["a b", ".", "..", "../stats", "x" * 129, "", "a?wait=closed", "a\n"]
)
def test_only_a_name_is_asked_for(name: str) -> None:
    """What is no id goes nowhere: nobody is at this provider's address."""
    browser = client(METER="1", UPSTREAM_URL="http://127.0.0.1:9/v1/chat/completions")
    quoted = requests.utils.quote(name, safe="")
    answer = browser.get(f"{PREFIX}/meter/{quoted}")
    assert (answer.status_code, answer.json["reason"]) == (404, "not_found")


@pytest.mark.parametrize("at", ["", "-1", "soon", "1e9", "9" * 13])
def test_only_an_instant_is_asked_for(provider: Simulator, at: str) -> None:
    """400, and what it should be."""
    told = meter_of(provider)("one", at=at)
    assert (told["ok"], told["message"]) == (False, "at must be an instant in ms, as now_ms is.")


@responses.activate
def test_the_key_is_not_sent_for_figures() -> None:
    """They are at the provider's origin, whatever the chat's path; the key is for the chat."""
    figure = {"generated": 1, "delivered": 1, "open": True, "closed_by": None}
    responses.get("http://provider:81/requests/one", json=figure)
    browser = client(METER="1", API_KEY="sk-secret", UPSTREAM_URL="http://provider:81/x/y")
    assert browser.get(f"{PREFIX}/meter/one").json["generated"] == 1
    assert "Authorization" not in responses.calls[0].request.headers


@responses.activate
@pytest.mark.parametrize("body", ["", "[]", "7", '{"id": 1}', "<h1>"])
def test_a_provider_that_is_not_the_built_in_one(body: str) -> None:
    """Is found out, and said."""
    responses.get("http://provider/requests/one", body=body)
    answer = client(METER="1", UPSTREAM_URL="http://provider/v1").get(f"{PREFIX}/meter/one")
    assert (answer.status_code, answer.json["reason"]) == (502, "upstream_error")
    assert "not the built-in one" in answer.json["message"]


def test_a_provider_that_is_away() -> None:
    """Is an error like any other."""
    answer = client(METER="1", UPSTREAM_URL="http://127.0.0.1:9/v1").get(f"{PREFIX}/meter/one")
    assert (answer.status_code, answer.json["reason"]) == (502, "upstream_connect")
