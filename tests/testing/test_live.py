"""testing.live: an app behind a real server, and what is left of it: nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import requests
from flask import Flask

from chatstream import Cause, ChatStream, Kind
from chatstream.testing import Live, Provider, threads
from tests.conftest import eventually

pytestmark = pytest.mark.usefixtures("nothing_left")


def mounted(**config: object) -> Flask:
    app = Flask("host")
    app.config.update(config)
    ChatStream(app)
    return app


@pytest.fixture
def serve(
    nothing_left: None, chatstream_provider: Provider, chatstream_live: Callable[[Flask], Live]
) -> Callable[[Flask], Live]:
    return chatstream_live


def test_it_is_a_real_server(serve: Callable[[Flask], Live]) -> None:
    """On a port of its own, for whatever client a test likes; two apps have two."""
    one, two = serve(mounted()), serve(mounted(CHATSTREAM_URL_PREFIX="/talk"))
    assert one.url != two.url
    assert requests.get(f"{one.url}/api/chat/openapi.json", timeout=10).status_code == 200
    assert requests.get(f"{two.url}/talk/openapi.json", timeout=10).status_code == 200
    assert two.ask("Hello?").status == two.browser().ask("Hello?").status == 200


def test_the_provider_is_the_tests(
    serve: Callable[[Flask], Live], chatstream_provider: Provider
) -> None:
    """Also of an app whose settings name another, and were read before."""
    live = serve(mounted(CHATSTREAM_UPSTREAM_URL="http://192.0.2.1/"))
    assert chatstream_provider.figure(live.ask("Hello?")).open


def test_how_a_stream_ended(serve: Callable[[Flask], Live]) -> None:
    """The outcome of each, whatever the level of the log."""
    live = serve(mounted())
    stopped, whole = live.ask("?"), live.ask("?", script={"tokens": 1, "rate": 0})
    failed = live.ask("?", script={"status": 500})
    stopped.close()
    whole.read()
    assert live.outcome(stopped).cause is Cause.CLIENT
    assert live.outcome(whole.stream_id).kind is Kind.COMPLETED
    assert live.outcome(failed).words == "failed: upstream_error"


def test_a_stream_that_has_not_ended(serve: Callable[[Flask], Live]) -> None:
    """The wait is bounded, and the assertion names those that have."""
    live = serve(mounted())
    going_on, whole = live.ask("?", stream_id="a"), live.ask("?", stream_id="b")
    whole.cancel()
    live.outcome(whole)
    with pytest.raises(AssertionError, match=r"'a' has not ended within 0\.05 s\. Ended: 'b'\."):
        live.outcome(going_on, timeout=0.05)
    live.timeout = 0.04
    with pytest.raises(AssertionError, match=r"within 0\.04 s"):
        live.outcome(going_on)


def test_there_is_room_for_many_streams(
    serve: Callable[[Flask], Live], caplog: pytest.LogCaptureFixture
) -> None:
    """werkzeug has a thread for each, so nothing is refused or warned of; an app's limit holds."""
    live = serve(mounted())
    assert {live.ask("?").status for _ in range(5)} == {200}
    assert caplog.messages == []
    limited = serve(mounted(CHATSTREAM_MAX_STREAMS=1))
    assert [limited.ask("?").status, limited.ask("?").status] == [200, 503]


def test_the_end_of_it(chatstream_provider: Provider) -> None:
    """Its streams are told, the port is closed, the app is as it was. A second close is none."""
    app = mounted(CHATSTREAM_UPSTREAM_URL=chatstream_provider.url)
    service = app.extensions["chatstream"]
    own = service.settings
    with Live(app) as live:
        mine, another = live.ask("?"), live.browser().ask("?")
        own_client = requests.post(
            f"{live.url}/api/chat/stream",
            json={"messages": [{"role": "user"}], "simulate": {"id": "r"}},
            stream=True,
            timeout=10,
        )
    live.close()
    for answer in (mine, another, "r"):
        chatstream_provider.told(answer)
    assert "shutting_down" in own_client.text
    assert (service.settings, len(service.registry)) == (own, 0)
    with pytest.raises(requests.ConnectionError):
        requests.get(live.url, timeout=10)


def test_an_app_can_be_served_again(serve: Callable[[Flask], Live]) -> None:
    """One that is made at import time is in every test; listeners of the last one are gone."""
    app = mounted()
    first = serve(app)
    first.ask("?", stream_id="a").cancel()
    first.outcome("a")
    first.close()
    second = serve(app)
    second.ask("?", stream_id="b").cancel()
    second.outcome("b")
    with pytest.raises(AssertionError, match="Ended: 'a'"):
        first.outcome("b", timeout=0)


def test_a_request_that_does_not_end_is_warned_of(
    chatstream_provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can end an app's own thread; the test's end does not wait for it for ever."""
    monkeypatch.setattr(threads, "PATIENCE", 0.05)
    app, asked, go_on = mounted(), threading.Event(), threading.Event()

    @app.get("/stuck")
    def stuck() -> str:
        asked.set()
        go_on.wait(10)
        return ""

    live = Live(app)
    client = threading.Thread(target=lambda: live.get("/stuck"))
    client.start()
    assert asked.wait(10)
    with pytest.warns(ResourceWarning, match="1 requests to the app are still being answered"):
        live.close()
    go_on.set()
    client.join(10)


def test_an_app_without_chatstream_is_not_served(nothing_left: None) -> None:
    """No port is opened for it."""
    with pytest.raises(LookupError, match="after ChatStream"):
        Live(Flask("bare"))


def test_what_an_app_breaks_is_shown(
    serve: Callable[[Flask], Live], capfd: pytest.CaptureFixture[str], caplog: object
) -> None:
    """A traceback is in the log; the requests themselves are not."""
    app = mounted()

    @app.get("/broken")
    def broken() -> str:
        raise RuntimeError("as the test wants it")

    live = serve(app)
    live.get("/nowhere")
    assert live.get("/broken").status == 500
    eventually(lambda: "as the test wants it" in caplog.text)  # type: ignore[attr-defined]
    assert "/nowhere" not in caplog.text + capfd.readouterr().err  # type: ignore[attr-defined]
