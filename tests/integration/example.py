"""An example's app for gunicorn, which finds it by --pythonpath: each response names its worker."""

from __future__ import annotations

import logging
import os

from app import create_app
from flask import Response

logging.basicConfig(level=logging.INFO, format="%(levelname)s [%(process)d] %(message)s")
app = create_app()


@app.after_request
def name_the_worker(response: Response) -> Response:
    response.headers["X-Worker"] = str(os.getpid())
    return response
