"""What doctor says of the server: gunicorn's configuration as gunicorn reads it, and the kernel."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import os
import resource
import select
import shlex
import socket
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from chatstream.cli.doctor.check import Check, State
from chatstream.settings.table import Settings
from chatstream.workers import slots
from chatstream.workers.draining import GRACE

_OURS = {
    "chatstream.workers.gthread.ThreadWorker": "gthread",
    "chatstream.workers.gevent.GeventWorker": "gevent",
}

_THEIRS = {
    "gthread": "gthread",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gevent": "gevent",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
}

_BYTES_ACKED = 128
"""Bytes of struct tcp_info up to tcpi_bytes_acked and itself (linux/tcp.h, since Linux 4.1)."""


class Gunicorn(NamedTuple):
    """A configuration, read.

    Attributes:
        worker: gthread or gevent; else the class's name.
        ours: Whether the worker is one of `chatstream.workers`.
        workers: How many.
        threads: Of a worker.
        connections: Of a worker.
        graceful: Seconds.
        preload: Whether the app is loaded in the master.
        h2: Whether HTTP/2 is served.
        descriptors: What a process of it may have.
        hosts: Those that it listens on; none of a Unix socket's.
        tls: Whether it speaks TLS.
    """

    worker: str
    ours: bool
    workers: int
    threads: int
    connections: int
    graceful: float
    preload: bool
    h2: bool
    descriptors: int
    hosts: tuple[str, ...] = ()
    tls: bool = False


def read_gunicorn(arguments: str) -> Gunicorn | Check:
    """gunicorn's configuration, from `arguments`, GUNICORN_CMD_ARGS and its file.

    The file is executed, as gunicorn does it.

    Args:
        arguments: gunicorn's, as a shell has them.
    """
    try:
        from gunicorn.app.base import Application
        from gunicorn.config import get_default_config_file
    except ImportError:
        return Check(
            "gunicorn", State.NOTE, "Not installed: which server this app has cannot be looked at."
        )
    if not (arguments or os.environ.get("GUNICORN_CMD_ARGS") or get_default_config_file()):
        return Check(
            "gunicorn",
            State.NOTE,
            "No gunicorn.conf.py here and no GUNICORN_CMD_ARGS: to have it looked at, say how it is"
            " started: --gunicorn '--worker-class … --threads …'",
        )

    class Configured(Application):  # type: ignore[misc] # gunicorn has no types
        def init(self, parser: Any, opts: Any, args: Any) -> None:
            """It starts from here; gunicorn itself takes the place where it was imported."""
            self.cfg.set("chdir", os.getcwd())

    said = io.StringIO()
    with _as_gunicorn(arguments), contextlib.redirect_stderr(said):
        try:
            cfg = Configured(prog="gunicorn").cfg
            return _facts(cfg)
        except (SystemExit, ValueError, AttributeError) as error:
            lines = said.getvalue().strip().splitlines() or [str(error)]
            return Check("gunicorn", State.FAIL, f"Its configuration fails: {lines[-1]}")


@contextlib.contextmanager
def _as_gunicorn(arguments: str) -> Iterator[None]:
    """With gunicorn's command line; what its file changes of this process is put back."""
    argv, cwd, limit = sys.argv, os.getcwd(), resource.getrlimit(resource.RLIMIT_NOFILE)
    sys.argv = ["gunicorn", *shlex.split(arguments)]
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(cwd)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[0], hard))


def _facts(cfg: Any) -> Gunicorn:
    name = cfg.worker_class_str
    if not isinstance(cfg.settings["worker_class"].get(), str):  # the class itself was given
        given = cfg.settings["worker_class"].get()
        name = f"{given.__module__}.{given.__qualname__}"
    return Gunicorn(
        worker=_OURS.get(name) or _THEIRS.get(name) or name,
        ours=name in _OURS,
        workers=cfg.workers,
        threads=cfg.threads,
        connections=cfg.worker_connections,
        graceful=cfg.graceful_timeout,
        preload=cfg.preload_app,
        h2="h2" in str(getattr(cfg, "http_protocols", "")),
        descriptors=slots.limit(),
        hosts=tuple(address[0] for address in cfg.address if isinstance(address, tuple)),
        tls=bool(cfg.is_ssl),
    )


def check_gunicorn(gunicorn: Gunicorn, settings: Settings) -> Iterator[Check]:
    """The worker and its numbers."""
    yield (worker := _check_worker(gunicorn))
    if worker.state is State.FAIL:
        return
    yield _check_slots(gunicorn, settings)
    if settings.drain > gunicorn.graceful - GRACE:
        yield Check(
            "drain",
            State.WARN,
            f"graceful_timeout is {gunicorn.graceful:.0f} s, so streams are drained for"
            f" {max(0.0, gunicorn.graceful - GRACE):.0f} s, not for CHATSTREAM_DRAIN="
            f"{settings.drain:.0f}. Set graceful_timeout to {settings.drain + GRACE:.0f} at least.",
        )
    else:
        yield Check("drain", State.OK, f"Streams may go on for {settings.drain:.0f} s in a deploy.")
    if gunicorn.preload and not gunicorn.ours:
        yield Check(
            "preload_app",
            State.WARN,
            "With gunicorn's own worker a preloaded app is not told that its worker ends. Add to"
            " the configuration: from chatstream.workers.draining import post_worker_init",
        )
    if gunicorn.h2:
        yield Check(
            "http2",
            State.WARN,
            "gunicorn serves an HTTP/2 connection's requests one after the other, so a cancel waits"
            " behind its stream. Terminate HTTP/2 in nginx.",
        )


def check_reach(gunicorn: Gunicorn, settings: Settings, *, identifies: bool) -> Iterator[Check]:
    """Who can reach it, where that matters: a service that asks nobody, or for tokens.

    Args:
        gunicorn: The configuration.
        settings: The app's.
        identifies: Whether it is asked who calls.
    """
    seen = ", ".join(host or "every address" for host in gunicorn.hosts if not _loopback(host))
    if seen and not identifies:
        yield Check(
            "bind",
            State.WARN,
            f"It listens on {seen} and asks nobody who they are: whoever reaches it can ask, at"
            " your provider's cost. Set CHATSTREAM_TOKENS, or CHATSTREAM_BIND=127.0.0.1:8000 and a"
            " proxy with a login in front.",
        )
    elif seen and (settings.tokens or settings.admin_tokens) and not gunicorn.tls:
        yield Check(
            "bind",
            State.NOTE,
            f"It listens on {seen} without TLS: tokens can be read on the way, unless a proxy in"
            " front speaks it. Or give gunicorn --certfile and --keyfile.",
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_worker(gunicorn: Gunicorn) -> Check:
    ours = "chatstream.workers.gthread.ThreadWorker"
    many = f"{gunicorn.workers} of {gunicorn.worker}"
    if gunicorn.worker == "sync":
        return Check(
            "worker",
            State.FAIL,
            "The sync worker serves one stream at a time, no cancel can reach it meanwhile, and"
            f" gunicorn kills it after `timeout`. Use --worker-class {ours} --threads 16.",
        )
    if gunicorn.worker not in _OURS.values():
        return Check(
            "worker",
            State.WARN,
            f"{many}: not one that chatstream is tested with. Use --worker-class {ours}.",
        )
    if not gunicorn.ours:
        return Check(
            "worker",
            State.WARN,
            f"{many}, gunicorn's own: each stream keeps a thread, and slow clients can hold the"
            f" threads that a cancel needs. Use chatstream.workers.{gunicorn.worker}.",
        )
    if gunicorn.worker == "gthread" and gunicorn.threads < 5:
        return Check(
            "worker",
            State.WARN,
            f"{many} of {gunicorn.threads} threads: four are for cancels, so use at least 5.",
        )
    threads = f" of {gunicorn.threads} threads" if gunicorn.worker == "gthread" else ""
    return Check("worker", State.OK, f"{many}{threads}, ours.")


def _check_slots(gunicorn: Gunicorn, settings: Settings) -> Check:
    found = slots.of_server(
        gunicorn.threads,
        gunicorn.connections,
        greenlets=gunicorn.worker == "gevent",
        detaches=settings.detach and gunicorn.ours,
        wanted=settings.max_streams,
        descriptors=gunicorn.descriptors,
    )
    enough = slots.of_descriptors(gunicorn.descriptors)
    says = (
        f"{found.all} streams a worker; {gunicorn.descriptors} descriptors are enough for {enough}."
    )
    if found.all > enough:
        return Check(
            "slots",
            State.WARN,
            f"{says} Set CHATSTREAM_MAX_STREAMS={enough}, or raise the limit: ulimit -n,"
            " LimitNOFILE= in systemd, --ulimit nofile= in Docker.",
        )
    return Check("slots", State.OK, says)


def check_kernel() -> Check:
    """What a stop and the looks at clients are built on."""
    missing = [name for name in ("eventfd",) if not hasattr(os, name)]
    missing += [name for name in ("EPOLLRDHUP",) if not hasattr(select, name)]
    with socket.socket() as sock:
        if len(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)) < _BYTES_ACKED:
            missing.append("TCP_INFO with bytes_acked (Linux 4.1)")
    if missing or sys.platform != "linux":
        return Check("kernel", State.FAIL, f"Linux is needed; missing: {', '.join(missing)}.")
    return Check("kernel", State.OK, f"{os.uname().sysname} {os.uname().release}.")
