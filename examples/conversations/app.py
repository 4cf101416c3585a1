"""An app that keeps conversations: the page sends a question, the app knows what was said before.

How to run it is in the README.md beside. `store.py` is the database.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import store
from flask import Flask, current_app, g, render_template, session
from werkzeug.wrappers import Response

from chatstream import (
    BusUnavailable,
    Busy,
    ChatStream,
    Outcome,
    Refused,
    Service,
    Unconfirmed,
    stream_ended,
)

CONFIG = {
    "SYSTEM_PROMPT": "You are a helpful assistant. Answer briefly.",
    "DATABASE_PATIENCE": 5.0,  # seconds that one may wait for another who writes
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
}

PATIENCE = 5.0
"""Seconds from an answer's stop until it must be settled.

A client that takes no bytes is given two seconds after a stop, and two more where some were on
their way: before, nobody knows what it took.
"""

WAITERS = threading.BoundedSemaphore(4)
"""Those of a worker who may wait for that: each has a thread, and cancels need some too."""

OVERTAKEN = 5
"""Other questions that may come before one is refused."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)


def create_app(**config: Any) -> Flask:
    """The app. SECRET_KEY and the provider come from the environment."""
    logging.basicConfig(level=logging.INFO)  # a line for each stream, and how it ended
    app = Flask(__name__)
    app.config.update(CONFIG, SECRET_KEY=os.environ.get("SECRET_KEY"))
    app.config.update(config)
    if not app.config["SECRET_KEY"]:
        raise RuntimeError("Set SECRET_KEY to what nobody can guess: it signs the cookies.")
    store.init_app(app)
    ChatStream(app, identify=visitor, prepare=prepare)
    stream_ended.connect(keep, app)
    app.register_error_handler(sqlite3.OperationalError, locked)
    app.after_request(withdraw_the_refused)
    app.after_request(say_what_may_run)
    app.add_url_rule("/", view_func=chat)
    app.add_url_rule("/conversations", view_func=listed)
    app.add_url_rule("/conversations", view_func=create, methods=["POST"])
    app.add_url_rule("/conversations/<id>", view_func=show)
    return app


def visitor() -> str | None:
    """Whose conversations they are: a browser's. An app with logins says the user's id."""
    return session.get("visitor")


# What is sent to the provider


def prepare(payload: dict[str, Any], owner: str) -> None:
    """Puts what was said before in front of the question, and notes that it is being answered."""
    conversation, stream = payload["sessionId"], payload["streamId"]
    question = question_in(payload["messages"])
    if not store.owned(conversation, owner):
        raise Refused("There is no such conversation.", code="no_conversation", status=404)
    enter(conversation, stream, question, owner)
    g.entered = (conversation, stream)
    payload["messages"] = [
        {"role": "system", "content": current_app.config["SYSTEM_PROMPT"]},
        *said(store.before(conversation, stream), question),
    ]


def question_in(messages: list[Any]) -> str:
    """What the user says. What was said before, a client has no say in."""
    match messages:
        case [{"role": "user", "content": str(question)}] if question.strip():
            with suppress(UnicodeEncodeError):  # half of a surrogate pair is no text
                question.encode()
                return question
    raise Refused("Send one message: the user's, with a text.", code="bad_messages")


def enter(conversation: str, stream: str, question: str, owner: str) -> None:
    """Enters the question; an answer that still streams is stopped, and kept, before."""
    for _ in range(OVERTAKEN):
        try:
            earlier = store.begin(conversation, stream, question)
        except store.Used:
            raise Refused(
                "There was an answer of this name.", code="conflict", status=409
            ) from None
        if earlier is None:
            return
        stop(conversation, earlier, owner)
    raise Refused("Another question came first.", code="conflict", status=409)


def stop(conversation: str, stream: str, owner: str) -> None:
    """Ends an answer, wherever it streams, and waits until what was seen of it is kept.

    By its own name: so it is stopped also if it has not even begun. One whose worker was killed
    is nowhere, and nobody will tell how far it came.
    """
    with suppress(Unconfirmed, BusUnavailable):
        service().abort(conversation, stream, owner=owner)
    wait_for_the_end(conversation, stream)


def wait_for_the_end(conversation: str, stream: str) -> None:
    """Waits until an answer that streams no more is kept, or given up. Raises Busy."""
    if not WAITERS.acquire(blocking=False):
        raise Busy("Too many wait for an answer's end. Please try again.")
    try:
        if not store.settled(conversation, stream, PATIENCE):
            store.give_up(conversation, stream)
    finally:
        WAITERS.release()


def said(turns: Iterable[sqlite3.Row], question: str) -> Iterator[dict[str, str]]:
    """The conversation as providers want it: in turns, and no message empty.

    A question of whose answer nothing was seen is asked together with the next one.
    """
    asked: list[str] = []
    for turn in turns:
        asked.append(turn["question"])
        if turn["answer"]:
            yield {"role": "user", "content": "\n\n".join(asked)}
            yield {"role": "assistant", "content": turn["answer"]}
            asked = []
    yield {"role": "user", "content": "\n\n".join([*asked, question])}


# What came back


def keep(app: Flask, outcome: Outcome) -> None:
    """Keeps an answer as it was seen, however it ended."""
    store.settle(outcome)


def withdraw_the_refused(response: Response) -> Response:
    """A question that never became a stream has no end either: no slot was free, say."""
    if response.status_code != 200 and (entered := g.pop("entered", None)):
        store.withdraw(*entered)
    return response


# The app's own pages


def chat() -> str:
    """The page."""
    session.permanent = True
    session.setdefault("visitor", uuid.uuid4().hex)
    return render_template("chat.html", finish=service().settings.on_disconnect == "finish")


def listed() -> dict[str, Any]:
    """The visitor's conversations."""
    return {"conversations": [dict(row) for row in store.conversations(visitor() or "")]}


def create() -> tuple[dict[str, str], int]:
    """A new one."""
    owner = visitor()
    if owner is None:
        return {"message": "Open the page first."}, 401
    id = uuid.uuid4().hex
    store.create(id, owner)
    return {"id": id}, 201


def show(id: str) -> dict[str, Any] | tuple[dict[str, str], int]:
    """What was said in one."""
    owner = visitor() or ""
    if not store.owned(id, owner):
        return {"message": "There is no such conversation."}, 404
    turns = store.turns(id)
    for turn in turns:
        if turn["state"] == "answering" and not streams(turn["stream"], owner):
            with suppress(Busy):
                wait_for_the_end(id, turn["stream"])
            turns = store.turns(id)
    return {"turns": [dict(turn) for turn in turns]}


def streams(stream: str, owner: str) -> bool:
    """Whether an answer is live in some worker, as far as that can be found out."""
    try:
        workers = service().sessions(owner).workers
    except BusUnavailable:
        return True
    if not all(worker.answered for worker in workers):
        return True
    return any(live.name.stream_id == stream for worker in workers for live in worker.streams)


def locked(error: sqlite3.OperationalError) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Somebody else writes for longer than one may wait: in the words of the chat's refusals."""
    current_app.logger.warning("The database: %s", error)
    message = "The conversations cannot be had right now. Please try again."
    return {"ok": False, "reason": "busy", "message": message}, 503, {"Retry-After": "1"}


def say_what_may_run(response: Response) -> Response:
    """Nothing but the app's own files, should a script ever get into an answer."""
    response.headers.setdefault("Content-Security-Policy", POLICY)
    return response


def service() -> Service:
    """The app's streams."""
    found: Service = current_app.extensions["chatstream"]
    return found
