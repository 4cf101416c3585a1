"""What README promises of `make demo`."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys

from tests.conftest import eventually, require
from tests.integration.processes import ROOT


def test_what_the_demo_prints() -> None:
    """The page; then stream, stop, and see that the provider stopped: as printed, with curl."""
    require("curl")
    demo = subprocess.Popen(
        [sys.executable, "examples/demo.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert demo.stdout is not None
    try:
        lines = [demo.stdout.readline() for _ in range(19)]
        (page,) = [line.split()[1] for line in lines if line.strip().startswith("open ")]
        html = subprocess.run(["curl", "-s", page], capture_output=True, check=True).stdout
        assert b'data-meter="on"' in html
        stream, stop, see = [shlex.split(x) for x in lines if x.strip().startswith("curl")]
        with subprocess.Popen([*stream, "-s"], stdout=subprocess.PIPE, text=True) as streaming:
            assert streaming.stdout is not None
            assert streaming.stdout.readline().startswith("data: ")
            answer = subprocess.run([*stop, "-s"], capture_output=True, timeout=20, check=True)
            assert json.loads(answer.stdout) == {"ok": True, "cancelled": True}
            assert "[DONE]" not in streaming.stdout.read()
            assert streaming.wait(20) == 0
        figure = json.loads(subprocess.run([*see, "-s"], capture_output=True, check=True).stdout)
        assert figure["closed_by"] == "client"
        assert figure["generated"] < 2000
        with subprocess.Popen([*stream, "-s"], stdout=subprocess.PIPE, text=True) as streaming:
            assert streaming.stdout is not None
            assert streaming.stdout.readline().startswith("data: ")
            demo.send_signal(signal.SIGINT)
            streaming.terminate()
        log = eventually(demo.stdout.read)
        assert re.search(r"\[SSE\] demo aborted by client/cancel cause=cancel", log)
        assert "simulator" not in log
        # What lives when the demo is ended has its line, too.
        assert re.search(r"\[SSE\] demo aborted by (client/cancel cause=client|shutdown)", log)
        assert demo.wait(40) == 0
    finally:
        demo.kill()
        demo.wait()
        demo.stdout.close()


def test_run_without_a_key_says_what_to_set() -> None:
    """`make run` in one sentence, and no server."""
    require("make")
    command = ["make", "run", "--assume-old", ".venv/.run"]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"}
    )
    assert run.returncode != 0
    assert "Set DEEPSEEK_API_KEY to your DeepSeek key" in run.stderr
