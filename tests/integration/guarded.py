"""An app of somebody's whose POSTs Flask-WTF guards, all of them, with the page in it."""

from __future__ import annotations

import logging

from flask import Flask
from flask_wtf import CSRFProtect

from chatstream import ChatStream

logging.basicConfig(level=logging.INFO, format="%(levelname)s [%(process)d] %(message)s")
app = Flask(__name__)
app.config.from_mapping(SECRET_KEY="of the tests", CHATSTREAM_PAGE="/talk/to/it")
CSRFProtect(app)
ChatStream(app)
