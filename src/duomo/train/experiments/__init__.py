"""Proofs of the kit that need minutes: each a command that prints a figure and writes it as JSON."""
