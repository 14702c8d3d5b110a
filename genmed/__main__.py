"""`python -m genmed`: the command line."""

from genmed.cli import main

main()
