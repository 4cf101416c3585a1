"""OpenAI's clients for Python against a real server: only their `base_url` is another."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from httpx_sse import connect_sse

from tests.integration.conftest import Rig, serving
from tests.integration.processes import Provider

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
ENDLESS = {"rate": 20, "tokens": 5000}

numbers = itertools.count(1)
both = pytest.mark.parametrize("worker_class", ["gthread", "gevent"])


@pytest.fixture
def worker_class() -> str:
    return "gthread"


@pytest.fixture
def rig(rigs: Callable[..., Rig], worker_class: str) -> Iterator[Rig]:
    """A server with OpenAI's routes, left as it was found. Its pings come soon."""
    rig = rigs(
        "plain", worker_class, CHATSTREAM_OPENAI_PREFIX="/v1", CHATSTREAM_PING_INTERVAL="0.6"
    )
    yield rig
    rig.check_leaks()
    assert rig.server.errors() == []


@pytest.fixture
def session() -> str:
    """A fresh one, which is also the request's name at the provider."""
    return f"openai-{next(numbers)}"


@pytest.fixture
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    """The official client, as anybody makes it."""
    with openai.OpenAI(base_url=f"{base(rig)}/v1", api_key="any") as client:
        yield client


def base(rig: Rig) -> str:
    return f"http://127.0.0.1:{rig.server.port}"


def asked(session: str | None = None, **simulate: Any) -> dict[str, Any]:
    """The arguments of a call."""
    simulate = {"id": session, **simulate} if session else simulate
    headers = {"X-Session-Id": session} if session else {}
    return {**ASKED, "extra_body": {"simulate": simulate}, "extra_headers": headers}


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def assert_stopped(rig: Rig, session: str, cause: str = "cause=client") -> None:
    """The provider was told in the middle of its answer, made no more, and was asked once."""
    figure = rig.provider.request(session, "closed")
    assert figure["closed_ns"] is not None
    assert not figure["finished"]
    assert rig.provider.request(session)["generated"] == figure["generated"] < 5000
    assert rig.provider.stats()["generating"] == 0
    ending = rig.server.ending_of(session)
    assert "aborted by" in ending
    assert cause in ending
    assert len(rig.server.lines_of(session)) == 2, "one stream: started, ended"


@pytest.fixture
def begun(client: openai.OpenAI) -> Iterator[Callable[..., Future[Any]]]:
    """Asks for an answer in one piece, in a thread of its own."""
    with ThreadPoolExecutor(4) as pool:
        yield lambda **call: pool.submit(client.chat.completions.create, **call)


# What is answered


def test_a_stream_and_one_piece_say_the_same(client: openai.OpenAI, session: str) -> None:
    """Both to the end, each with its finish_reason; the session comes back, given or made up."""
    call = asked(None, tokens=20, rate=0)
    *chunks, last = client.chat.completions.create(**call, stream=True)
    raw = client.chat.completions.with_raw_response.create(**asked(session, tokens=20, rate=0))
    whole = raw.parse()
    assert text_of(chunks) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert raw.headers["x-session-id"] == session
    assert client.chat.completions.with_raw_response.create(**call).headers["x-session-id"]


def test_newlines_before_an_answer_are_nothing_to_the_client(
    rig: Rig, client: openai.OpenAI, session: str
) -> None:
    """Ours, and those of a provider that queues the request."""
    answer = client.chat.completions.create(
        **asked(session, tokens=3, rate=0, queue=0.8, queue_interval=0.1)
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "completed" in rig.server.ending_of(session)


def test_the_models_are_the_providers(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["simulated"]


def test_httpx_sse_reads_it(rig: Rig, session: str) -> None:
    """Another parser of events: whole ones, up to the last; then one that is left behind."""
    url = f"{base(rig)}/v1/chat/completions"
    body = {**ASKED, "stream": True, "simulate": {"tokens": 5, "rate": 0}}
    with httpx.Client(trust_env=False) as http:
        with connect_sse(http, "POST", url, json=body) as source:
            data = [event.data for event in source.iter_sse()]
        assert (len(data), data[-1]) == (7, "[DONE]")
        body["simulate"] = {"id": session, **ENDLESS}
        named = {"X-Session-Id": session}
        with connect_sse(http, "POST", url, json=body, headers=named) as source:
            next(source.iter_sse())
    assert_stopped(rig, session)


# Stopping a stream


def close(streams: list[Any]) -> None:
    [stream] = streams
    next(stream)
    stream.close()


def leave_the_block(streams: list[Any]) -> None:
    with streams[0] as stream:
        for _ in stream:
            break


def leave_the_loop(streams: list[Any]) -> None:
    for _ in streams.pop():
        break
    # It refers to itself: that the last reference has gone is for the collector to find.
    gc.collect()


@both
@pytest.mark.parametrize("leave", [close, leave_the_block, leave_the_loop])
def test_leaving_a_stream_stops_the_provider(
    rig: Rig, client: openai.OpenAI, session: str, leave: Callable[[list[Any]], None]
) -> None:
    """Nothing but the client's own ways is needed."""
    streams = [client.chat.completions.create(**asked(session, **ENDLESS), stream=True)]
    leave(streams)
    assert_stopped(rig, session)


def test_a_stream_that_is_cancelled_elsewhere_ends(
    rig: Rig, client: openai.OpenAI, session: str
) -> None:
    """With the reason, without an exception, and without another try."""
    chunks = []
    with client.chat.completions.create(**asked(session, **ENDLESS), stream=True) as stream:
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 2:
                assert rig.server.cancel(session)[0] == 200
    assert len(chunks) >= 2
    assert chunks[-1].choices[0].finish_reason == "cancelled"
    assert_stopped(rig, session, "cause=cancel")


def test_the_async_client_too(rig: Rig, session: str) -> None:
    """Streams to the end, leaves one in the middle, and gives one up while it waits."""

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{base(rig)}/v1", api_key="any") as client:
            create = client.chat.completions.create
            async with await create(**asked(tokens=5, rate=0), stream=True) as stream:
                assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"
            async with await create(**asked(session, **ENDLESS), stream=True) as stream:
                async for _ in stream:
                    break
            waiting = asyncio.create_task(create(**asked(f"{session}-w", **ENDLESS)))
            await asyncio.to_thread(rig.provider.request, f"{session}-w")
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(ask())
    assert_stopped(rig, session)
    assert_stopped(rig, f"{session}-w")


# Stopping one piece


@both
@pytest.mark.parametrize("pinged", [False, True], ids=["at once", "after a newline"])
@pytest.mark.parametrize("way", ["cancel", "supersede"])
def test_one_piece_that_is_stopped_is_an_answer(
    rig: Rig, begun: Callable[..., Future[Any]], session: str, pinged: bool, way: str
) -> None:
    """No exception and no second call: the provider is told once, while the client waits."""
    waiting = begun(**asked(session, **ENDLESS))
    rig.provider.request(session)
    if pinged:
        threading.Event().wait(0.7)  # a ping has gone out: they come every 0.6 s
    before = rig.provider.stats()["requests"]
    if way == "cancel":
        assert rig.server.cancel(session)[0] == 200
        assert_stopped(rig, session, "cause=cancel")
    else:
        whole = rig.client().post(
            session,
            path="/v1/chat/completions",
            headers={"X-Session-Id": session},
            simulate={"tokens": 1, "rate": 0},
        )
        assert whole.head()[0] == 200
        before += 1
        whole.body()
    answer = waiting.result(10)
    assert answer.choices[0].finish_reason == "cancelled"
    assert (answer.choices[0].message.content, answer.usage, answer.model) == ("", None, "m")
    assert rig.provider.request(session, "closed")["closed_by"] == "client"
    assert rig.provider.stats()["requests"] == before


@both
def test_one_piece_whose_client_gives_up(rig: Rig, client: openai.OpenAI, session: str) -> None:
    """A timeout of the client's closes its connection, which is a stop as any.

    It is a timeout of its reads: our newlines put it off.
    """
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).chat.completions.create(
            **asked(session, **ENDLESS)
        )
    assert_stopped(rig, session)


def test_one_piece_that_is_stopped_while_the_provider_queues_it(
    rig: Rig, begun: Callable[..., Future[Any]], session: str
) -> None:
    """Its headers are there, and newlines come."""
    waiting = begun(**asked(session, queue=60, queue_interval=0.05))
    rig.provider.request(session, "headers")
    assert rig.server.cancel(session)[0] == 200
    assert waiting.result(10).choices[0].finish_reason == "cancelled"
    assert_stopped(rig, session, "cause=cancel")


# Faults

FAULTS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str]] = {
    "rejected": ({"status": 422}, openai.BadRequestError, "upstream_rejected"),
    "key": ({"status": 401}, openai.InternalServerError, "upstream_auth"),
    "rate": (
        {"status": 429, "retry_after": 7},
        openai.RateLimitError,
        "upstream_rate_limited",
    ),
    "failed": ({"status": 500}, openai.InternalServerError, "upstream_error"),
    "reset": ({"reset_after": 0}, openai.InternalServerError, "upstream_unreachable"),
    "no chat": ({"content_type": "text/html"}, openai.InternalServerError, "upstream_not_"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("simulate", "kind", "code"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_the_clients_own_exception(
    client: openai.OpenAI, simulate: Any, kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    """By its status, with our code and sentence; Retry-After is there for who repeats."""
    with pytest.raises(kind) as caught:
        client.with_options(max_retries=0).chat.completions.create(
            **asked(tokens=1, rate=0, **simulate), stream=stream
        )
    assert str(caught.value.code).startswith(code)
    assert "provider" in str(caught.value) or "simulator" in str(caught.value)
    assert caught.value.response.headers.get("retry-after") == (
        "7" if code == "upstream_rate_limited" else None
    )


def test_a_name_that_is_live_is_a_conflict(rig: Rig, client: openai.OpenAI, session: str) -> None:
    """One stream, one name."""
    named = {"X-Stream-Id": session}
    call = {**asked(**ENDLESS), "extra_headers": named, "stream": True}
    with client.chat.completions.create(**call) as stream:
        next(stream)
        with pytest.raises(openai.ConflictError):
            client.with_options(max_retries=0).chat.completions.create(**call)


@pytest.mark.parametrize("end", ["error_after", "truncate_after", "reset_after"])
def test_a_fault_in_the_middle_of_a_stream_is_raised(client: openai.OpenAI, end: str) -> None:
    """The provider's own error event as it is, else ours; what came before it is kept."""
    call = asked(tokens=9, rate=50, **{end: 3})
    stream = client.chat.completions.create(**call, stream=True)
    assert len(list(itertools.islice(stream, 3))) == 3
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert caught.value.code == ("overloaded" if end == "error_after" else "upstream_truncated")


def test_what_would_fail_again_is_asked_once(rig: Rig, client: openai.OpenAI) -> None:
    """The client would repeat a 502; it is told not to where that is in vain."""
    before = rig.provider.stats()["requests"]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**asked(status=401))
    assert rig.provider.stats()["requests"] == before + 1


def test_one_piece_of_which_the_provider_says_it_failed(client: openai.OpenAI) -> None:
    """A 200 with an error in it is raised, with the provider's words."""
    with pytest.raises(openai.InternalServerError, match="told to fail here") as caught:
        client.with_options(max_retries=0).chat.completions.create(
            **asked(tokens=5, rate=0, error_after=2)
        )
    assert caught.value.code == "overloaded"


# A service that asks for a token: the client's api_key is one


@pytest.fixture(scope="module", params=["gthread", "gevent"])
def closed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    log = tmp_path_factory.mktemp("closed") / "server.log"
    more: dict[str, str] = {
        "CHATSTREAM_MODEL": "simulated",
        "CHATSTREAM_ALLOWED_MODELS": "simulated",
    }
    more["CHATSTREAM_TOKENS"] = "ann:tok-ann,bob:tok-bob"
    with (
        contextlib.closing(Provider()) as provider,
        serving(
            log, provider, app="wsgi:app", CHATSTREAM_WORKER_CLASS=request.param, **more
        ) as rig,
    ):
        yield rig
        assert "tok-" not in rig.server.log()
        assert rig.server.errors() == []


def client_of(rig: Rig, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base(rig)}/v1", api_key=key)


def test_the_api_key_is_the_token(closed: Rig, session: str) -> None:
    """A stream, one piece and the models, as ever; the owner's cancel reaches it, no other's."""
    call = {**asked(session, tokens=5, rate=0), "model": "simulated"}
    with client_of(closed, "tok-ann") as client:
        assert client.chat.completions.create(**call).choices[0].finish_reason == "stop"
        assert len(list(client.chat.completions.create(**call, stream=True))) >= 5
        assert [model.id for model in client.models.list()] == ["simulated"]
        endless = {**asked(f"{session}-2", **ENDLESS), "model": "simulated", "stream": True}
        with client.chat.completions.create(**endless) as stream:
            next(stream)
            for key, status in (("tok-bob", 404), ("tok-ann", 200)):
                cancel = f"/api/chat/cancel/{session}-2"
                given = {"Authorization": f"Bearer {key}"}
                assert closed.server.ask("POST", cancel, **given)[0] == status
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "cancelled"
    assert_stopped(closed, f"{session}-2", "cause=cancel")


@pytest.mark.parametrize("stream", [True, False])
def test_another_api_key_is_an_authentication_error(closed: Rig, stream: bool) -> None:
    """In OpenAI's words, at once: the client does not ask again, and the provider is not asked."""
    before = closed.provider.stats()["requests"] if closed.provider else None
    with client_of(closed, "sk-other") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(**ASKED, stream=stream)
        assert caught.value.code == "unauthenticated"
        assert caught.value.response.headers["www-authenticate"] == 'Bearer realm="chatstream"'
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert closed.provider is not None
    assert closed.provider.stats()["requests"] == before


def test_a_model_that_is_not_allowed_is_a_bad_request(closed: Rig) -> None:
    """With those that are in the sentence."""
    refused = pytest.raises(openai.BadRequestError, match="simulated")
    with client_of(closed, "tok-bob") as client, refused as caught:
        client.chat.completions.create(**ASKED)
    assert caught.value.code == "model_not_allowed"
