"""What is looked at before the first worker is made."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from chatstream.workers import slots

OLDEST_GUNICORN = 27
"""The first one whose workers are made as ours expect."""


def check_gunicorn() -> None:
    """Looks, before the first worker is made, whether our workers know this gunicorn.

    Raises:
        SystemExit: They do not; the message says what to do.
    """
    if int(version("gunicorn").partition(".")[0]) < OLDEST_GUNICORN:
        raise SystemExit(
            f"chatstream.workers need gunicorn {OLDEST_GUNICORN} or newer, and this is"
            f" {version('gunicorn')}: pip install --upgrade gunicorn."
            " Or take a worker of gunicorn's own: --worker-class gthread, or gevent."
        )


def check_descriptors() -> None:
    """Looks, before the first worker is made, whether there are enough for CHATSTREAM_MAX_STREAMS.

    Raises:
        SystemExit: There are not; the message says what to do.
    """
    wanted = os.environ.get("CHATSTREAM_MAX_STREAMS", "")
    # What is no number is for the app to refuse.
    if wanted.isdecimal() and (sentence := slots.too_many(int(wanted))):
        raise SystemExit(sentence)


def supported(cfg: Any) -> bool:
    """Whether a worker of ours knows the protocols of this configuration.

    HTTP/2, uWSGI's and PROXY's are left to gunicorn, with its own limits.
    """
    protocols = str(getattr(cfg, "http_protocols", ""))
    return cfg.protocol == "http" and "h2" not in protocols and cfg.proxy_protocol in (False, "off")
