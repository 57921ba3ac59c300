"""python -m memdfa_lab: the same as the command memdfa, for example under torchrun."""

import sys

from memdfa_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
