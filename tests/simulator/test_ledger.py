"""ledger, exchange: what is known of each request, and the totals."""

from __future__ import annotations

import json
import time
from contextlib import closing

from chatstream.simulator import Simulator
from tests.simulator.client import CHAT, LONG, Client


def test_the_figures_of_a_finished_request(client: Client, desk: Client, name: str) -> None:
    """Everything is told, except secrets."""
    simulate = {"id": name, "tokens": 4, "rate": 100}
    body = {"stream": True, "model": "m", "messages": []}
    client.ask("POST", CHAT, {**body, "simulate": simulate}, Authorization="Bearer key", X_A="1")
    figure = desk.figure(name, "closed")
    stamps = [figure[key] for key in ("started_ns", "headers_ns", "first_token_ns", "closed_ns")]
    assert stamps == sorted(stamps)
    assert figure["headers"]["authorization"] == "present"
    assert figure["headers"]["x_a"] == "1"
    assert "key" not in json.dumps(figure).replace("keep", "")
    expected = {
        "id": name,
        "attempt": 1,
        "path": CHAT,
        "body": body,
        "stream": True,
        "tokens": 4,
        "generated": 4,
        "delivered": 4,
        "finished": True,
        "open": False,
        "closed_by": "finished",
    }
    assert {key: figure[key] for key in expected} == expected


def test_a_running_request(client: Client, desk: Client, name: str) -> None:
    """It is open, and nothing is said of its end."""
    client.begin(id=name, tokens=LONG)
    figure = desk.figure(name, "delivered")
    assert (figure["open"], figure["finished"]) == (True, False)
    assert (figure["closed_ns"], figure["closed_by"]) == (None, None)
    assert figure["peer"] == client.sock.getsockname()[1]


def test_connections_are_numbered(provider: Simulator, client: Client, desk: Client) -> None:
    """A reused connection shows, and so does a new one."""
    for number in (1, 2):
        client.chat(id=f"reuse-{number}", tokens=1, rate=0)
    with closing(Client(provider)) as another:
        another.chat(id="reuse-3", tokens=1, rate=0)
    first, second, third = (desk.figure(f"reuse-{number}")["connection"] for number in (1, 2, 3))
    assert first == second < third


def test_the_newest_of_an_id_is_told_and_all_are_listed(
    client: Client, desk: Client, name: str
) -> None:
    """A request that was sent twice cannot hide."""
    client.chat(id=name, tokens=1, rate=0)
    client.chat(id=name, tokens=2, rate=0)
    assert desk.figure(name)["attempt"] == 2
    figures = desk.ask("GET", "/requests").json()
    assert [figure["tokens"] for figure in figures if figure["id"] == name] == [1, 2]


def test_how_many_tokens_were_made_after_an_instant(
    client: Client, desk: Client, name: str
) -> None:
    """From the plan's clock, so also for one that has passed; until the request has ended."""
    client.begin(id=name, tokens=LONG, rate=1000)
    began = desk.figure(name, "delivered", count=40)["started_ns"]
    middle = began + 20_000_000  # ns: the tokens 0 to 20 had been made
    running = desk.figure(name, after=middle)
    assert running["generated_after"] == running["generated"] - 21 > 0
    client.leave()
    figure = desk.figure(name, "closed", after=middle)
    assert figure["generated_after"] == figure["generated"] - 21
    assert desk.figure(name, after=began - 1)["generated_after"] == figure["generated"]
    assert desk.figure(name, after=figure["closed_ns"])["generated_after"] == 0
    assert desk.figure(name, after=time.monotonic_ns())["generated_after"] == 0
    assert "generated_after" not in desk.figure(name)


def test_nothing_is_made_after_the_end(client: Client, desk: Client, name: str) -> None:
    """A whole answer's last token is made when the clock says so, whoever asks later."""
    client.chat(id=name, tokens=10, rate=1000)
    ended = desk.figure(name, "closed")
    assert desk.figure(name, after=ended["closed_ns"])["generated_after"] == 0
    assert desk.figure(name, after=ended["started_ns"])["generated_after"] == 10


def test_delete_forgets_the_closed(client: Client, desk: Client, name: str) -> None:
    """Running requests stay, the totals too."""
    client.chat(id=name, tokens=1, rate=0)
    client.begin(id=f"{name}-open", tokens=LONG)
    desk.figure(f"{name}-open", "started")
    before = desk.stats()
    assert desk.ask("DELETE", "/requests").json()["forgotten"] >= 1
    assert [figure["id"] for figure in desk.ask("GET", "/requests").json()] == [f"{name}-open"]
    after = desk.stats()
    assert after["requests"] == before["requests"]
    assert after["generated"] >= before["generated"]


def test_stats() -> None:
    """Connections that ask for figures are in none of the counts."""
    with Simulator() as provider, closing(Client(provider)) as desk:
        with closing(Client(provider)) as client:
            client.begin(id="a", tokens=10, rate=0, silent_after=4)
            desk.figure("a", "delivered", count=4)
            stats = desk.stats()
            assert stats.pop("cpu_seconds") > 0
            assert stats.pop("last_connection_closed_ns") is None
            assert stats == {
                "requests": 1,
                "generating": 1,
                "generated": 5,
                "delivered": 4,
                "connections_open": 1,
                "connections_total": 1,
                "handshakes_aborted": 0,
                "internal_errors": 0,
            }
        figure = desk.figure("a", "closed")
        stats = desk.stats()
        assert (stats["generating"], stats["connections_open"]) == (0, 0)
        assert stats["connections_total"] == 1
        assert stats["last_connection_closed_ns"] == figure["closed_ns"]
