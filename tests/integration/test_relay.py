"""The wire, the clocks and the names, through real gunicorn."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import MODES, Rig
from tests.integration.scenes import begin

numbers = itertools.count(1)

Rigs = Callable[..., Rig]

RARE = {
    "CHATSTREAM_MAX_BODY": "4000000",
    "CHATSTREAM_ON_CONFLICT": "reject",
    "CHATSTREAM_PING_INTERVAL": "3600",
    "CHATSTREAM_THREADS": "256",
}
"""Settings that one test or another needs, and none minds: one server has them all."""


@pytest.fixture(params=MODES)
def worker_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session() -> str:
    return f"relay-{next(numbers)}"


def ask(rig: Rig, session: str, **fields: Any) -> tuple[int, dict[str, str], bytes]:
    """Posts a chat and reads the answer to its end."""
    client = rig.client()
    client.post(session, **fields)
    status, headers = client.head()
    if "content-length" in headers:
        return status, headers, client.exactly(int(headers["content-length"]))
    return status, headers, client.body()


def test_the_answer_is_the_providers_byte_for_byte(rig: Rig, session: str) -> None:
    """Events, comments and [DONE] as they were sent; then the body ends and the log says so."""
    raw = ': hello\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata: é\n\ndata: [DONE]\n\n'
    simulate = {"raw": raw, "split": 1, "rate": 2000}
    status, headers, body = ask(rig, session, simulate=simulate)
    assert body.decode() == raw
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert headers["x-session-id"] == session
    assert re.fullmatch("[0-9a-f]{32}", headers["x-stream-id"])
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"
    ending = rig.server.ending_of(session)
    assert "completed" in ending
    assert f"events=3 bytes={len(raw.encode())}" in ending


def test_what_is_sent_to_the_provider(rig: Rig, session: str) -> None:
    """Fields go through as they are; ours do not; stream and model are seen to; the key is sent."""
    simulate = {"id": session, "tokens": 1}
    ask(rig, session, streamId=session, temperature=0.5, tools=[], simulate=simulate)
    figure = rig.provider.request(session)
    messages = [{"role": "user", "content": "hello"}]
    assert figure["body"] == {
        "messages": messages,
        "temperature": 0.5,
        "tools": [],
        "stream": True,
        "model": "deepseek-chat",
    }
    assert figure["headers"]["authorization"] == "present"
    assert figure["headers"]["accept-encoding"] == "identity"


def test_events_arrive_one_by_one_without_chunks(rig: Rig, session: str) -> None:
    """Case 9: a close-delimited body is not held back until its end."""
    client = rig.client()
    client.post(session, simulate={"chunked": False, "silent_after": 1, "rate": 100})
    client.until(b'"content"')
    assert rig.server.debug()["live"] == 1


def test_done_ends_the_body_at_once(rig: Rig, session: str) -> None:
    """What the provider holds back after [DONE] delays nobody; a stop after it finds nothing."""
    simulate = {"id": session, "tokens": 2, "rate": 1000, "hold_open": 60}
    _, _, body = ask(rig, session, simulate=simulate)
    assert body.endswith(b"data: [DONE]\n\n")
    assert rig.server.cancel(session) == (404, {"ok": False, "reason": "not_found"})
    assert "completed" in rig.server.ending_of(session)
    assert rig.provider.request(session, "closed")["closed_by"] == "client"


@pytest.mark.parametrize("kind", ["plain", "tls", "proxy", "proxy tls"])
def test_connections_to_the_provider_are_reused(rigs: Rigs, worker_class: str, kind: str) -> None:
    """Case 4: answers that ended well share a connection; a late stop does not hurt the next."""
    rig = rigs(kind, worker_class)
    figures = []
    for _ in range(5):
        session = f"relay-{next(numbers)}"
        simulate = {"id": session, "tokens": 2, "rate": 1000}
        _, _, body = ask(rig, session, simulate=simulate)
        assert body.endswith(b"data: [DONE]\n\n")
        assert rig.server.cancel(session)[0] == 404
        figures.append(rig.provider.request(session))
    assert len({figure["connection"] for figure in figures}) == 1
    rig.check_leaks()


def test_a_kept_alive_client_connection_serves_the_next_request(rig: Rig, session: str) -> None:
    """The watch lets go: what happens to the connection later is no stop of anything."""
    client = rig.client()
    for number in range(3):
        client.post(f"{session}.{number}", simulate={"tokens": 2, "rate": 1000})
        assert client.head()[0] == 200
        assert client.body().endswith(b"[DONE]\n\n")
    client.close()
    for number in range(3):
        assert "completed" in rig.server.ending_of(f"{session}.{number}")


def test_an_http_1_0_client_reads_until_the_close(rig: Rig, session: str) -> None:
    """nginx's default towards us: no chunks, and the connection's end is the body's."""
    client = rig.client()
    client.post(session, http="1.0", simulate={"tokens": 2, "rate": 1000})
    client.head()
    assert client.to_the_end().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("simulate", "status", "code"),
    [
        ({"status": 401, "message": "bad key sk-secret-of-the-tests"}, 502, "upstream_auth"),
        ({"status": 500}, 502, "upstream_error"),
        ({"status": 429, "retry_after": "7"}, 429, "upstream_rate_limited"),
        ({"status": 400, "message": "no such model"}, 400, "upstream_rejected"),
        ({"content_type": "text/html"}, 502, "upstream_not_stream"),
        ({"reset_after": 0}, 502, "upstream_unreachable"),
    ],
)
def test_a_provider_that_refuses(
    rig: Rig, session: str, simulate: dict[str, Any], status: int, code: str
) -> None:
    """Before the first byte a fault is JSON with a true status; no key, nothing of a 401's body."""
    got, headers, body = ask(rig, session, simulate={"id": session, **simulate})
    answer = json.loads(body)
    assert (got, answer["ok"], answer["reason"]) == (status, False, code)
    assert headers["content-type"] == "application/json"
    assert headers.get("retry-after") == simulate.get("retry_after")
    assert ("no such model" in answer["message"]) == (code == "upstream_rejected")
    ending = rig.server.ending_of(session)
    assert ending.startswith("WARNING")
    assert f"failed: {code} " in ending
    assert "sk-secret" not in rig.server.log() + body.decode()


@pytest.mark.parametrize(
    ("simulate", "code"),
    [
        ({"truncate_after": 3}, "upstream_truncated"),
        ({"reset_after": 3}, "upstream_truncated"),
        ({"truncate_after": 3, "chunked": False}, "upstream_truncated"),
    ],
)
def test_a_provider_that_breaks_off(
    rig: Rig, session: str, simulate: dict[str, Any], code: str
) -> None:
    """Cases 8, 11: after the first byte a fault is one error event and the body's proper end."""
    status, _, body = ask(rig, session, simulate={"rate": 50, **simulate})
    last = body.split(b"\n\n")[-2]
    assert status == 200
    assert last.startswith(b"event: error\ndata: ")
    error = json.loads(last.partition(b"data: ")[2])["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "code"}
    assert f"failed: {code} " in rig.server.ending_of(session)


def test_an_event_that_does_not_end(rigs: Rigs, worker_class: str, session: str) -> None:
    """Case 11: an event of 1 MiB goes through; more is not waited for."""
    rig = rigs("plain", worker_class, **RARE)
    whole = "data: " + "x" * (1024 * 1024 - 8) + "\n\n"
    _, _, body = ask(rig, session, simulate={"raw": whole + "data: " + "y" * (1024 * 1024)})
    assert body.startswith(whole.encode())
    assert b'"code": "event_too_large"' in body[-200:]
    assert "failed: event_too_large " in rig.server.ending_of(session)
    rig.check_leaks()


def test_the_providers_own_error_event_is_relayed_and_nothing_added(rig: Rig, session: str) -> None:
    """An in-stream {"error": ...} ends the stream as failed, in the provider's words only."""
    _, _, body = ask(rig, session, simulate={"error_after": 2, "rate": 100})
    assert body.count(b'"error"') == 1
    assert b"event: error" not in body
    assert "failed: upstream_error" in rig.server.ending_of(session)


def test_an_end_with_a_finish_reason_is_whole(rig: Rig, session: str) -> None:
    """Providers without [DONE] exist."""
    simulate = {"no_done": True, "tokens": 2, "rate": 1000}
    _, _, body = ask(rig, session, simulate=simulate)
    assert b'"finish_reason":"stop"' in body
    assert "completed" in rig.server.ending_of(session)


def test_a_new_question_supersedes(rig: Rig, session: str) -> None:
    """Cases 22-24: the first stream is stopped silently; its end does not touch the second."""
    first = begin(rig, "silent", session)
    second = rig.client()
    second.post(session, simulate={"id": f"{session}-2", "silent_after": 1})
    assert rig.provider.request(session, "closed")["closed_by"] == "client"
    first.head()
    assert b"error" not in first.body()
    second.until(b'"content"')
    lines = eventually(lambda: [x for x in rig.server.lines_of(session) if "superseded" in x])
    assert "aborted by superseded" in lines[0]
    assert rig.server.cancel(session)[0] == 200
    assert rig.provider.request(f"{session}-2", "closed")["closed_by"] == "client"


def test_a_live_stream_id_is_a_conflict(rig: Rig, session: str) -> None:
    """409 while that stream is live, and the live one goes on."""
    client = rig.client()
    client.post(session, "answer-1", simulate={"id": session, "silent_after": 1})
    client.until(b'"content"')
    status, _, body = ask(rig, f"{session}-b", streamId="answer-1")
    assert (status, json.loads(body)["reason"]) == (409, "conflict")
    assert rig.server.debug()["live"] == 1


def test_reject_keeps_the_first(rigs: Rigs, worker_class: str, session: str) -> None:
    """CHATSTREAM_ON_CONFLICT=reject: the second stream of a session gets 409."""
    rig = rigs("plain", worker_class, **RARE)
    begin(rig, "silent", session)
    status, _, body = ask(rig, session)
    assert (status, json.loads(body)["reason"]) == (409, "conflict")
    assert rig.server.debug()["live"] == 1
    rig.check_leaks()


def test_two_posts_at_once_leave_one_stream(rig: Rig, session: str) -> None:
    """Case 23: whoever loses is superseded, never orphaned."""
    clients = [rig.client() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda c: c.post(session, simulate={"silent_after": 1}), clients))
    eventually(lambda: len(rig.server.lines_of(session)) == 15, "8 starts and 7 ends")
    assert rig.server.debug()["live"] == 1
    assert rig.server.cancel(session)[0] == 200


def test_parallel_cancels_answer_truthfully(rig: Rig, session: str) -> None:
    """Case 21: one abort, and no 200 for more than one."""
    begin(rig, "silent", session)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: rig.server.cancel(session)[0], range(8)))
    assert sorted(answers) == [200] + [404] * 7
    assert "cause=cancel" in rig.server.ending_of(session)


def test_an_early_cancel_is_remembered_for_exactly_that_stream(rig: Rig, session: str) -> None:
    """Case 19: 404, and the stream is born aborted: the provider is never called. Used once."""
    assert rig.server.cancel(session, "answer-1")[0] == 404
    simulate = {"id": session, "tokens": 2, "rate": 1000}
    _, _, body = ask(rig, session, streamId="answer-1", simulate=simulate)
    assert body == b""
    assert session not in rig.provider.names()
    assert "aborted by client/cancel cause=cancel phase=new" in rig.server.ending_of(session)
    _, _, body = ask(rig, session, streamId="answer-1", simulate=simulate)
    assert body.endswith(b"[DONE]\n\n")


def test_a_late_cancel_of_a_stream_spares_the_next(rig: Rig, session: str) -> None:
    """Case 22: a cancel that names the first answer does not reach the second."""
    ask(rig, session, streamId="answer-1", simulate={"tokens": 1, "rate": 1000})
    client = rig.client()
    client.post(session, "answer-2", simulate={"id": session, "silent_after": 1})
    client.until(b'"content"')
    assert rig.server.cancel(session, "answer-1")[0] == 404
    assert rig.server.debug()["live"] == 1
    assert rig.server.cancel(session, "answer-2")[0] == 200


def test_somebody_elses_session_is_not_found(rig: Rig, session: str) -> None:
    """Case 20: the same 404 as for a session that does not exist."""
    client = rig.client()
    client.post(session, headers={"X-User": "eve"}, simulate={"silent_after": 1})
    client.until(b'"content"')
    assert rig.server.cancel(session) == (404, {"ok": False, "reason": "not_found"})
    assert rig.server.cancel(session[:-1]) == (404, {"ok": False, "reason": "not_found"})
    status, _ = rig.server.ask("POST", f"/api/chat/cancel/{session}", X_User="eve")
    assert status == 200


@pytest.mark.parametrize("body", [b"", b"x" * 5_000_000], ids=["none", "huge"])
def test_a_cancels_body_does_not_matter(rig: Rig, session: str, body: bytes) -> None:
    """Case 26: without one, or with a huge one: it still stops, and is not waited for."""
    begin(rig, "silent", session)
    canceller = rig.client()
    head = f"POST /api/chat/cancel/{session} HTTP/1.1\r\nHost: localhost\r\n"
    canceller.sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:1000])
    assert canceller.head()[0] == 200
    assert rig.provider.request(session, "closed")["closed_by"] == "client"


def test_a_cancel_is_answered_while_every_slot_is_taken(rigs: Rigs, worker_class: str) -> None:
    """Case 25: one stream too many is told to come again; cancels always get through."""
    rig = rigs("plain", worker_class, CHATSTREAM_THREADS="8", CHATSTREAM_MAX_STREAMS="4")
    for number in range(4):
        begin(rig, "silent", f"slot-{number}.{worker_class}")
    status, headers, body = ask(rig, "slot-5")
    assert (status, json.loads(body)["reason"]) == (503, "busy")
    assert headers["retry-after"] == "1"
    assert rig.server.cancel(f"slot-2.{worker_class}")[0] == 200
    eventually(lambda: rig.server.debug()["slots"] == 3, "a free slot")
    assert ask(rig, "slot-6", simulate={"tokens": 1, "rate": 1000})[0] == 200
    rig.check_leaks()


@pytest.mark.parametrize("spare", [2, 3])
def test_no_descriptor_left_is_busy(rigs: Rigs, worker_class: str, spare: int) -> None:
    """EMFILE, wherever it strikes, is a 503 and costs the worker nothing."""
    rig = rigs("plain", worker_class, CHATSTREAM_PING_INTERVAL="14")
    begin(rig, "silent", f"takes-the-idle-connection-{worker_class}-{spare}")
    worker = rig.server.worker
    before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    numbers = eventually(lambda: _settled_descriptors(worker), "descriptors that settle")
    limit = next(n for n in itertools.count(1) if len(set(range(n)) - numbers) == spare)
    client = rig.client()
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        status, headers = client.post("no-descriptor").head()
    finally:
        resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
    assert (status, headers["retry-after"]) == (503, "1")
    assert b'"busy"' in client.exactly(int(headers["content-length"]))
    assert rig.server.worker == worker
    rig.check_leaks()


def _settled_descriptors(pid: int) -> set[int]:
    """A process's descriptors, once the connections that asked it are closed; else nothing."""
    seen = []
    for _ in range(20):
        seen.append({int(name) for name in os.listdir(f"/proc/{pid}/fd")})
        time.sleep(0.01)
    return seen[0] if all(numbers == seen[0] for numbers in seen) else set()


def test_no_context_is_held_while_waiting_or_streaming(rig: Rig, session: str) -> None:
    """A host whose database has one connection serves others while streams run."""
    begin(rig, "headers", session)
    begin(rig, "silent", f"{session}-b")
    assert rig.server.get("/hello") == (200, b"hello")


def test_the_app_is_no_garbage_collectors_business(rig: Rig) -> None:
    """What lives as long as the worker is frozen: full collections have the streams to look at."""
    assert rig.server.get("/debug/frozen") == (200, b"true\n")


def test_a_hosts_error_pages_do_not_replace_refusals(rig: Rig) -> None:
    """The host's errorhandler(HTTPException) makes HTML; ours stays JSON."""
    status, body = rig.server.ask("GET", "/api/chat/stream")
    assert (status, json.loads(body)["reason"]) == (405, "method_not_allowed")
    status, body = rig.server.ask("FOO", "/api/chat/cancel/x")
    assert (status, json.loads(body)["reason"]) == (405, "method_not_allowed")
    status, body = rig.server.ask("POST", "/api/chat/cancel/a/b")
    assert (status, json.loads(body)["reason"]) == (404, "not_found")
    big = b'{"messages": "' + b"x" * 1024 * 1024 + b'"}'
    status, body = rig.server.ask("POST", "/api/chat/stream", big, Content_Type="application/json")
    assert (status, json.loads(body)["reason"]) == (413, "too_large")
    assert rig.server.get("/nowhere")[1] == b"<h1>404</h1>"


def test_a_host_may_read_the_body_first(rig: Rig, session: str) -> None:
    """A before_request that looks at the JSON leaves it to us all the same."""
    client = rig.client()
    client.post(session, headers={"X-Read-Body": "1"}, simulate={"tokens": 1, "rate": 100})
    assert client.head()[0] == 200
    assert client.body().endswith(b"[DONE]\n\n")


def test_a_host_that_breaks_the_response_costs_no_slot(
    rigs: Rigs, worker_class: str, session: str
) -> None:
    """An after_request that raises: the stream that nobody walks is over at once."""
    rig = rigs("plain", worker_class, CHATSTREAM_MODEL="broken")
    for number in range(3):
        client = rig.client()
        client.post(f"{session}.{number}", headers={"X-Break": "1"})
        assert client.head()[0] == 500
        assert rig.server.debug()["slots"] == 0
        assert "phase=new" in rig.server.ending_of(f"{session}.{number}")
    rig.check_leaks()


CLOCKS = {
    "CHATSTREAM_PING_INTERVAL": "0.2",
    "CHATSTREAM_UPSTREAM_HEADERS_TIMEOUT": "1.1",
    "CHATSTREAM_UPSTREAM_IDLE_TIMEOUT": "0.7",
}


def test_pings_while_the_provider_thinks(rigs: Rigs, worker_class: str, session: str) -> None:
    """Pings before the headers and in a silent body; a fault after them is an error event."""
    rig = rigs("plain", worker_class, **CLOCKS)
    status, _, body = ask(rig, session, simulate={"headers_after": 60})
    assert status == 200
    assert body.startswith(b": ping\n\n: ping\n\n")
    assert b'"code": "upstream_timeout"' in body
    assert body.rstrip().splitlines()[-2] == b"event: error", "nothing comes after it"
    assert "failed: upstream_timeout" in rig.server.ending_of(session)
    rig.check_leaks()


def test_a_provider_that_goes_quiet(rigs: Rigs, worker_class: str, session: str) -> None:
    """Case 7: silence inside an answer ends it; pings do not count as life of the provider."""
    rig = rigs("plain", worker_class, **CLOCKS)
    simulate = {"id": session, "silent_after": 2, "rate": 100}
    _, _, body = ask(rig, session, simulate=simulate)
    assert b": ping\n\n" in body
    assert b'"code": "upstream_idle"' in body
    assert "failed: upstream_idle" in rig.server.ending_of(session)
    assert rig.provider.request(session, "closed")["closed_by"] == "client"
    rig.check_leaks()


def test_a_queue_of_comments_is_life(rigs: Rigs, worker_class: str, session: str) -> None:
    """Case 6: `: keep-alive` comments are relayed and keep the stream alive past the idle time."""
    rig = rigs("plain", worker_class, **CLOCKS)
    simulate = {"queue": 1.5, "queue_interval": 0.1, "tokens": 2, "rate": 100}
    _, _, body = ask(rig, session, simulate=simulate)
    assert body.count(b": keep-alive") >= 10
    # None is due; a machine that stands still may be late with a comment.
    assert body.count(b": ping") < body.count(b": keep-alive") / 4
    assert body.endswith(b"[DONE]\n\n")
    rig.check_leaks()


def test_a_silent_client_is_found_gone_by_its_socket_not_by_a_ping(
    rigs: Rigs, worker_class: str, session: str
) -> None:
    """Case 13, with pings that are far away: nothing was written, and yet it is noticed."""
    rig = rigs("plain", worker_class, **RARE)
    client = begin(rig, "headers", session)
    client.close()
    assert rig.provider.request(session, "closed")["closed_by"] == "client"
    rig.check_leaks()


@pytest.mark.parametrize("scene", ["headers", "silent"])
def test_the_deadline(rigs: Rigs, worker_class: str, session: str, scene: str) -> None:
    """DEADLINE is told: 504 before the headers, an error event after the first byte."""
    rig = rigs("plain", worker_class, CHATSTREAM_STREAM_DEADLINE="0.5")
    client = begin(rig, scene, session)
    status, headers = client.head()
    if scene == "headers":
        assert status == 504
        assert json.loads(client.exactly(int(headers["content-length"])))["reason"] == "deadline"
    else:
        assert b'event: error\ndata: {"error": {"message": "' in client.body()
    assert "aborted by deadline" in rig.server.ending_of(session)
    assert rig.provider.request(session, "closed")["closed_by"] == "client"
    rig.check_leaks()


def test_silent_streams_cost_no_wakeups(rigs: Rigs, worker_class: str) -> None:
    """200 silent streams: fewer than five context switches a second in the worker."""
    rig = rigs("plain", worker_class, **RARE)
    for number in range(200):
        rig.client().post(f"idle-{number}", simulate={"id": f"i{number}", "silent_after": 0})
    eventually(lambda: rig.provider.stats()["generating"] == 200, "200 streams")
    eventually(lambda: rig.server.debug()["calls"] == [], "200 answers")
    worker = rig.server.worker
    seconds = 4
    before = _switches(worker)
    eventually(_after(seconds), patience=60)
    switches = _switches(worker) - before
    # gunicorn's own: its main loop wakes once a second or so, with or without us.
    assert switches / seconds < 5
    rig.check_leaks()


def test_a_torrent_leaves_others_their_turn(rig: Rig, session: str) -> None:
    """A provider and a client that are both faster than the worker: another stream goes on, and
    can be cancelled. Under gevent nothing switches by itself where nothing has to be waited for."""
    slow = rig.client()
    slow.post(f"{session}.slow", simulate={"rate": 50, "tokens": 100_000})
    slow.until(b"data: ")
    torrent = rig.client()
    torrent.post(session, simulate={"id": session, "rate": 0, "pad": 16_384, "tokens": 100_000})
    torrent.head()  # whose last line may look like a body's end
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(_drain, torrent)
        rig.provider.request(session, "delivered", count=1000)
        before = time.monotonic()
        slow.exactly(6000)  # 30 events
        assert rig.server.cancel(f"{session}.slow") == (200, {"ok": True, "cancelled": True})
        assert time.monotonic() - before < 5
        assert not drained.done()
        assert rig.server.cancel(session)[0] == 200
        drained.result()


def _drain(client: Client) -> None:
    """Takes what comes until the body's end, and keeps none of it."""
    while not client.sock.recv(1 << 18).endswith(b"0\r\n\r\n"):
        pass


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _switches(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.M)
        total += int(match[1]) if match else 0
    return total


@pytest.mark.parametrize("name", ["SCRIPT_NAME", "PATH_INFO"])
def test_a_client_does_not_say_where_the_app_is(rig: Rig, name: str) -> None:
    """By default gunicorn believes these headers of whoever is on the same host, as a proxy is."""
    client = rig.client()
    client.sock.sendall(f"GET /hello HTTP/1.1\r\nHost: x\r\n{name}: /else\r\n\r\n".encode())
    assert client.head()[0] in (200, 400)
    assert "Traceback" not in rig.server.log()
