"""payload: what the provider is sent: the caller's request, the app's word on it, and the caps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import responses
from werkzeug.test import TestResponse

from chatstream import ChatStream, Service
from chatstream.errors import Refused
from chatstream.service.hooks import Prepare
from tests.conftest import eventually

URL = "https://provider.test/v1/chat/completions"
CHAT, OPENAI = "/api/chat/stream", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
HOUSE = [{"role": "system", "content": "Be kind."}]

both = pytest.mark.parametrize("path", [CHAT, OPENAI])


class Asker:
    """An app, and what its provider gets to see."""

    def __init__(self, prepare: Prepare | None, identify: Any, settings: dict[str, Any]) -> None:
        self.app = flask.Flask("host")
        self.app.config.update(CHATSTREAM_UPSTREAM_URL=URL, CHATSTREAM_OPENAI_PREFIX="/v1")
        self.app.config.update({f"CHATSTREAM_{key}": value for key, value in settings.items()})
        ChatStream(self.app, identify=identify, prepare=prepare)
        self.service: Service = self.app.extensions["chatstream"]

    def post(self, path: str = CHAT, /, headers: Any = None, **body: Any) -> TestResponse:
        """Asks, with these fields beside `messages`, and reads to the end."""
        body = {"messages": MESSAGES, **({"stream": True} if path == OPENAI else {}), **body}
        return self.app.test_client().post(path, json=body, headers=headers, buffered=True)

    def sent(self, path: str = CHAT, /, **body: Any) -> dict[str, Any]:
        """What the provider is asked because of that."""
        before = len(responses.calls)
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        assert len(responses.calls) == before + 1
        asked: dict[str, Any] = json.loads(responses.calls[-1].request.body)  # type: ignore[arg-type]
        return asked

    def refused(self, path: str = CHAT, /, **body: Any) -> tuple[int, str]:
        """Status and code of a refusal, in the words of its route; nobody was asked."""
        before = len(responses.calls)
        response = self.post(path, **body)
        said = response.get_json()
        assert len(responses.calls) == before
        assert len(self.service.registry) == 0
        if path == OPENAI:
            return response.status_code, said["error"]["code"]
        assert said["ok"] is False
        return response.status_code, said["reason"]


Make = Callable[..., Asker]


@pytest.fixture
def asker() -> Iterator[Make]:
    """Makes an app: `prepare`, `identify`, settings by name."""
    made: list[Asker] = []

    def make(prepare: Prepare | None = None, identify: Any = None, **settings: Any) -> Asker:
        made.append(Asker(prepare, identify, settings))
        return made[-1]

    with responses.mock:
        responses.post(URL, body=b"data: [DONE]\n\n", content_type="text/event-stream")
        yield make
    for one in made:
        one.service.stop()
        eventually(lambda one=one: len(one.service.registry) == 0, "slots given back")


# What the provider gets


def test_other_fields_are_forwarded_as_they_are(asker: Make) -> None:
    """All but the two ids goes to the provider, in its order, with its own types."""
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "é 漢 🙂 \u2028"}]}],
        "model": "m-1",
        "temperature": 0.1,
        "max_tokens": 12345678901234567890,
        "stop": None,
        "tools": [{"nested": {"deep": [True, False, 1e-7]}}],
        "stream": True,
    }
    client = asker(API_KEY="sk-secret").app.test_client()
    data = json.dumps({"sessionId": "s", **body, "streamId": "t"})  # in this order
    client.post(CHAT, data=data, content_type="application/json", buffered=True)
    asked = json.loads(responses.calls[-1].request.body)  # type: ignore[arg-type]
    assert asked == body
    assert list(asked) == list(body)
    assert responses.calls[-1].request.headers["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("given", [{}, {"stream": False}, {"stream": None}, {"stream": "no"}])
def test_stream_is_forced(asker: Make, given: dict[str, Any]) -> None:
    """On the chat's route the provider is always asked to stream."""
    assert asker().sent(**given)["stream"] is True


@both
@pytest.mark.parametrize(
    ("given", "model"),
    [({}, "house-model"), ({"model": None}, "house-model"), ({"model": "mine"}, "mine")],
)
def test_the_model_has_a_default(asker: Make, path: str, given: dict[str, Any], model: str) -> None:
    """A request that names no model gets the configured one."""
    assert asker(MODEL="house-model").sent(path, **given)["model"] == model


@pytest.mark.parametrize(
    ("usage", "given", "options"),
    [
        ("0", {}, None),
        ("0", {"stream_options": {"x": 1}}, {"x": 1}),
        ("1", {}, {"include_usage": True}),
        ("1", {"stream_options": {"x": 1}}, {"x": 1, "include_usage": True}),
        ("1", {"stream_options": None}, {"include_usage": True}),
    ],
)
def test_usage_is_asked_for_only_when_set(
    asker: Make, usage: str, given: dict[str, Any], options: dict[str, Any] | None
) -> None:
    """stream_options is the caller's own, unless CHATSTREAM_INCLUDE_USAGE adds to it."""
    assert asker(INCLUDE_USAGE=usage).sent(**given).get("stream_options") == options


@pytest.mark.parametrize(
    "messages",
    [None, [], {}, "hi", ["hi"], [{}], [{"content": "hi"}], [{"role": None}], [{"role": 7}],
     [{"role": "user"}, []]],
    ids=str,
)  # fmt: skip
def test_bad_messages(asker: Make, messages: Any) -> None:
    """messages has to be a non-empty list of objects with a role."""
    assert asker().refused(messages=messages) == (400, "bad_messages")


# The app's word


@both
def test_without_a_word_of_the_app_it_is_as_the_caller_asks(asker: Make, path: str) -> None:
    """All but our names, the stream and the model that is missing."""
    body = {"temperature": 0.5, "tools": [], "x": None}
    assert asker().sent(path, **body) == {
        **body, "messages": MESSAGES, "stream": True, "model": "deepseek-chat"
    }  # fmt: skip


@both
def test_prepare_may_change_it_in_place(asker: Make, path: str) -> None:
    """And return nothing."""

    def prepare(payload: dict[str, Any], owner: str) -> None:
        payload["messages"] = HOUSE + payload["messages"]
        payload["model"] = "m-2"
        del payload["temperature"]

    asked = asker(prepare).sent(path, temperature=2, top_p=1)
    assert asked == {"messages": HOUSE + MESSAGES, "model": "m-2", "top_p": 1, "stream": True}


@both
def test_prepare_may_return_another(asker: Make, path: str) -> None:
    """Then what was changed in the first one is nothing."""

    def prepare(payload: dict[str, Any], owner: str) -> dict[str, Any]:
        payload["messages"] = []
        return {"messages": HOUSE, "model": "m-2"}

    assert asker(prepare).sent(path, x=1) == {"messages": HOUSE, "model": "m-2", "stream": True}


@both
def test_what_prepare_is_given(asker: Make, path: str) -> None:
    """The request with the names of its stream, and whose it is; in the request's contexts, and
    before the stream has a place."""
    seen: list[Any] = []

    def prepare(payload: dict[str, Any], owner: str) -> None:
        live = len(flask.current_app.extensions["chatstream"].registry)
        seen.append((dict(payload), owner, flask.request.path, live))

    us = asker(prepare, identify=lambda: 7)
    response = us.post(path, x=1)
    ((payload, owner, where, live),) = seen
    assert (owner, where, live) == ("7", path, 0)
    assert (payload["x"], payload["messages"]) == (1, MESSAGES)
    assert payload["sessionId"] == response.headers["X-Session-Id"]
    assert payload["streamId"] == response.headers["X-Stream-Id"]
    named = {"headers": {"X-Session-Id": "s-1", "X-Stream-Id": "t-1"}}
    us.post(path, **(named if path == OPENAI else {"sessionId": "s-1", "streamId": "t-1"}))
    assert (seen[-1][0]["sessionId"], seen[-1][0]["streamId"]) == ("s-1", "t-1")


@both
@pytest.mark.parametrize("returns", [True, False])
def test_the_names_stay_whatever_prepare_does(asker: Make, path: str, returns: bool) -> None:
    """And the provider never sees them."""

    def prepare(payload: dict[str, Any], owner: str) -> Any:
        payload.update(sessionId="other", streamId=None)
        return {**payload} if returns else None

    us = asker(prepare)
    headers = {"X-Session-Id": "s-1", "X-Stream-Id": "t-1"}
    response = us.post(path, headers=headers, sessionId="s-1", streamId="t-1")
    assert response.headers["X-Session-Id"] == "s-1"
    assert response.headers["X-Stream-Id"] == "t-1"
    asked = json.loads(responses.calls[0].request.body)  # type: ignore[arg-type]
    assert not {"sessionId", "streamId"} & set(asked)


@pytest.mark.parametrize("wanted", [{}, {"stream": False}, {"stream": True}, {"stream": None}])
@pytest.mark.parametrize("made", [True, False, None, "yes"])
def test_prepare_cannot_change_the_form_of_the_answer(
    asker: Make, wanted: dict[str, Any], made: Any
) -> None:
    """It is what the client understands: on the chat's route events, on OpenAI's as it asked."""

    def prepare(payload: dict[str, Any], owner: str) -> None:
        payload["stream"] = made

    us = asker(prepare)
    assert us.sent(CHAT, **wanted)["stream"] is True
    if not wanted.get("stream"):
        responses.replace(responses.POST, URL, json={"choices": []})
    response = us.app.test_client().post(OPENAI, json={"messages": MESSAGES, **wanted})
    asked = json.loads(responses.calls[-1].request.body)  # type: ignore[arg-type]
    assert asked["stream"] is bool(wanted.get("stream"))
    kind = "text/event-stream" if wanted.get("stream") else "application/json"
    assert response.mimetype == kind


@both
@pytest.mark.parametrize("made", [lambda: flask.Response("Pay.", 402), lambda: ("Pay.", 402)])
def test_prepare_may_answer_itself(asker: Make, path: str, made: Callable[[], Any]) -> None:
    """A response, or what Flask makes one of; nobody is asked."""
    us = asker(lambda payload, owner: made())
    response = us.post(path)
    assert (response.status_code, response.text) == (402, "Pay.")
    assert len(responses.calls) == 0
    assert len(us.service.registry) == 0


@both
@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, (400, "bad_request")),
        ({"code": "quota", "status": 402, "retry_after": "60"}, (402, "quota")),
    ],
)
def test_prepare_may_refuse(
    asker: Make, path: str, facts: dict[str, Any], expected: tuple[int, str]
) -> None:
    """In the words of the route, with the app's sentence."""

    def prepare(payload: dict[str, Any], owner: str) -> None:
        raise Refused("You have asked enough.", **facts)

    us = asker(prepare)
    assert us.refused(path) == expected
    response = us.post(path)
    assert "You have asked enough." in response.text
    assert response.headers.get("Retry-After") == facts.get("retry_after")


NONSENSE: list[Any] = [
    "no",
    7,
    True,
    [],
    [MESSAGES],
    {},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"content": "no role"}]},
    {"messages": MESSAGES, "x": {1, 2}},
]


@both
@pytest.mark.parametrize("made", NONSENSE, ids=repr)
def test_what_prepare_makes_has_to_be_a_request(asker: Make, path: str, made: Any) -> None:
    """Else it is the app's mistake, its 500, and no client's."""
    us = asker(lambda payload, owner: made)
    assert us.post(path).status_code == 500
    assert len(responses.calls) == 0
    assert len(us.service.registry) == 0


@both
def test_what_prepare_raises_is_the_apps(asker: Make, path: str) -> None:
    """Its 500, or what its own handlers make of it; nobody is asked, no place is taken."""

    class Broke(Exception):
        pass

    def prepare(payload: dict[str, Any], owner: str) -> None:
        if payload.get("abort"):
            flask.abort(403)
        raise Broke

    us, other = asker(prepare), asker(prepare)
    other.app.register_error_handler(Broke, lambda error: ("broke", 418))
    assert us.post(path).status_code == 500
    assert us.post(path, abort=True).status_code == 403
    assert other.post(path).text == "broke"
    assert len(responses.calls) == 0
    assert len(us.service.registry) == len(other.service.registry) == 0


@both
def test_what_cannot_be_answered_is_no_business_of_prepares(asker: Make, path: str) -> None:
    """It sees good requests only, of those who have a name."""
    asked: list[str] = []
    us = asker(lambda payload, owner: asked.append(owner))
    assert us.refused(path, messages=[]) == (400, "bad_messages")
    us.service.identify = lambda: None
    assert us.refused(path) == (401, "unauthenticated")
    assert asked == []


# Which models


@both
@pytest.mark.parametrize(
    ("body", "model"),
    [({}, "a"), ({"model": None}, "a"), ({"model": "b"}, "b"), ({"model": "b", "models": []}, "b"),
     ({"models": ["b", "a"]}, "a"), ({"model": "b", "models": None}, "b")],
)  # fmt: skip
def test_models_that_are_allowed(asker: Make, path: str, body: Any, model: str) -> None:
    """By name, or by the default."""
    assert asker(MODEL="a", ALLOWED_MODELS="a,b").sent(path, **body)["model"] == model


@both
@pytest.mark.parametrize(
    "body",
    [
        {"model": "c"},
        {"model": "A"},
        {"model": ""},
        {"model": "a,b"},
        {"model": 7},
        {"model": True},
        {"model": ["a"]},
        {"model": {"a": 1}},
        {"models": ["c"]},
        {"fallbacks": ["c"]},
        {"fallbacks": [{"model": "a", "max_tokens": 9}]},
        {"models": ["a", "c"]},
        {"models": [["a"]]},
        {"models": "c"},
        {"models": {"a": "c"}},
        {"model": "a", "models": ["a", None]},
    ],
    ids=repr,
)
def test_models_that_are_not_allowed(asker: Make, path: str, body: Any) -> None:
    """Nor by OpenRouter's list of those that are asked where the first one fails."""
    us = asker(MODEL="a", ALLOWED_MODELS="a,b")
    assert us.refused(path, **body) == (400, "model_not_allowed")
    assert "a, b" in us.post(path, **body).text
    assert asker().sent(path, **body)  # where all are allowed it is the provider's to judge


@both
def test_prepare_is_no_way_around_what_is_allowed(asker: Make, path: str) -> None:
    """The caps are the last word: they hold for what is sent."""

    def prepare(payload: dict[str, Any], owner: str) -> None:
        payload.update(payload.pop("mine"))

    us = asker(prepare, MODEL="a", ALLOWED_MODELS="a", MAX_TOKENS="100")
    assert us.refused(path, mine={"model": "c"}) == (400, "model_not_allowed")
    assert us.refused(path, mine={"models": ["c"]}) == (400, "model_not_allowed")
    assert us.sent(path, mine={"max_tokens": 9999})["max_tokens"] == 100
    assert us.sent(path, model="c", mine={"model": "a"})["model"] == "a"


# How many tokens


@both
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("body", "most"),
    [
        ({}, 100),
        ({"max_tokens": None}, 100),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 101}, 100),
        ({"max_tokens": 10**30}, 100),
        ({"max_completion_tokens": 7}, 7),
        ({"max_completion_tokens": 9999}, 100),
        ({"max_tokens": 7, "max_completion_tokens": 9999}, 7),
        ({"max_tokens": 9999, "max_completion_tokens": 7}, 7),
        ({"n": 1}, 100),
        ({"n": None, "best_of": None}, 100),
        ({"n": 3}, 33),
        ({"n": 100}, 1),
        ({"n": 3, "max_tokens": 20}, 20),
        ({"n": 2, "best_of": 5}, 20),
        ({"best_of": 5, "max_completion_tokens": 21}, 20),
    ],
    ids=repr,
)
def test_the_most_tokens_of_an_answer(
    asker: Make, path: str, field: str, body: dict[str, Any], most: int
) -> None:
    """In the one field that the provider heeds; several answers share it."""
    asked = asker(MAX_TOKENS="100", MAX_TOKENS_FIELD=field).sent(path, **body)
    (other,) = {"max_tokens", "max_completion_tokens"} - {field}
    assert (asked[field], other in asked) == (most, False)
    assert asked.get("n") == body.get("n")


@both
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n", "best_of"])
@pytest.mark.parametrize(
    "value", [0, -1, True, False, 7.0, 7.5, "7", "many", [], [7], {}], ids=repr
)
def test_what_is_no_number(asker: Make, path: str, name: str, value: Any) -> None:
    """A provider might take it for one, or for none."""
    us = asker(MAX_TOKENS="100")
    assert us.refused(path, **{name: value}) == (400, "bad_number")
    assert name in us.post(path, **{name: value}).text


@both
@pytest.mark.parametrize("body", [{"n": 101}, {"best_of": 101}, {"n": 1, "best_of": 10**30}])
def test_more_answers_than_tokens(asker: Make, path: str, body: Any) -> None:
    """Each would have none."""
    us = asker(MAX_TOKENS="100")
    assert us.refused(path, **body) == (400, "bad_number")
    assert "at most 100" in us.post(path, **body).text


@both
@pytest.mark.parametrize("cap", [{"MAX_TOKENS": "100"}, {"MODEL": "a", "ALLOWED_MODELS": "a,b"}])
def test_other_spellings_are_no_way_around(asker: Make, path: str, cap: dict[str, str]) -> None:
    """Go's JSON matches names in any case, by Unicode's folding, and has the last one win."""
    others: dict[str, Any] = {"MODEL": "c", "model\u017f": ["c"], "Max_Tokens": 999, "N": 99}
    others |= {"max_to\u212aens": 999, "FALLBACKS": ["c"], "Best_Of": 99}
    asked = asker(**cap).sent(path, model="a", **others)
    assert asked["model"] == "a"
    assert not others.keys() & asked.keys()
    assert others.keys() <= asker(MODEL="a").sent(path, **others).keys(), "no caps: as it is"


@both
def test_without_a_cap_numbers_are_the_providers(asker: Make, path: str) -> None:
    """As they are, odd ones too."""
    body = {"max_tokens": "many", "max_completion_tokens": 0, "n": 1.5, "best_of": True}
    asked = asker().sent(path, **body)
    assert {name: asked[name] for name in body} == body
