"""`duomo eval`: a checkpoint on the frozen held-out questions, or on rows of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def eval(
    model: Annotated[
        Path | None, typer.Argument(help="folder of a checkpoint; the embedded model if none")
    ] = None,
    data: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="rows of one's own (.jsonl), in place of the frozen questions"),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="with --data: an adapter's folder")] = None,
    max_tokens: Annotated[int, typer.Option(help="with --data: of a pack, and the longest row")] = 4096,
    cache: Annotated[Path, typer.Option(help="where fetched packages lie")] = Path("runs/cache"),
    json: Annotated[Path | None, typer.Option(help="also write the result here")] = None,
    read: Annotated[int | None, typer.Option(help="pictures to read")] = None,
    other: Annotated[int | None, typer.Option(help="questions of every other kind")] = None,
    family: Annotated[int | None, typer.Option(help="questions of every kind of the wider families")] = None,
) -> None:
    """Measures exact answers by kind, beside a blind and a majority baseline; on --data also the loss."""
    if data:
        _own_rows(model, data, adapter, max_tokens, json)
        return
    from duomo.evals.__main__ import run

    run(model, cache, json, read, other, family)


def _own_rows(
    model: Path | None, data: list[Path], adapter: Path | None, max_tokens: int, json: Path | None
) -> None:
    import json as json_module
    from dataclasses import asdict

    from duomo.train.evaluate import evaluate_folder

    found = evaluate_folder(model, data, adapter, max_tokens)
    print(
        f"{found.num_samples} rows, {found.num_tokens} supervised tokens: loss {found.loss:.4f}, "
        f"perplexity {found.perplexity:.3f}, tokens right {100 * found.tokens_right:.1f} %, "
        f"whole answers {100 * found.answers_right:.1f} %"
    )
    for kind, (num_rows, share) in found.by_kind.items():
        print(f"  {kind}: {100 * share:.1f} % of {num_rows}")
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
