"""`duomo data`: training rows looked at before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(help="Check, show and convert training rows.")


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
    model: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="a checkpoint's folder, whose words are used; the embedded model if none"),
    ] = None,
    rows: Annotated[int, typer.Option(help="rows shown")] = 3,
    max_tokens: Annotated[int, typer.Option(help="of a pack, for the last line")] = 2048,
    color: Annotated[bool, typer.Option(help="paint what is supervised, besides the brackets")] = True,
) -> None:
    """Shows rows as the model sees them: what stands in [[ ]] is supervised, nothing else is."""
    from itertools import islice

    from duomo.checkpoints import load_config
    from duomo.train.preview import packing_line, preview_row
    from duomo.train.rows import read_rows
    from duomo.train.samples import Renderer
    from duomo.train.stages import EMBEDDED

    folder = model or EMBEDDED
    renderer = Renderer.of(folder, load_config(folder))
    for row in islice(read_rows(file), rows):
        text = preview_row(row, renderer, file.parent)
        painted = text.replace("[[", "\033[32m[[").replace("]]", "]]\033[0m")
        typer.echo(painted if color else text)  # colours go only to a terminal
    print(packing_line(file, renderer, max_tokens))


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="a .jsonl file in any spelling")],
    target: Annotated[Path, typer.Argument(help="the .jsonl file to write")],
    to: Annotated[str, typer.Option(help="messages or erniekit")] = "messages",
) -> None:
    """Writes every row as OpenAI messages, or in ERNIEKit's own spelling; a bad row stops it."""
    from duomo.train.convert import convert_file

    print(f"{convert_file(file, target, to)} rows written to {target}")
