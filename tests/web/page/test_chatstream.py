"""chatstream.js: its own tests in Node, and its types."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import NODE_MODULES, require, require_package

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "chatstream" / "web" / "page"
SUITES = sorted(path.name for path in HERE.glob("*.test.mjs"))

TSC = [
    NODE_MODULES / ".bin" / "tsc",
    *("--noEmit", "--strict", "--allowJs", "--checkJs"),
    *("--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"),
    *("--lib", "es2022,dom,dom.iterable,dom.asynciterable"),
]


def test_the_suites_are_found() -> None:
    """A glob that finds nothing would pass."""
    assert SUITES == ["failures.test.mjs", "parser.test.mjs", "stop.test.mjs", "stream.test.mjs"]


@pytest.mark.parametrize("suite", SUITES)
def test_the_module_in_node(suite: str) -> None:
    """Node's own runner passes each of these; its report tells what did not."""
    require("node")
    run = subprocess.run(
        ["node", "--test", "--test-reporter=tap", str(HERE / suite)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    counts = dict(re.findall(r"^# (pass|fail|cancelled|skipped|todo) (\d+)$", run.stdout, re.M))
    passed = int(counts.pop("pass", 0))
    assert run.returncode == 0, run.stdout + run.stderr
    assert passed > 20, run.stdout
    assert set(counts.values()) == {"0"}, run.stdout


def test_the_types(tmp_path: Path) -> None:
    """The declarations hold for a user's code, and say of the module what its code says."""
    require_package("typescript")
    module, types = tmp_path / "chatstream/web/page", tmp_path / "tests/web/page/types.ts"
    module.mkdir(parents=True)
    types.parent.mkdir(parents=True)
    shutil.copy(PAGE / "chatstream.js", module)
    shutil.copy(PAGE / "chatstream.d.ts", module)
    # Under another name, since the compiler reads no code that has declarations beside it.
    shutil.copy(PAGE / "chatstream.js", module / "written.js")
    shutil.copy(HERE / "types.ts", types)
    run = subprocess.run([*TSC, types], capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stdout
