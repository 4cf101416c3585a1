"""testing: the plugin, as pytest loads it for the owner of an app."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chatstream.testing

# An inner session forgets what it has imported: the next one would have two of each of these.
from chatstream import Service  # noqa: F401
from chatstream.testing import live  # noqa: F401
from chatstream.upstream import provider  # noqa: F401

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "testing"

NAMES = ["Answer", "Browser", "Event", "Figure", "Live", "Provider", "Reply"]

STRICT = ("-p", "no:cacheprovider", "-W", "error")

APP = """
from flask import Flask
from chatstream import ChatStream

app = Flask(__name__)
app.config["CHATSTREAM_UPSTREAM_URL"] = "http://192.0.2.1/"
ChatStream(app)
"""

FIVE_LINES = """
from shop import app

def test_a_stop_reaches_my_provider(chatstream_provider, chatstream_live):
    live = chatstream_live(app)
    answer = live.ask("Tell me a story.")
    answer.stop()
    assert chatstream_provider.told(answer).generated < 200
"""


def test_the_names() -> None:
    """A new or a lost name is a decision. All are documented, and are there when asked for."""
    assert chatstream.testing.__all__ == NAMES
    for name in NAMES:
        assert inspect.getdoc(getattr(chatstream.testing, name)), name
    with pytest.raises(AttributeError, match="Alive"):
        _ = chatstream.testing.Alive  # type: ignore[attr-defined]


def test_type_checkers_see_the_names() -> None:
    """They are fetched late, so what a type checker reads are the imports it alone makes."""
    tree = ast.parse(inspect.getsource(chatstream.testing))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    rooms = {alias.name: node.module or "" for node in imports for alias in node.names}
    for name in NAMES:
        value = getattr(importlib.import_module(rooms[name]), name)
        assert value is getattr(chatstream.testing, name)


def test_nothing_collides(pytestconfig: pytest.Config) -> None:
    """Two fixtures, and no hook: what a project has of its own stays as it is."""
    plugin = pytestconfig.pluginmanager.get_plugin("chatstream")
    assert plugin is chatstream.testing
    assert pytestconfig.pluginmanager.get_hookcallers(plugin) == []
    fixtures = {name for name in vars(plugin) if name.startswith("chatstream_")}
    assert fixtures == {"chatstream_provider", "chatstream_live"}


def test_it_is_loaded_by_its_entry_point_and_brings_nothing(tmp_path: Path) -> None:
    """No other plugin is there, every warning is an error; before a fixture, nothing is imported.

    Else a coverage tool would miss what the plugin had imported, and gevent could not patch ssl.
    """
    heavy = ["flask", "werkzeug", "requests", "urllib3", "gevent", "ssl", "http.client"]
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "test_shop.py").write_text(
        "import sys\n"
        "ours = {name for name in sys.modules if name.partition('.')[0] == 'chatstream'}\n"
        "assert ours == {'chatstream', 'chatstream.testing'}, ours\n"
        f"assert not set({heavy}) & set(sys.modules)\n{FIVE_LINES}"
    )
    command = [sys.executable, "-X", "dev", "-m", "pytest", "-p", "chatstream", *STRICT]
    environ = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
    assert run.stderr == ""


def test_the_five_lines(pytester: pytest.Pytester, nothing_left: None) -> None:
    """An app that was made at import time, with settings of its own."""
    pytester.makepyfile(shop=APP, test_shop=FIVE_LINES)
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(passed=1)


def test_an_app_that_does_not_stop_fails_the_test(pytester: pytest.Pytester) -> None:
    """It is what all this is for: the failure shows the test's line, and the provider's figures."""
    pytester.makepyfile(
        shop=APP,
        test_shop=f"""
{FIVE_LINES.replace("told(answer)", "told(answer, timeout=0.2)")}
import pytest
from chatstream import Stream

@pytest.fixture(autouse=True)
def broken(chatstream_live, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "abort", lambda self, cause: False)
        yield
""",
    )
    result = pytester.runpytest_inprocess(*STRICT)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines(
        [
            r">\s+assert chatstream_provider\.told",
            r"E\s+AssertionError: Not 'closed' within 0\.2 s: request '\w+' is still open: ",
        ]
    )
    assert "provider.py" not in result.stdout.str()  # that is not where to look


def test_without_the_plugin(pytester: pytest.Pytester) -> None:
    """`-p no:chatstream` takes the fixtures away, and nothing else."""
    pytester.makepyfile("def test_one(): pass\ndef test_two(chatstream_provider): pass")
    result = pytester.runpytest_inprocess("-p", "no:chatstream", *STRICT)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'chatstream_provider' not found"])


def test_the_fixtures_say_what_they_are_for(pytester: pytest.Pytester) -> None:
    """In `pytest --fixtures`."""
    result = pytester.runpytest_inprocess("--fixtures", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines_random(
        [
            "chatstream_provider -- *",
            "    A provider on a socket of this machine, which does what the test's script says.",
            "chatstream_live -- *",
        ]
    )


def test_the_environment_is_the_tests_own(pytester: pytest.Pytester) -> None:
    """An app of the test finds the provider; after the test the variables are as they were."""
    pytester.makepyfile(
        """
        import os
        KEYS = ["CHATSTREAM_UPSTREAM_URL", "CHATSTREAM_API_KEY", "no_proxy", "NO_PROXY"]
        before = {key: os.environ.get(key) for key in KEYS}

        def test_one(chatstream_provider):
            assert os.environ["CHATSTREAM_UPSTREAM_URL"] == chatstream_provider.url
            assert os.environ["CHATSTREAM_API_KEY"] == chatstream_provider.key
            assert "127.0.0.1" in os.environ["no_proxy"]

        def test_two():
            assert before == {key: os.environ.get(key) for key in KEYS}
        """
    )
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(passed=2)


def test_a_test_ends_when_its_threads_have(pytester: pytest.Pytester) -> None:
    """A leak check of the project's own finds none of chatstream's in the next test."""
    pytester.makepyfile(
        """
        import threading, time

        before = set(threading.enumerate())  # of the project's other tests

        def test_one(chatstream_provider):
            slow = threading.Thread(target=time.sleep, args=(0.3,), name="chatstream-slow")
            slow.start()

        def test_two():
            left = set(threading.enumerate()) - before
            assert [t.name for t in left if "chatstream-" in t.name] == []
        """
    )
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(passed=2)


def test_a_test_that_fails_leaves_nothing(pytester: pytest.Pytester, nothing_left: None) -> None:
    """With answers open, visitors reading and a client of its own."""
    pytester.makepyfile(
        shop=APP,
        test_shop="""
        from shop import app

        def test_one(chatstream_live):
            live = chatstream_live(app)
            live.ask("?", wait=False, script={"headers_after": 60})
            live.browser().ask("?").wait(2)
            app.test_client().post("/api/chat/stream", json={"messages": [{"role": "user"}]})
            assert False
        """,
    )
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(failed=1)


# The example


def test_the_example_passes(pytester: pytest.Pytester, nothing_left: None) -> None:
    """As its reader would run it."""
    pytester.copy_example(str(EXAMPLE))
    result = pytester.runpytest_inprocess(*STRICT)
    result.assert_outcomes(passed=(EXAMPLE / "test_app.py").read_text().count("\ndef test_"))


@pytest.mark.parametrize("name", ["app.py", "test_app.py"])
def test_the_page_shows_the_example(name: str) -> None:
    """docs/testing.md has the files as they are run."""
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert (EXAMPLE / name).read_text() in blocks
