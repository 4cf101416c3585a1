"""The commands beside real workers, in processes of their own, and on a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatstream.bus.messages import digest
from chatstream.cli.interrupt import AGAIN
from chatstream.cli.sessions import show, stop, stop_all
from chatstream.cli.terminal import Terminal
from chatstream.settings.table import Settings
from tests.conftest import PATIENCE, eventually
from tests.integration.client import Client
from tests.integration.processes import ROOT, Provider, Server, state
from tests.redis_server import RedisServer

PREFIX = f"/cli-{os.getpid()}"
"""Where the routes are: an app of these tests' own, whatever else runs on this host."""

APP = digest("tests.integration.app", PREFIX)[:8] + "1"
"""What the bus calls it."""

SILENT = {"rate": 50, "tokens": 5000, "silent_after": 2}

FLASK = ("flask", "--app", "tests.integration.app", "chatstream")
STANDALONE = ("chatstream",)

numbers = itertools.count(1)


def environment(**more: str) -> dict[str, str]:
    """That of a command: this one's, without its settings."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CHATSTREAM_", "DEEPSEEK_", "GUNICORN_"))
        and "proxy" not in key.lower()
        and key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "CI")
    }
    return {**inherited, "CHATSTREAM_URL_PREFIX": PREFIX, "TERM": "xterm", **more}


def run(program: tuple[str, ...], *arguments: str, **environ: str) -> tuple[int, str, str]:
    """A command's exit code, and what it said to standard output and to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", *program, *arguments],
        cwd=ROOT,
        env=environment(**environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.close()


class Site:
    """A server of two workers, and the commands of whoever runs it."""

    def __init__(self, server: Server, provider: Provider, settings: Settings) -> None:
        self.server = server
        self.provider = provider
        self.settings = settings
        self._clients: list[Client] = []

    def begin(self, owner: str) -> str:
        """A stream in the middle of a silence. Returns its session."""
        session = f"cli-{next(numbers)}"
        client = Client(self.server.port)
        self._clients.append(client)
        client.post(
            session,
            path=f"{PREFIX}/stream",
            headers={"X-User": owner},
            simulate={"id": session, **SILENT},
        )
        self.provider.request(session, "delivered", count=2)
        return session

    def sessions(self) -> dict[str, dict[str, Any]]:
        """What the command lists, by session. From this process: that takes no time."""
        out = io.StringIO()
        terminal = Terminal(out, io.StringIO())
        assert show(self.settings, APP, terminal, owner=None, as_json=True) == 0
        return {found["session"]: found for found in json.loads(out.getvalue())["sessions"]}

    def cancel(self, session: str, owner: str | None = None) -> tuple[int, str, str]:
        """As a command's. From this process."""
        out, err = io.StringIO(), io.StringIO()
        terminal = Terminal(out, err)
        code = stop(self.settings, APP, terminal, session, stream_id=None, owner=owner)
        return code, out.getvalue(), err.getvalue()

    def cancel_all(self, owner: str | None) -> tuple[int, str]:
        """The same with --all."""
        out = io.StringIO()
        code = stop_all(self.settings, APP, Terminal(out, io.StringIO()), owner=owner)
        return code, out.getvalue()

    def close(self) -> None:
        """Every client leaves, and nothing is left."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        eventually(lambda: self.provider.stats()["generating"] == 0, "no generation")
        eventually(lambda: not self.server.debug()["live"], "no live stream")
        assert self.server.errors() == []


@pytest.fixture(scope="module")
def sites(
    provider: Provider, shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Site]]:
    """`sites(kind)`: the default bus under a worker class, or Redis; each is started once."""
    made: dict[str, Site] = {}
    buses = {"redis": {"CHATSTREAM_BUS": shared_redis.url, "CHATSTREAM_BUS_PREFIX": PREFIX[1:]}}

    def site(kind: str) -> Site:
        if kind not in made:
            bus = buses.get(kind, {})
            if bus:  # it has long been there
                shared_redis.command("SET", f"{PREFIX[1:]}:since", 0)
            server = Server(
                tmp_path_factory.mktemp("cli") / f"{kind}.log",
                WEB_CONCURRENCY="2",
                CHATSTREAM_WORKER_CLASS="gevent" if kind == "gevent" else "gthread",
                CHATSTREAM_URL_PREFIX=PREFIX,
                CHATSTREAM_UPSTREAM_URL=provider.url,
                **bus,
            )
            made[kind] = Site(server, provider, Settings.load(bus, {}))
        return made[kind]

    yield site
    with contextlib.ExitStack() as stack:  # one that does not end keeps no other from it
        for each in made.values():
            each.server.terminate()
            stack.callback(each.server.stop)


@pytest.fixture(params=["gthread", "gevent", "redis"])
def site(sites: Callable[[str], Site], request: pytest.FixtureRequest) -> Iterator[Site]:
    site = sites(request.param)
    yield site
    site.close()


# What lives


def test_an_operator_sees_and_stops_a_session(site: Site) -> None:
    """Whoever's it is, in whichever worker: the provider is told, and nobody else's stream ends."""
    mine, yours = site.begin("me"), site.begin("you")
    found = site.sessions()
    assert (found[mine]["owner"], found[yours]["owner"]) == ("me", "you")
    assert found[mine]["pid"] in site.server.workers
    assert found[mine]["phase"] in ("body", "sending")
    assert found[mine]["events"] >= 2
    code, out, err = site.cancel(mine)
    assert (code, err) == (0, "")
    assert out.startswith(f"stopped: session {mine}, stream ")
    assert site.provider.request(mine)["closed_by"] == "client"
    assert "aborted by client/cancel cause=cancel" in site.server.ending_of(mine)
    assert site.cancel(mine) == (1, "", f"No such session: {mine}\n")
    assert site.provider.request(yours)["open"]


def test_the_commands_themselves(sites: Callable[[str], Site]) -> None:
    """The app's, found by its name; a list for a pipe has a head and a line for each stream."""
    site = sites("gthread")
    session = site.begin("me")
    code, out, err = run(FLASK, "sessions", "--owner", "me")
    assert (code, err) == (0, "")
    head, *lines = [line.split("\t") for line in out.splitlines()]
    assert head[:3] == ["session", "stream", "owner"]
    assert [line[2] for line in lines if line[0] == session] == ["me"]
    code, out, err = run(FLASK, "cancel", session)
    assert (code, err) == (0, "")
    assert out.startswith("stopped: ")
    assert site.provider.request(session)["closed_by"] == "client"
    session = site.begin("me")
    assert run(FLASK, "cancel", "--all", "--owner", "you") == (0, "", "0 stopped.\n")
    code, out, err = run(FLASK, "cancel", "--all")
    assert (code, err) == (0, "1 stopped.\n")
    assert out.startswith(f"stopped: session {session}, stream ")
    site.close()


def test_an_operator_stops_all(site: Site) -> None:
    """Of one owner, then of everybody, in both workers; the providers are told."""
    mine, yours = [site.begin("me") for _ in range(3)], [site.begin("you") for _ in range(3)]
    code, lines = site.cancel_all("me")
    assert code == 0
    assert sorted(re.findall(r"session (\S+),", lines)) == sorted(mine)
    for session in mine:
        assert site.provider.request(session)["closed_by"] == "client"
        assert "aborted by client/cancel cause=cancel" in site.server.ending_of(session)
    assert all(site.provider.request(session)["open"] for session in yours)
    code, lines = site.cancel_all(None)
    assert code == 0
    assert set(re.findall(r"session (\S+),", lines)) == set(yours)
    assert site.sessions() == {}
    assert site.cancel_all(None) == (0, "")


def test_two_gunicorns_of_an_app_are_both_seen(sites: Callable[[str], Site]) -> None:
    """Told apart by the workers' pids; a cancel goes to the one that has the session."""
    one, other = sites("gthread"), sites("gevent")
    here, there = one.begin("me"), other.begin("me")
    found = one.sessions()
    assert found[here]["pid"] in one.server.workers
    assert found[there]["pid"] in other.server.workers
    assert one.cancel(there)[0] == 0
    assert other.provider.request(there)["closed_by"] == "client"
    assert one.provider.request(here)["open"]
    one.close()
    other.close()


def test_a_worker_that_hangs_is_named_and_told(sites: Callable[[str], Site]) -> None:
    """2, in words; and when it wakes, its stream ends."""
    site = sites("gthread")
    session = site.begin("me")
    worker = site.sessions()[session]["pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        eventually(lambda: state(worker) == "T", "a stopped worker")
        code, out, err = site.cancel(session, "me")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert (code, out) == (2, "")
    assert "does not answer" in err
    assert "cause=cancel" in site.server.ending_of(session)
    site.close()


def test_a_command_leaves_nothing_behind(sites: Callable[[str], Site]) -> None:
    """Neither in the directory of the service nor in its Redis; no worker logs a word of it."""
    site = sites("redis")
    site.begin("me")
    log = site.server.log()

    def leaves_nothing() -> bool:
        before = set(_keys(site))
        assert site.sessions()
        assert site.cancel("nobody")[0] == 1
        return set(_keys(site)) <= before | _mailboxes(site)

    # Again, since a reply that comes late makes its mailbox anew, for as long as mail is kept.
    eventually(leaves_nothing, "the keys of before")
    assert site.server.log() == log
    site.close()


def _keys(site: Site) -> list[str]:
    import redis

    with contextlib.closing(redis.Redis.from_url(site.settings.bus or "")) as client:
        return [key.decode() for key in client.keys(f"{PREFIX[1:]}:*")]


def _mailboxes(site: Site) -> set[str]:
    """Those of the workers: they are there once they were written to."""
    return {key.replace(":worker:", ":mail:") for key in _keys(site) if ":worker:" in key}


def test_nobody_there_is_said(short_base: Path) -> None:
    """2, and what to do."""
    code, out, err = run(STANDALONE, "sessions", CHATSTREAM_BUS=f"unix://{short_base}")
    assert (code, out) == (2, "")
    assert f"No worker of this app is running as this user (looked below {short_base})" in err


# The doctor


def test_the_doctor_sees_the_workers(sites: Callable[[str], Site]) -> None:
    """With the app: its settings, and who runs. The key is not shown."""
    site = sites("gthread")
    code, out, _ = run(
        FLASK,
        "doctor",
        CHATSTREAM_UPSTREAM_URL=site.provider.url,
        CHATSTREAM_API_KEY="sk-secret-of-the-tests",
    )
    assert code == 0, out
    assert re.search(r"^ok +workers +\d+ run, with 0 streams\.$", out, re.MULTILINE)
    assert re.search(r"^ok +worker +\d+ of gthread of 16 threads, ours\.$", out, re.MULTILINE)
    assert "sk-secret" not in out


def test_where_the_app_does_not_start(provider: Provider) -> None:
    """The sentence, and not a traceback; what can be looked at is looked at."""
    wrong = {"CHATSTREAM_DRAIN": "soon", "CHATSTREAM_UPSTREAM_URL": provider.url}
    code, out, err = run(FLASK, "doctor", **wrong)
    assert (code, err) == (1, "")
    assert re.search(r"^fail +settings +CHATSTREAM_DRAIN must be ", out, re.MULTILINE)
    assert re.search(r"^ok +connection ", out, re.MULTILINE)
    code, out, err = run(STANDALONE, "sessions", **wrong)
    assert (code, out) == (1, "")
    assert err.startswith("Error: CHATSTREAM_DRAIN must be ")


def test_who_may_use_the_standalone_service(provider: Provider) -> None:
    """Open or closed, and who can reach it; no token is shown, also where one is wrong."""
    here = {"CHATSTREAM_UPSTREAM_URL": provider.url, "CHATSTREAM_BIND": "0.0.0.0:8000"}
    code, out, _ = run(STANDALONE, "doctor", **here)
    assert code == 0, out
    assert re.search(r"^note +identify +Open: ", out, re.MULTILINE)
    assert re.search(r"^warn +bind +It listens on 0\.0\.0\.0 and asks nobody", out, re.MULTILINE)
    code, out, _ = run(STANDALONE, "doctor", **here, CHATSTREAM_TOKENS="ann:tok-1")
    assert code == 0, out
    assert re.search(r"^ok +tokens +Closed: tokens 1, of owners 1, for admins 0\.", out, re.M)
    assert re.search(r"^note +bind +It listens on 0\.0\.0\.0 without TLS", out, re.MULTILINE)
    assert not re.search(r"^\w+ +identify ", out, re.MULTILINE)
    assert "tok-1" not in out
    both = {"CHATSTREAM_TOKENS": "a:tok-1", "CHATSTREAM_ADMIN_TOKENS": "b:tok-1"}
    code, out, err = run(STANDALONE, "doctor", **here, **both)
    assert code == 1, out
    assert re.search(r"^fail +settings +A token must not be both ", out, re.MULTILINE)
    assert "tok-1" not in out + err


# The chat


class Screen:
    """A command on a terminal, and somebody who types."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        begin = (
            "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "os.execv(sys.executable, [sys.executable, '-m', 'chatstream', *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", begin, *arguments],
            cwd=ROOT,
            env=environment(**environ),
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, text: str, times: int = 1) -> str:
        """Waits until `text` has been shown so often; returns all that has been."""
        deadline = time.monotonic() + PATIENCE
        while self.seen.count(text) < times:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {self.seen!r}"
            self._read(left)
        return self.seen

    def _read(self, timeout: float) -> bool:
        if not select.select([self._master], [], [], timeout)[0]:
            return True
        try:
            self.seen += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # EIO: the program has ended
            return False
        return True

    def end(self) -> int:
        """The exit code; reads what is shown until then."""
        deadline = time.monotonic() + PATIENCE
        while self._read(0.05) and time.monotonic() < deadline:
            pass
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        os.close(self._master)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    made: list[Screen] = []

    def make(*arguments: str, **environ: str) -> Screen:
        made.append(Screen(*arguments, **environ))
        return made[-1]

    yield make
    for one in made:
        one.close()


CTRL_C, CTRL_D = "\x03", "\x04"


@contextlib.contextmanager
def behaving(**defaults: Any) -> Iterator[Provider]:
    provider = Provider(defaults=defaults)
    try:
        yield provider
    finally:
        provider.close()


def requests(provider: Provider) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = provider.get("/requests")
    return found


def test_ctrl_c_stops_the_answer_and_not_the_program(screen: Callable[..., Screen]) -> None:
    """Once, and twice in a row; then it asks again, and Ctrl-D leaves."""
    with behaving(rate=50, tokens=5000) as provider:
        talk = screen("chat", CHATSTREAM_UPSTREAM_URL=provider.url)
        for number, keys in enumerate((CTRL_C, CTRL_C * 2)):
            talk.until("> ", number + 1)
            talk.type("tell me\r")
            eventually(lambda n=number: len(requests(provider)) > n, "a question")
            eventually(lambda n=number: requests(provider)[n]["delivered"] >= 5, "an answer")
            talk.type(keys)
            talk.until("[stopped]", number + 1)
            eventually(lambda: provider.stats()["generating"] == 0, "no generation")
            assert requests(provider)[number]["closed_by"] == "client"
        talk.until("> ", 3)
        talk.type(CTRL_D)
        assert talk.end() == 0
    assert "Traceback" not in talk.seen
    assert "[SSE]" not in talk.seen


def test_ctrl_c_while_the_provider_thinks_and_at_the_prompt(
    screen: Callable[..., Screen],
) -> None:
    """A spinner turns until it is pressed; at the prompt it leaves."""
    with behaving(headers_after=60) as provider:
        talk = screen("chat", CHATSTREAM_UPSTREAM_URL=provider.url)
        talk.until("> ")
        talk.type("well?\r")
        talk.until("waiting for the provider")
        eventually(lambda: requests(provider), "the question")
        talk.type(CTRL_C)
        talk.until("[stopped]")
        eventually(lambda: provider.stats()["generating"] == 0, "no generation")
        talk.until("> ", 2)
        again = time.monotonic() + AGAIN
        eventually(lambda: time.monotonic() > again, "that another one is not the same")
        talk.type(CTRL_C)
        assert talk.end() == 0
    assert talk.seen.count("\x1b[?25l") == talk.seen.count("\x1b[?25h")  # the cursor is back


def test_an_answer_writes_nothing_to_the_terminal_but_text(
    screen: Callable[..., Screen],
) -> None:
    """What would set its title, or clear it, is shown as what it is."""
    said = {"choices": [{"delta": {"content": "\x1b]0;owned\x07\x1b[2Jdone"}}]}
    raw = f"data: {json.dumps(said)}\n\ndata: [DONE]\n\n"
    with behaving(raw=raw) as provider:
        talk = screen("chat", "hi", CHATSTREAM_UPSTREAM_URL=provider.url)
        assert talk.end() == 0
    assert "␛]0;owned␇␛[2Jdone" in talk.seen
    assert "\x1b]" not in talk.seen


def test_a_question_in_a_script_is_stopped_by_sigint(provider: Provider) -> None:
    """130; what had come was written, and the provider was told."""
    before = provider.stats()["requests"]
    asking = subprocess.Popen(
        [sys.executable, "-m", "chatstream", "chat", "long?"],
        cwd=ROOT,
        env=environment(CHATSTREAM_UPSTREAM_URL=provider.url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        eventually(lambda: provider.stats()["requests"] > before, "the question")
        eventually(lambda: requests(provider)[-1]["delivered"] >= 2, "an answer")
        asking.send_signal(signal.SIGINT)
        out, err = asking.communicate(timeout=PATIENCE)
    finally:
        asking.kill()
        asking.wait()
    assert asking.returncode == 130
    assert out.strip()
    assert b"\x1b" not in out
    assert err == b"[stopped]\n"
    eventually(lambda: requests(provider)[-1]["closed_by"] == "client", "the provider's end")
