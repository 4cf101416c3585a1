"""chat: the wire. Flask's test client on one side, a mocked provider on the other."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import responses
from werkzeug.test import EnvironBuilder, run_wsgi_app

from chatstream.bus.unix.directory import service_directory
from chatstream.errors import BusUnavailable, Unconfirmed
from tests.web.chat import (
    CANCEL,
    DONE,
    EVENT,
    MESSAGES,
    URL,
    MakeChat,
    Unreadable,
    assert_not_found,
    assert_refused,
)
from tests.web.other_workers import OtherWorkers


def test_the_headers_of_an_answer(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """An event stream that no cache keeps and no proxy holds back, with both names on it."""
    response = chat().post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    assert response.status == "200 OK"
    assert response.content_type.partition(";")[0] == "text/event-stream"
    assert response.headers["X-Session-Id"] == "s-1"
    assert response.headers["X-Stream-Id"] == "t-1"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers


RELAYED = {
    "events": (EVENT + EVENT + DONE, EVENT + EVENT + DONE),
    "comments": (b": keep-alive\n\n" + EVENT + b": x\n\n" + DONE,) * 2,
    "CRLF": (EVENT.replace(b"\n", b"\r\n") + DONE.replace(b"\n", b"\r\n"),) * 2,
    "names and ids": (b"id: 7\nevent: delta\nretry: 9\ndata:  x \n\n" + DONE,) * 2,
    "after done": (EVENT + DONE + EVENT, EVENT + DONE),
    "not UTF-8": (b"data: \xff\xfe\x00\n\n" + DONE,) * 2,
    "provider's error": (b'data: {"error":{"message":"overloaded"}}\n\n',) * 2,
}


@pytest.mark.parametrize(("sent", "relayed"), RELAYED.values(), ids=RELAYED)
def test_events_are_relayed_byte_for_byte(
    chat: MakeChat, provider: responses.RequestsMock, sent: bytes, relayed: bytes
) -> None:
    """What the provider sends is what the client gets, up to the terminal event."""
    provider.post(URL, body=sent, content_type="text/event-stream")
    assert chat().post().data == relayed


def test_a_truncated_answer_ends_with_one_error_event(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """Whole events, no half one, and then what went wrong."""
    provider.post(URL, body=EVENT + b"data: half", content_type="text/event-stream")
    data = chat().post().data
    assert data.startswith(EVENT + b"event: error\ndata: {")
    error = json.loads(data.removeprefix(EVENT + b"event: error\ndata: "))["error"]
    assert (error["code"], error["type"]) == ("upstream_truncated", "upstream_error")
    assert set(error) == {"message", "type", "code"}


def test_a_full_worker_is_busy(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """With every slot taken: 503 `busy` with Retry-After, until one is free again."""
    c = chat(MAX_STREAMS="1")
    walk = c.open()
    response = c.post()
    assert_refused(response, 503, "busy")
    assert response.headers["Retry-After"] == "1"
    walk.close()
    assert c.post().status_code == 200


def test_a_live_stream_id_is_a_conflict(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """409 while a stream of that name is live, in whatever session; afterwards it is free."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t")
    assert_refused(c.post({"messages": MESSAGES, "streamId": "t"}), 409, "conflict")
    walk.close()
    assert c.post({"messages": MESSAGES, "streamId": "t"}).status_code == 200


def test_a_live_session_is_a_conflict_where_so_set(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """CHATSTREAM_ON_CONFLICT=reject: the second stream of a session is a 409, the first lives."""
    c = chat(ON_CONFLICT="reject")
    walk = c.open(sessionId="s-1")
    assert_refused(c.post({"messages": MESSAGES, "sessionId": "s-1"}), 409, "conflict")
    assert b"".join(walk.iterable) == EVENT + DONE
    walk.close()


def test_a_cancel_stops_the_stream(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """200 and `cancelled`; the stream's body ends empty and properly; the next cancel is a 404."""
    c = chat()
    walk = c.open(sessionId="s-1")
    response = c.cancel("/s-1")
    assert (response.status_code, response.json) == (200, {"ok": True, "cancelled": True})
    assert response.headers["Cache-Control"] == "no-store"
    assert_not_found(c.cancel("/s-1"))
    assert walk.next() == b""
    assert walk.started[0][0] == "200 OK"
    assert walk.started[0][1]["X-Session-Id"] == "s-1"
    assert walk.started[0][1]["Content-Type"].startswith("text/event-stream")
    walk.close()
    assert len(answers.calls) == 0


@pytest.mark.parametrize("query", ["?streamId=t-1", "?streamId=t-1&streamId=t-2", "?x=1"])
def test_a_cancel_may_name_the_stream(chat: MakeChat, query: str) -> None:
    """With its own streamId a stream is found; an unknown argument does not matter."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t-1")
    assert c.cancel(f"/s-1{query}").status_code == 200
    walk.close()


@pytest.mark.parametrize("query", ["x=\xff", "\xff&streamId=t-1", "=&&&=\x80"])
def test_a_cancels_query_may_hold_any_bytes(chat: MakeChat, query: str) -> None:
    """Bytes that are no UTF-8, which werkzeug raises for, do not keep a cancel from its stream."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t-1")
    environ = EnvironBuilder(path=f"{CANCEL}/s-1", method="POST").get_environ()
    run = run_wsgi_app(c.app, {**environ, "QUERY_STRING": query})
    assert run[1] == "200 OK"
    walk.close()


NOT_FOUND = [
    "",
    "/",
    "//",
    "///s-1",
    "//s-1",
    "/s-1/",
    "/s-1//",
    "/s-1/t-1",
    "/s-",
    "/s-11",
    "/S-1",
    "/other",
    "/%20s-1",
    "/s-1%20",
    "/s-1%0A",
    "/%0A",
    "/s-1%00",
    "/s%2F1",
    "/%2Fs-1",
    "/s-1%3FstreamId",
    "/%C3%A4",
    "/%FF",
    "/" + "x" * 129,
    "/" + "x" * 5000,
    "/s-1?streamId=",
    "/s-1?streamId=t-2",
    "/s-1?streamId=t",
    "/s-1?streamId=t-11",
    "/s-1?streamId=t-1%0A",
    "/s-1?streamId=%FF",
    "/s-1?streamId=" + "x" * 129,
    "/t-1?streamId=t-1",
    "/other?streamId=t-1",
]


@pytest.mark.parametrize("path", NOT_FOUND, ids=lambda path: path[:40])
def test_a_cancel_that_finds_nothing(chat: MakeChat, path: str) -> None:
    """Case 20: unknown, malformed, a prefix: the same 404, JSON, and nothing is stopped."""
    c = chat()
    walk = c.open(sessionId="s-1", streamId="t-1")
    assert_not_found(c.cancel(path))
    assert c.cancel("/s-1?streamId=t-1").status_code == 200
    walk.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"json": {"any": "thing"}},
        {"data": b"\xff not JSON", "content_type": "application/json"},
        {"data": b"x" * 2_000_000},
        {"environ_overrides": {"wsgi.input": Unreadable(), "CONTENT_LENGTH": "9" * 12}},
    ],
    ids=["none", "JSON", "malformed", "huge", "unread"],
)
def test_a_cancels_body_is_ignored(chat: MakeChat, options: dict[str, Any]) -> None:
    """Case 26: a cancel works with any body or none, and does not read it."""
    c = chat()
    walk = c.open(sessionId="s-1")
    assert c.cancel("/s-1", **options).status_code == 200
    walk.close()


def test_a_cancel_works_in_a_full_worker(chat: MakeChat) -> None:
    """Case 25: a cancel takes no stream slot."""
    c = chat(MAX_STREAMS="1")
    walk = c.open(sessionId="s-1")
    assert c.cancel("/s-1").status_code == 200
    walk.close()


def test_a_cancel_that_comes_first(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """Case 19: 404, and remembered: its stream gets 200, an empty body, and no provider."""
    c = chat()
    assert_not_found(c.cancel("/s-1?streamId=t-1"))
    response = c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers["X-Stream-Id"] == "t-1"
    assert len(answers.calls) == 0
    assert c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"}).data == (
        EVENT + DONE
    )


def test_a_late_cancel_does_not_stop_the_next_stream(
    chat: MakeChat, answers: responses.RequestsMock
) -> None:
    """Case 22: a Stop for the first answer that arrives in the second finds nothing."""
    c = chat()
    c.post({"messages": MESSAGES, "sessionId": "s-1", "streamId": "t-1"})
    walk = c.open(sessionId="s-1", streamId="t-2")
    assert_not_found(c.cancel("/s-1?streamId=t-1"))
    assert b"".join(walk.iterable) == EVENT + DONE
    walk.close()


UNSURE = [
    (Unconfirmed(), 504, b'{"ok": false, "reason": "unconfirmed"}'),
    (BusUnavailable(), 503, b'{"ok": false, "reason": "bus_unavailable"}'),
    (OSError("the bus is broken"), 503, b'{"ok": false, "reason": "bus_unavailable"}'),
]


@pytest.mark.parametrize(("error", "status", "body"), UNSURE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("path", ["/s-1", "/s-1?streamId=t-1"])
def test_a_cancel_of_which_nothing_can_be_said(
    chat: MakeChat, error: Exception, status: int, body: bytes, path: str
) -> None:
    """Neither 200 nor 404: a 504 where its worker hangs, a 503 where nobody can be asked."""
    c = chat()
    OtherWorkers(c.service, error)
    response = c.cancel(path)
    assert (response.status_code, response.data) == (status, body)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"


def test_a_malformed_cancel_asks_nobody(chat: MakeChat) -> None:
    """It can be no stream's: a 404, however the bus is."""
    c = chat()
    OtherWorkers(c.service, BusUnavailable())
    assert_not_found(c.cancel("/s%201"))
    assert_not_found(c.cancel("/s-1?streamId="))


def test_a_stream_that_other_workers_keep_from_starting(
    chat: MakeChat, provider: responses.RequestsMock
) -> None:
    """Streams of its session are in workers that hang: a 504 like every refusal, no call."""
    c = chat()
    OtherWorkers(c.service, Unconfirmed())
    assert_refused(c.post(), 504, "unconfirmed")
    assert len(provider.calls) == 0
    assert len(c.service.registry) == 0


def test_a_bus_that_cannot_start(
    chat: MakeChat, answers: responses.RequestsMock, short_base: Path
) -> None:
    """Streams are relayed, this worker's are stopped, and for another's the answer is a 503."""
    c = chat(BUS=f"unix://{short_base}")
    service_directory(short_base, "x", "0").parent.touch()  # where the user's directory should be
    assert c.post().data == EVENT + DONE
    response = c.cancel("/s-1")
    assert (response.status_code, response.json) == (
        503,
        {"ok": False, "reason": "bus_unavailable"},
    )
    walk = c.open(sessionId="s-1")
    assert c.cancel("/s-1").status_code == 200
    assert walk.next() == b""


def test_of_many_cancels_one_is_told_that_it_stopped(chat: MakeChat) -> None:
    """Case 21: N cancels at once: one 200, the others 404."""
    c = chat()
    walk = c.open(sessionId="s-1")
    barrier, codes = threading.Barrier(8), []

    def cancel() -> None:
        barrier.wait(5)
        codes.append(c.app.test_client().post(f"{CANCEL}/s-1").status_code)

    threads = [threading.Thread(target=cancel) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(codes) == [200] + [404] * 7
    walk.close()


def test_a_second_post_supersedes(chat: MakeChat, answers: responses.RequestsMock) -> None:
    """The same session again: the first stream ends silently, the second runs to its end."""
    c = chat()
    first = c.open(sessionId="s-1")
    assert c.post({"messages": MESSAGES, "sessionId": "s-1"}).data == EVENT + DONE
    assert first.next() == b""
    assert first.started[0][0] == "200 OK"
    first.close()
