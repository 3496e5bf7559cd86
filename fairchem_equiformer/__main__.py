"""`python -m fairchem_equiformer` is the `fairchem` command."""

import sys

from fairchem_equiformer.fairchem1.cli import main

if __name__ == "__main__":
    sys.exit(main())
