"""`python -m latentgen` is the command line."""

from latentgen.cli import main

main()
