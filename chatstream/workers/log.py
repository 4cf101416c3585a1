"""gunicorn's own log, one JSON object a line. For `logger_class`."""

from __future__ import annotations

from typing import Any

from gunicorn import glogging

from chatstream.telemetry.log_format import json_formatter, take_over, write_past


class JsonLogger(glogging.Logger):  # type: ignore[misc]
    """As gunicorn's, wherever it writes to: its messages, and the access log if there is one."""

    def setup(self, cfg: Any) -> None:
        """Called by gunicorn, again at each reload."""
        super().setup(cfg)
        take_over()  # gunicorn prints some of its errors as well
        formatter = json_formatter()
        for log in (self.error_log, self.access_log):
            for handler in log.handlers:
                write_past(handler)
                handler.setFormatter(formatter)
