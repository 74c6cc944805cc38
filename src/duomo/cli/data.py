"""`duomo data`: training rows looked at before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check and show training rows.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="a .jsonl file")],
    most: Annotated[int, typer.Option(help="problems shown")] = 20,
) -> None:
    """Names every bad row with its line; exits 2 if there is one."""
    from duomo.errors import TrainingError
    from duomo.train.rows import check_rows

    rows, problems = check_rows(file)
    for problem in problems[:most]:
        print(f"{problem.source}: {problem.message}")
    media = sum(len(row.media) for row in rows)
    print(f"{len(rows)} good rows with {media} pictures and videos, {len(problems)} bad rows")
    if problems:
        raise TrainingError(
            f"{len(problems)} of {len(rows) + len(problems)} rows in {file} are bad; see above"
        )


@app.command()
def preview(
    file: Annotated[Path, typer.Argument(help="a .jsonl file")],
    rows: Annotated[int, typer.Option(help="rows shown")] = 3,
) -> None:
    """Shows rows in the canonical form; a star marks what is supervised."""
    from itertools import islice

    from duomo.train.rows import read_rows

    for row in islice(read_rows(file), rows):
        print(row.source)
        for turn in row.turns:
            said = "".join(p.value if p.kind == "text" else f"[{p.kind} {p.value}]" for p in turn.pieces)
            thought = f"(thinking: {turn.reasoning}) " if turn.reasoning else ""
            print(f"  {'*' if turn.is_supervised else ' '} {turn.role}: {thought}{said}")
        if row.rejected is not None:
            print(f"    rejected: {row.rejected}")
