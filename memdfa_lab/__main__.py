"""python -m memdfa_lab: the command line, as torchrun starts it."""

import sys

from memdfa_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
