"""`python -m duomo.cli` is the `duomo` command where nothing is installed."""

from duomo.cli import main

main()
