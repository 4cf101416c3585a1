"""openai_chat: what an answer says, as events and in one piece."""

from __future__ import annotations

from tests.simulator.client import Client


def test_a_stream_has_the_shape_of_openai(client: Client) -> None:
    """Role first, one word per event, finish_reason, usage, [DONE]."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "model": "gpt-ö"}
    messages = [{"role": "user", "content": "hi"}]
    answer = client.post({**options, "messages": messages, "simulate": {"tokens": 3, "rate": 0}})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    *chunks, finish, usage, done = answer.events()
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "A "},
        {"content": "stop "},
        {"content": "button "},
    ]
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert usage["usage"]["total_tokens"] == 3 + usage["usage"]["prompt_tokens"]
    for event in (*chunks, finish, usage):
        assert event["object"] == "chat.completion.chunk"
        assert (event["id"], event["model"]) == (chunks[0]["id"], "gpt-ö")


def test_the_text_is_prose_that_goes_round(client: Client) -> None:
    """More tokens than the text has words begin it again; it is not all ASCII."""
    words = client.chat(tokens=1000, rate=0).text().split()
    assert len(words) == 1000
    period = words.index("A", words.index("looks."))
    assert words[period:] == words[: 1000 - period]
    assert period > 300
    assert "naïve" in words


def test_usage_only_when_asked_for(client: Client) -> None:
    """Without stream_options the events are the tokens, the finish and [DONE]."""
    assert len(client.chat(tokens=2, rate=0).events()) == 2 + 1 + 1


def test_a_whole_completion(client: Client, desk: Client, name: str) -> None:
    """Without stream one JSON, after the time that its tokens take."""
    answer = client.chat(stream=False, id=name, tokens=30, rate=300, reasoning=10)
    assert answer.headers["Content-Type"] == "application/json"
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    completion = answer.json()
    assert completion["object"] == "chat.completion"
    assert completion["usage"]["completion_tokens"] == 30
    [choice] = completion["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["message"]["content"].split()) == 20
    assert choice["message"]["reasoning_content"].startswith("A stop button ")
    figure = desk.figure(name)
    assert figure["closed_ns"] - figure["started_ns"] >= 30 / 300 * 1e9
    assert (figure["stream"], figure["delivered"], figure["finished"]) == (False, 30, True)


def test_it_says_what_it_is_given(client: Client) -> None:
    """With `text`: word by word with the space between, over and over, as any JSON text."""
    text = ' # A "title"\n\n- *žluť* 🙂\n'
    assert client.chat(tokens=6, rate=0, text=text).text() == text
    assert client.chat(tokens=9, rate=1000, text=text).text() == text + ' # A "title"\n\n'
    assert client.chat(tokens=2, rate=0, text="").text() == ""
    assert client.chat(False, tokens=6, rate=0, text=text).json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": text,
    }


def test_reasoning_comes_first(client: Client) -> None:
    """The first tokens are reasoning_content; the text is not told twice."""
    answer = client.chat(tokens=5, rate=0, reasoning=2)
    assert answer.text("reasoning_content") == "A stop "
    assert answer.text() == "button is a "


def test_an_end_without_done(client: Client) -> None:
    """finish_reason is the last word."""
    events = client.chat(tokens=1, rate=0, no_done=True).events()
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_error_in_mid_answer(client: Client, desk: Client, name: str) -> None:
    """An error event, then a clean end."""
    *tokens, error = client.chat(id=name, error_after=2, rate=1000).events()
    assert len(tokens) == 2
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "overloaded")
    assert desk.figure(name, "closed")["closed_by"] == "error_after"


def test_a_whole_completion_can_go_wrong_too(client: Client) -> None:
    """With the error, or cut short."""
    assert client.chat(False, error_after=1, rate=0).json()["error"]["code"] == "overloaded"
    [choice] = client.chat(False, truncate_after=2, rate=0).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("A stop ", None)


def test_pad(client: Client) -> None:
    """Makes tokens heavy."""
    text = client.chat(tokens=3, rate=0, pad=1000).text()
    assert len(text) == len("A stop button ") + 3000
