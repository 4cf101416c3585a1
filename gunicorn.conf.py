"""Server settings and hooks. CHATSTREAM_* is read from the environment; see docs/settings.md.

No app is imported here: this file is read before gevent patches the standard library.
"""

import json
import os
import resource
import sys
from importlib.util import find_spec

_json = os.environ.get("CHATSTREAM_LOG_FORMAT") == "json"


def _refuse(sentence):
    """Ends gunicorn before it begins."""
    line = json.dumps({"level": "CRITICAL", "message": sentence}) if _json else sentence
    print(line, file=sys.stderr)
    raise SystemExit(1)


def _count(key, default):
    text = os.environ.get(key) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        _refuse(f"{key} must be a whole number of at least 1, not {text!r}.")
    return int(text)


bind = os.environ.get("CHATSTREAM_BIND") or "127.0.0.1:8000"
_workers = {
    "gthread": "chatstream.workers.gthread.ThreadWorker",
    "gevent": "chatstream.workers.gevent.GeventWorker",
}
_worker = os.environ.get("CHATSTREAM_WORKER_CLASS") or "gthread"
if _worker not in _workers:
    _refuse(f"CHATSTREAM_WORKER_CLASS must be gthread or gevent, not {_worker!r}.")
for _module in {"gevent": ("gevent", "packaging")}.get(_worker, ()):  # gunicorn wants both
    if find_spec(_module) is None:
        _refuse(f"CHATSTREAM_WORKER_CLASS=gevent needs {_module}: pip install 'chatstream[gevent]'")
worker_class = _workers[_worker]
workers = _count("WEB_CONCURRENCY", len(os.sched_getaffinity(0)))
threads = _count("CHATSTREAM_THREADS", 16)
if threads < 5 and _worker == "gthread":
    _refuse("CHATSTREAM_THREADS must be at least 5: four stay free for cancels.")
keepalive = 5  # that it is not 0 counts: CHATSTREAM_KEEPALIVE_TIMEOUT says how long
graceful_timeout = 30
# gunicorn 25.1 and newer. Where it would be by itself, a user's second service takes it over.
_control_socket = os.environ.get("CHATSTREAM_CONTROL_SOCKET")
control_socket_disable = not _control_socket
if _control_socket:
    control_socket = _control_socket
forwarder_headers = ""  # else a client of a proxy on this host could send SCRIPT_NAME and PATH_INFO

# A stream takes four descriptors, five while its provider is being called.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))

# On gthread the loop moves streams, without threads: 10,000 of them, if there are descriptors. A
# greenlet costs more.
_most = {"gthread": min(10_000, _hard // 5), "gevent": 0}[_worker]
worker_connections = 1000 + _count("CHATSTREAM_MAX_STREAMS", max(1, _most))


if _json:
    if find_spec("pythonjsonlogger") is None:
        _refuse(
            "CHATSTREAM_LOG_FORMAT=json needs python-json-logger: pip install 'chatstream[json]'"
        )
    logger_class = "chatstream.workers.log.JsonLogger"
    access_log_format = "%(m)s %(U)s %(s)s"  # else a query, a referer would be in the message

if os.environ.get("CHATSTREAM_METRICS", "").strip().lower() not in ("", "off", "0"):
    from chatstream.workers import child_exit, on_exit, on_starting, share  # noqa: F401

    share()  # before an app is there, and whatever it counts


def when_ready(server):
    """Says what would surprise later."""
    if "h2" in str(getattr(server.cfg, "http_protocols", "")):  # gunicorn 24 and newer
        server.log.warning(
            "h2 in http_protocols: gunicorn serves an HTTP/2 connection's requests one after the "
            "other, so a browser's cancel waits behind its stream. Terminate HTTP/2 in nginx."
        )
