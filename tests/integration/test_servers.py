"""Other servers, foreign configurations, and what start-up says."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.integration.client import Client
from tests.integration.conftest import Certificate, Rig, serving
from tests.integration.processes import FOREIGN, OURS, Provider, fails_to_start

FAR = "3600"  # pings that cannot be what notices


def silent(rig: Rig, session: str) -> Client:
    client = rig.client()
    client.post(session, simulate={"id": session, "silent_after": 2, "rate": 100})
    client.until(b'"content"')
    rig.provider.request(session, "delivered", count=2)
    return client


def assert_whole_answers(rig: Rig) -> None:
    client = rig.client().post("whole", simulate={"tokens": 3, "rate": 100})
    client.until(b"data: [DONE]")
    client.close()
    assert "completed" in rig.server.ending_of("whole")


def assert_a_close_stops(rig: Rig) -> None:
    client = silent(rig, "closed")
    client.close()
    assert rig.provider.request("closed", "closed")["closed_by"] == "client"
    assert "cause=client" in rig.server.ending_of("closed")
    assert "Traceback" not in rig.server.log()


def assert_a_cancel_stops(rig: Rig) -> None:
    silent(rig, "cancelled")
    assert rig.server.cancel("cancelled")[0] == 200
    assert rig.provider.request("cancelled", "closed")["closed_by"] == "client"
    assert "cause=cancel" in rig.server.ending_of("cancelled")


@pytest.mark.parametrize("scene", ["headers", "silent"])
def test_a_middleware_that_hides_the_socket(log_file: Path, provider: Provider, scene: str) -> None:
    """Case 18: the pings still find out, also before the provider's headers."""
    clocks = {"CHATSTREAM_PING_INTERVAL": "0.2"}
    with serving(log_file, provider, app="tests.integration.app:hidden", **clocks) as rig:
        if scene == "silent":
            assert_a_close_stops(rig)
        else:
            client = rig.client().post("early", simulate={"id": "early", "headers_after": 60})
            rig.provider.request("early")
            client.close()
            assert rig.provider.request("early", "closed")["closed_by"] == "client"


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_preload_app(log_file: Path, certificate: Certificate, worker_class: str) -> None:
    """Case 36: the app is imported before the fork; threads and connections come after it.

    gevent patches ssl after that; a provider behind TLS is called all the same.
    """
    options = ["--worker-class", worker_class, "--threads", "8", "--preload"]
    environ = {"CHATSTREAM_PING_INTERVAL": FAR, "REQUESTS_CA_BUNDLE": certificate.authority}
    with (
        contextlib.closing(Provider(certfile=certificate.cert)) as provider,
        serving(log_file, provider, *options, command=FOREIGN, **environ) as rig,
    ):
        assert_whole_answers(rig)
        assert_a_close_stops(rig)
        assert_a_cancel_stops(rig)
        assert len(list(Path(f"/proc/{rig.server.pid}/task").iterdir())) == 1


def test_slots_follow_the_command_line(log_file: Path, provider: Provider) -> None:
    """--threads overrides gunicorn.conf.py, and some of those threads stay free for cancels.

    With CHATSTREAM_DETACH=0: a stream has a thread then, and no line says so.
    """
    options, walked = ["--threads", "8"], {"CHATSTREAM_DETACH": "0"}
    with serving(log_file, provider, *options, app="wsgi:app", **walked) as rig:
        for number in range(4):
            silent(rig, f"slot-{number}")
        assert rig.client().post("slot-5").head()[0] == 503
        assert rig.server.cancel("slot-1")[0] == 200
        assert "middleware" not in rig.server.log()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("CHATSTREAM_PING_INTERVAL", "soon", "CHATSTREAM_PING_INTERVAL must be a number"),
        ("CHATSTREAM_UPSTREAM_URL", "api.deepseek.com", "CHATSTREAM_UPSTREAM_URL must be an http"),
        ("CHATSTREAM_WORKER_CLASS", "sync", "CHATSTREAM_WORKER_CLASS must be gthread or gevent"),
        ("CHATSTREAM_THREADS", "4", "CHATSTREAM_THREADS must be at least 5"),
    ],
)
def test_a_wrong_setting_stops_start_up(
    log_file: Path, key: str, value: str, sentence: str
) -> None:
    """With a sentence that names the key, and no traceback."""
    log = fails_to_start(log_file, **{key: value})
    assert sentence in log
    assert "Traceback" not in log


WITHOUT = """
import runpy, sys

sys.modules["{module}"] = None
runpy.run_module("gunicorn", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["gevent", "packaging"])
def test_gevent_without_its_extra_stops_start_up(
    tmp_path: Path, log_file: Path, module: str
) -> None:
    """gunicorn would show a traceback of its search for the class."""
    gunicorn = tmp_path / "gunicorn_without.py"
    gunicorn.write_text(WITHOUT.format(module=module))
    command = [str(gunicorn), *OURS[1:]]
    log = fails_to_start(log_file, command=command, CHATSTREAM_WORKER_CLASS="gevent")
    assert f"needs {module}: pip install 'chatstream[gevent]'" in log
    assert "Traceback" not in log


FEW = """
import resource, runpy

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
runpy.run_module("gunicorn", run_name="__main__")
"""


def test_more_streams_than_descriptors_stop_start_up(tmp_path: Path, log_file: Path) -> None:
    """With a sentence that says how many there may be, and what to raise; and no traceback."""
    gunicorn = tmp_path / "gunicorn_with_few_descriptors.py"
    gunicorn.write_text(FEW)
    command = [str(gunicorn), *OURS[1:]]
    log = fails_to_start(log_file, command=command, CHATSTREAM_MAX_STREAMS="200")
    assert "CHATSTREAM_MAX_STREAMS=200 needs 1256 descriptors" in log
    assert "may have 1024 here. Set it to at most 153, or raise the limit: ulimit -n" in log
    assert "Traceback" not in log


def test_there_are_as_many_workers_as_cores(log_file: Path, provider: Provider) -> None:
    """Without WEB_CONCURRENCY. Since a stop crosses workers, there is nothing to warn of."""
    with serving(log_file, provider, WEB_CONCURRENCY=None) as rig:
        assert len(rig.server.workers) == len(os.sched_getaffinity(0))
        assert_whole_answers(rig)
        assert "a cancel stops a stream only if" not in rig.server.log()


def test_workers_without_a_bus_are_warned_of(log_file: Path, provider: Provider) -> None:
    """CHATSTREAM_BUS=local is for one worker; each of more says so, at its first stream."""
    warning = "More than one worker, and the bus is local"
    with serving(log_file, provider, WEB_CONCURRENCY="2", CHATSTREAM_BUS="local") as rig:
        assert warning not in rig.server.log()
        for _ in range(2):
            client = rig.client().post("whole", simulate={"tokens": 1, "rate": 1000})
            client.head()
            client.body()
        workers = {line for line in rig.server.log().splitlines() if warning in line}
        assert len(workers) == rig.server.log().count(warning) in (1, 2)


def test_a_killed_worker_closes_its_connections(log_file: Path, provider: Provider) -> None:
    """What cannot clean up is cleaned up by the kernel: the provider sees the close."""
    with serving(log_file, provider) as rig:
        silent(rig, "killed")
        os.kill(rig.server.worker, signal.SIGKILL)
        assert rig.provider.request("killed", "closed")["closed_by"] in ("client", "reset")
        eventually(lambda: rig.server._answers(), "a new worker")


@pytest.mark.parametrize("asked", [False, True])
def test_gunicorns_control_socket(
    log_file: Path, provider: Provider, short_base: Path, asked: bool
) -> None:
    """There is none, which another service of the same user would take over; or where one says."""
    place = short_base / "control"
    environ = {"HOME": str(short_base), "XDG_RUNTIME_DIR": None}
    if asked:
        environ["CHATSTREAM_CONTROL_SOCKET"] = str(place)
    command = [word for word in OURS if word != "--no-control-socket"]
    with serving(log_file, provider, command=command, app="wsgi:app", **environ) as rig:
        if asked:
            eventually(place.is_socket, "the socket")
        assert_a_cancel_stops(rig)
    assert list(short_base.glob("**/*.ctl")) == []
    assert ("Control socket listening" in log_file.read_text()) == asked
