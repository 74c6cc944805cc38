"""`duomo train`: a recipe, or without one the embedded model from nothing; both go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def train(
    recipe: Annotated[Optional[Path], typer.Argument(help="RECIPE.yaml; none trains `tiny`")] = None,  # noqa: UP045
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value, over the recipe")] = None,  # noqa: UP045
    folder: Annotated[Path, typer.Option(help="where the run of `tiny` keeps its state")] = Path("runs/tiny"),
    cache: Annotated[Path, typer.Option(help="where fetched packages lie")] = Path("runs/cache"),
    steps: Annotated[list[int] | None, typer.Option(help="steps of each stage of `tiny`, in order")] = None,
    processes: Annotated[int, typer.Option(min=1, help="share the work of a step, on this machine")] = 1,
    export_to: Annotated[Path | None, typer.Option(help="write `tiny` here at the end")] = None,
) -> None:
    """Trains by a recipe: text, vision, joint, thinking, sft, dpo or grpo."""
    if recipe is not None:
        from duomo.train.loop import train as run_recipe
        from duomo.train.processes import run_recipe_in
        from duomo.train.settings import read_settings

        reading = read_settings(recipe, overrides or [])
        for warning in reading.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if processes > 1:
            raise typer.Exit(run_recipe_in(processes, run_recipe, reading.settings))
        run_recipe(reading.settings)
        return
    from duomo.train.embedded import run
    from duomo.train.export import export

    if code := run(folder, cache, steps or [], processes=processes):
        raise typer.Exit(code)
    if export_to:
        export(folder, export_to)
