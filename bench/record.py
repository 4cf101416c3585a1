"""What a run's figures were measured with, and the file they are kept in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.processes import ROOT, raise_file_limit
from bench.systems import LITELLM, PEERS

READING = """
All systems stand before the same simulator, one after the other, under the same load, on one
machine, with one worker unless it says otherwise. Compare within a run only.

Stops run from just before the client's close or cancel to the provider's stamp, on one clock. The
stamp waits until the provider's process gets a core, so on a busy machine it may be later than the
cancel's 200 though the shutdown was before it; "direct" shows the stamp's own delay. What is not
stopped within 2 s was not stopped. Tokens are counted up to the stamp.

An event's latency runs from the provider's send to the load client's receive. What a system adds is
the difference to the same load without a system, percentile by percentile. CPU is that of all
processes of a system, memory their proportional set size; kernel buffers are in neither.
"""
_PACKAGES = (
    "flask",
    "requests",
    "urllib3",
    "gunicorn",
    "gevent",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
)
_MODULES = ("ai", "@ai-sdk/openai-compatible")


def conditions(busy: list[float]) -> str:
    """Date, command, machine, code and versions, as a list."""
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    cores = len(os.sched_getaffinity(0))
    code = _said(["git", "describe", "--always", "--dirty"])
    machine = f"{model or platform.machine()}, {cores} cores, Linux {platform.release()}"
    facts = {
        "Date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "Command": " ".join(["python -m bench", *without_paths(sys.argv[1:])]),
        "Machine": f"{machine}, {raise_file_limit():,} descriptors",
        "Load average": f"{busy[0]:.1f} before, {busy[1]:.1f} after (the benchmark's own included)",
        "Code": f"{code or 'unknown'}, as it was at the end",
        "Versions": ", ".join(versions()),
    }
    return "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


def without_paths(typed: list[str]) -> list[str]:
    """The command line as it can be typed anywhere."""
    kept = [word for word in typed if "/" not in word and word not in ("--out", "--charts")]
    return [f'"{word}"' if " " in word else word for word in kept]


def versions() -> Iterable[str]:
    """What is installed of what is compared."""
    yield f"Python {platform.python_version()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    if shutil.which("node"):
        yield f"Node {_said(['node', '--version']).lstrip('v')}"
    for name in _MODULES:
        package = PEERS / "vercel" / "node_modules" / name / "package.json"
        if package.exists():
            yield f"{name} {json.loads(package.read_text())['version']}"
    if shutil.which("nginx"):
        yield _said(["nginx", "-v"]).partition("nginx version: ")[2].replace("/", " ")
    for found in LITELLM.parent.parent.glob("lib/python*/site-packages/litellm-*.dist-info"):
        yield found.name.removesuffix(".dist-info").replace("-", " ")


def _said(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
