"""`python -m chatstream.simulator`."""

from __future__ import annotations

import sys

from chatstream.simulator.command import main

if __name__ == "__main__":
    sys.exit(main())
