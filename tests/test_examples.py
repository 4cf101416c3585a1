"""examples: their own tests pass, and they are run as their READMEs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# An inner session forgets what it has imported: the next one would have two of each of these.
from chatstream import Service  # noqa: F401
from chatstream.testing import live  # noqa: F401
from chatstream.upstream import provider  # noqa: F401

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("login", "conversations")


@pytest.mark.timeout(180)  # dozens of tests in one
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes(name: str, pytester: pytest.Pytester, nothing_left: None) -> None:
    """As its reader would run it, with every warning an error."""
    pytester.copy_example(str(ROOT / "examples" / name))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-W", "error")
    outcomes = result.parseoutcomes()
    assert set(outcomes) == {"passed"}, outcomes
    tests = (ROOT / "examples" / name / "test_app.py").read_text().count("\ndef test_")
    assert outcomes["passed"] >= tests > 10


def test_every_example_is_here() -> None:
    """One that nobody runs would rot. `testing` is run by the tests of the plugin."""
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/app.py")}
    assert folders == {*EXAMPLES, "testing"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_packages_a_readme_names_are_those_it_takes(name: str) -> None:
    """What the app imports is what `pip install` brings."""
    readme = (ROOT / "examples" / name / "README.md").read_text()
    (line,) = re.findall(r"^\$ pip install (.+)$", readme, re.MULTILINE)
    named = set(line.replace("'chatstream[gunicorn]'", "").split())
    source = "".join(path.read_text() for path in (ROOT / "examples" / name).glob("*.py"))
    imported = set(re.findall(r"^from (flask_\w+)", source, re.MULTILINE))
    assert {package.replace("_", "-") for package in imported} == named
