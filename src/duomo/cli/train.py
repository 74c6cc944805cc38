"""`duomo train`: the embedded model from nothing, or on from where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    folder: Annotated[Path, typer.Option(help="where the run keeps its state")] = Path("runs/tiny"),
    cache: Annotated[Path, typer.Option(help="where fetched packages lie")] = Path("runs/cache"),
    steps: Annotated[list[int] | None, typer.Option(help="steps of each stage, in order")] = None,
    export_to: Annotated[Path | None, typer.Option(help="write a checkpoint here at the end")] = None,
) -> None:
    """Runs or resumes the recipe `tiny`."""
    from duomo.train.__main__ import run
    from duomo.train.export import export

    run(folder, cache, steps or [])
    if export_to:
        export(folder, export_to)
