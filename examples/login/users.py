"""Who may log in: a table in SQLite, with hashed passwords."""

from __future__ import annotations

import os
import sqlite3
from functools import cache
from pathlib import Path

from flask import Flask, current_app, g
from flask_login import UserMixin
from werkzeug.security import check_password_hash, generate_password_hash

SCHEMA = """
CREATE TABLE IF NOT EXISTS users (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE COLLATE NOCASE,
    password TEXT NOT NULL,
    is_admin INTEGER NOT NULL
);
"""


class User(UserMixin):
    """Somebody who may log in."""

    def __init__(self, id: int, name: str, is_admin: bool) -> None:
        self.id = id
        self.name = name
        self.is_admin = is_admin


def init_app(app: Flask) -> None:
    """Makes the table, and closes each app context's connection with it."""
    default = Path(app.instance_path) / "users.sqlite"
    app.config.setdefault("DATABASE", os.environ.get("DATABASE", str(default)))
    Path(app.config["DATABASE"]).parent.mkdir(parents=True, exist_ok=True)
    app.teardown_appcontext(_close)
    with app.app_context():
        _connection().executescript(SCHEMA)


def add(name: str, password: str, *, admin: bool = False) -> None:
    """Raises sqlite3.IntegrityError if there is one of that name."""
    values = (name, generate_password_hash(password), admin)
    with _connection() as connection:
        connection.execute("INSERT INTO users (name, password, is_admin) VALUES (?, ?, ?)", values)


def find(id: str) -> User | None:
    """The user whose id a session has; None if they are gone."""
    row = _row("SELECT * FROM users WHERE id = ?", id)
    return _user(row) if row else None


def check(name: str, password: str) -> User | None:
    """The user who has this name and this password."""
    row = _row("SELECT * FROM users WHERE name = ?", name)
    # A name that nobody has takes as long: how long it took tells no name.
    hashed = row["password"] if row else _nobodys()
    return _user(row) if check_password_hash(hashed, password) and row else None


@cache
def _nobodys() -> str:
    return generate_password_hash("")


def _user(row: sqlite3.Row) -> User:
    return User(row["id"], row["name"], bool(row["is_admin"]))


def _row(query: str, value: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = _connection().execute(query, (value,)).fetchone()
    return row


def _connection() -> sqlite3.Connection:
    if "users" not in g:
        g.users = sqlite3.connect(current_app.config["DATABASE"])
        g.users.row_factory = sqlite3.Row
    connection: sqlite3.Connection = g.users
    return connection


def _close(error: BaseException | None) -> None:
    if (connection := g.pop("users", None)) is not None:
        connection.close()
