"""`duomo bench serve|latency|throughput`: figures as a table, raw JSON and a plot in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from duomo.bench.workload import Workload

app = typer.Typer(help="Measure a server from outside, or the engine in this process.", no_args_is_help=True)

Requests = Annotated[int, typer.Option(min=1, help="How many requests.")]
Inputs = Annotated[int, typer.Option(min=1, help="Tokens of a synthetic prompt.")]
Outputs = Annotated[int, typer.Option(min=1, help="Tokens of every answer.")]
Pictures = Annotated[int, typer.Option(min=0, help="Pictures in each request.")]
Pixels = Annotated[int, typer.Option(min=28, help="Width and height of a picture.")]
Prompts = Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")]
Folder = Annotated[Path, typer.Option("--out", help="Where the JSON and the plot go.")]
Model = Annotated[Path | None, typer.Option(help="A checkpoint folder; left out, the embedded model.")]


@app.command()
def throughput(
    model: Model = None,
    requests: Requests = 64,
    input_tokens: Inputs = 64,
    output_tokens: Outputs = 64,
    pictures: Pictures = 0,
    picture_px: Pixels = 224,
    prompts: Prompts = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="At once; may be given again.")] = None,
    out: Folder = Path("bench"),
) -> None:
    """Tokens a second with 1, 8 and 32 requests at once."""
    _engine("throughput", model, concurrency or [1, 8, 32], out, requests, input_tokens, output_tokens,
            pictures, picture_px, prompts)  # fmt: skip


@app.command()
def latency(
    model: Model = None,
    requests: Requests = 16,
    input_tokens: Inputs = 64,
    output_tokens: Outputs = 64,
    pictures: Pictures = 0,
    picture_px: Pixels = 224,
    prompts: Prompts = None,
    out: Folder = Path("bench"),
) -> None:
    """Time to the first token and between tokens, one request at a time."""
    _engine("latency", model, [1], out, requests, input_tokens, output_tokens, pictures, picture_px, prompts)


@app.command()
def serve(
    url: Annotated[str, typer.Argument(help="The server, such as http://127.0.0.1:8180")],
    requests: Requests = 64,
    input_tokens: Inputs = 64,
    output_tokens: Outputs = 64,
    pictures: Pictures = 0,
    picture_px: Pixels = 224,
    prompts: Prompts = None,
    concurrency: Annotated[int, typer.Option(min=1)] = 8,
    rate: Annotated[float | None, typer.Option(help="Arrivals a second, in place of a concurrency.")] = None,
    name: Annotated[str, typer.Option("--model-name", help="The model's name in requests.")] = "default",
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    out: Folder = Path("bench"),
) -> None:
    """Any OpenAI-compatible server, from outside."""
    from duomo.bench.report import text_table, why_nothing, write_report
    from duomo.bench.server import measure_server
    from duomo.errors import EngineError

    work = _workload(requests, input_tokens, output_tokens, pictures, picture_px, prompts)
    runs = measure_server(url, work, model=name, concurrency=concurrency, rate_per_s=rate, api_key=api_key)
    if reason := why_nothing(runs[0][1]):
        raise EngineError(f"{url} answered none of {requests} requests: {reason}", reason=reason)
    print(text_table([figures for figures, _ in runs]))
    print(write_report(out, "serve", runs))


def _engine(
    kind: str, model: Path | None, concurrencies: list[int], out: Path, requests: int, input_tokens: int,
    output_tokens: int, pictures: int, picture_px: int, prompts: Path | None,
) -> None:  # fmt: skip
    from duomo.bench.engine import measure_throughput
    from duomo.bench.report import text_table, write_report
    from duomo.llm import LLM

    work = _workload(requests, input_tokens, output_tokens, pictures, picture_px, prompts)
    with LLM.open(model, max_sequences=max(concurrencies)) as llm:
        runs = measure_throughput(llm, work, concurrencies)
    print(text_table([figures for figures, _ in runs]))
    print(write_report(out, kind, runs))


def _workload(
    requests: int, input_tokens: int, output_tokens: int, pictures: int, picture_px: int, prompts: Path | None
) -> Workload:
    from duomo.bench.workload import Workload, read_prompts

    return Workload(
        requests, input_tokens, output_tokens, pictures, (picture_px, picture_px),
        read_prompts(prompts) if prompts else (),
    )  # fmt: skip
