"""`python -m mra` is the console script `mra`."""

from mra.cli import main


main()
