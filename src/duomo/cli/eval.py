"""`duomo eval`: a checkpoint on the frozen held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def eval(
    model: Annotated[
        Path | None, typer.Argument(help="folder of a checkpoint; the embedded model if none")
    ] = None,
    cache: Annotated[Path, typer.Option(help="where fetched packages lie")] = Path("runs/cache"),
    json: Annotated[Path | None, typer.Option(help="also write the result here")] = None,
    read: Annotated[int | None, typer.Option(help="pictures to read")] = None,
    other: Annotated[int | None, typer.Option(help="questions of every other kind")] = None,
) -> None:
    """Measures exact answers by kind, beside a blind and a majority baseline."""
    from duomo.evals.__main__ import run

    run(model, cache, json, read, other)
