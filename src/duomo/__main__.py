"""`python -m duomo` is the `duomo` command where nothing is installed."""

from duomo.cli import main

main()
