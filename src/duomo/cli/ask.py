"""`duomo ask "question" --image PATH`: one question, one answer on stdout; thinking, if any, on stderr."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def ask(
    question: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    image: Annotated[list[str] | None, typer.Option(help="Picture; repeatable, in order.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video; repeatable.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder; without it the embedded model.")
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Think first or not; without it: by the rule."),
    ] = None,
    thinking_budget: Annotated[int | None, typer.Option(help="Most tokens of thinking.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens in all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw.")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory that duomo may use, as 5G.")] = None,
    engine: Annotated[str, typer.Option(help="model, or scripted for fixed text.")] = "model",
) -> int:
    """Ask one question, about pictures or without, and print the answer."""
    from rich.console import Console
    from rich.text import Text

    from duomo.cli.talk import Talk, params_of, part_of, user_turn
    from duomo.errors import PromptError

    text = sys.stdin.read() if question == "-" else question
    if not text.strip():
        raise PromptError("the question is empty; write it in quotes after ask")
    params = params_of(thinking, thinking_budget, max_tokens, seed)
    media = [*(part_of(p, "image") for p in image or []), *(part_of(p, "video") for p in video or [])]
    quiet = not sys.stdout.isatty()
    talk = Talk.open(model, engine, Console(soft_wrap=True, highlight=False), ram)
    try:
        talk.history.append(user_turn(text, media))
        said = talk.answer(params, shows_thinking=not quiet)
        if said is not None and said.reasoning and quiet:
            Console(stderr=True, soft_wrap=True).print(Text(said.reasoning, style="dim"))
        return 130 if said is None else 0
    finally:
        talk.close()
