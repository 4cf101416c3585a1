"""`python -m chatstream`: the commands, for the standalone service. It reads the environment."""

from __future__ import annotations

from chatstream.cli import main
from chatstream.web.standalone import create_app

if __name__ == "__main__":
    main(create_app)
