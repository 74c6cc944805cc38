"""`duomo serve`: the flags are the server's own (`duomo.serve.options`), read there."""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    from duomo.serve.run import serve

    return serve(arguments)
