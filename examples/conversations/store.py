"""Conversations in SQLite: whose they are, what was asked, and what was seen of each answer.

A turn begins as `answering`. It is settled by the end of its stream (completed, stopped, failed),
or, if that is never told, given up: `lost`. One conversation has one turn that is being answered.

Nothing waits between BEGIN and COMMIT: what another worker holds up, it holds up for a moment.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flask import Flask, current_app, g

from chatstream import Kind, Outcome

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    begun REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS conversations_of ON conversations (owner, begun);
CREATE TABLE IF NOT EXISTS turns (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation TEXT NOT NULL REFERENCES conversations (id),
    stream TEXT NOT NULL,
    question TEXT NOT NULL,
    answer TEXT NOT NULL DEFAULT '',
    reasoning TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL DEFAULT 'answering'
        CHECK (state IN ('answering', 'completed', 'stopped', 'failed', 'lost')),
    cause TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    estimated INTEGER,
    UNIQUE (conversation, stream)
);
CREATE UNIQUE INDEX IF NOT EXISTS one_at_a_time ON turns (conversation)
    WHERE state = 'answering';
"""

SETTLE = """
UPDATE turns
SET state = ?, cause = ?, answer = ?, reasoning = ?,
    prompt_tokens = ?, completion_tokens = ?, estimated = ?
WHERE conversation = ? AND stream = ? AND state IN ('answering', 'lost')
"""

LIST = """
SELECT conversations.id, turns.question AS title
FROM conversations LEFT JOIN turns ON turns.number =
    (SELECT min(number) FROM turns WHERE conversation = conversations.id)
WHERE owner = ?
ORDER BY begun DESC
"""

STATES = {Kind.COMPLETED: "completed", Kind.ABORTED: "stopped", Kind.FAILED: "failed"}

LOOK = 0.01
"""Seconds between two looks whether a turn is settled. SQLite wakes nobody up."""


class Used(Exception):
    """There was an answer of this name before."""


def init_app(app: Flask) -> None:
    """Makes the tables, and closes each app context's connection with it."""
    default = Path(app.instance_path) / "conversations.sqlite"
    app.config.setdefault("DATABASE", os.environ.get("DATABASE", str(default)))
    Path(app.config["DATABASE"]).parent.mkdir(parents=True, exist_ok=True)
    app.teardown_appcontext(_close)
    with app.app_context():
        _connection().executescript(SCHEMA)


def create(id: str, owner: str) -> None:
    """A conversation in which nothing was said yet."""
    values = (id, owner, time.time())
    _connection().execute("INSERT INTO conversations VALUES (?, ?, ?)", values)


def conversations(owner: str) -> list[sqlite3.Row]:
    """Somebody's, the newest first: `id` and `title`, the first question or None."""
    return _connection().execute(LIST, (owner,)).fetchall()


def owned(conversation: str, owner: str) -> bool:
    """Whether there is one of this id, and it is the owner's."""
    query = "SELECT 1 FROM conversations WHERE id = ? AND owner = ?"
    return _connection().execute(query, (conversation, owner)).fetchone() is not None


def turns(conversation: str) -> list[sqlite3.Row]:
    """All of them, in the order they were asked."""
    query = "SELECT * FROM turns WHERE conversation = ? ORDER BY number"
    return _connection().execute(query, (conversation,)).fetchall()


def before(conversation: str, stream: str) -> list[sqlite3.Row]:
    """The turns before that of an answer."""
    query = "SELECT number FROM turns WHERE conversation = ? AND stream = ?"
    (number,) = _connection().execute(query, (conversation, stream)).fetchone()
    return [turn for turn in turns(conversation) if turn["number"] < number]


def begin(conversation: str, stream: str, question: str) -> str | None:
    """Enters a turn, unless an earlier one is being answered.

    Returns:
        The name of that one's answer; None if the turn was entered.

    Raises:
        Used: The conversation had an answer of this name.
    """
    with _writing() as connection:
        query = "SELECT stream FROM turns WHERE conversation = ? AND state = 'answering'"
        earlier = connection.execute(query, (conversation,)).fetchone()
        if earlier is not None and earlier["stream"] != stream:
            return str(earlier["stream"])
        try:
            query = "INSERT INTO turns (conversation, stream, question) VALUES (?, ?, ?)"
            connection.execute(query, (conversation, stream, question))
        except sqlite3.IntegrityError:
            raise Used from None
    return None


def withdraw(conversation: str, stream: str) -> None:
    """Takes a turn back that never became a stream."""
    with _writing() as connection:
        query = "DELETE FROM turns WHERE conversation = ? AND stream = ? AND state = 'answering'"
        connection.execute(query, (conversation, stream))


def settle(outcome: Outcome) -> None:
    """Keeps how an answer ended, and what was seen of it. Also if it was given up before."""
    usage = outcome.usage or (None, None, None)
    cause = outcome.cause.value if outcome.cause else outcome.code
    values = (STATES[outcome.kind], cause, outcome.text or "", outcome.reasoning or "", *usage)
    with _writing() as connection:
        connection.execute(SETTLE, (*values, outcome.session_id, outcome.stream_id))


def settled(conversation: str, stream: str, patience: float) -> bool:
    """Waits until a turn is settled, or withdrawn, for at most `patience` seconds."""
    query = "SELECT 1 FROM turns WHERE conversation = ? AND stream = ? AND state = 'answering'"
    deadline = time.monotonic() + patience
    while _connection().execute(query, (conversation, stream)).fetchone() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK)
    return True


def give_up(conversation: str, stream: str) -> None:
    """Whoever should have settled a turn is gone. If it comes back, `settle` has the last word."""
    with _writing() as connection:
        query = "UPDATE turns SET state = 'lost' WHERE conversation = ? AND stream = ?"
        connection.execute(f"{query} AND state = 'answering'", (conversation, stream))


@contextmanager
def _writing() -> Iterator[sqlite3.Connection]:
    """A transaction in which nobody else writes: what is read in it holds until it ends."""
    connection = _connection()
    connection.execute("BEGIN IMMEDIATE")
    with connection:  # commits; rolls back where something is raised
        yield connection


def _connection() -> sqlite3.Connection:
    """The app context's: that of a request, or of who listens to a signal."""
    if "store" not in g:
        path, patience = current_app.config["DATABASE"], current_app.config["DATABASE_PATIENCE"]
        g.store = sqlite3.connect(path, timeout=patience, isolation_level=None)
        g.store.row_factory = sqlite3.Row
        g.store.execute("PRAGMA foreign_keys = ON")
    connection: sqlite3.Connection = g.store
    return connection


def _close(error: BaseException | None) -> None:
    if (connection := g.pop("store", None)) is not None:
        connection.close()
