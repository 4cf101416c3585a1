"""`python -m chatstream.simulator`."""

import sys

from chatstream.simulator.command import main

if __name__ == "__main__":
    sys.exit(main())
