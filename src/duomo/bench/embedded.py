"""The embedded model at 2 bits: `python -m duomo.bench.embedded TARGET`.

Calibrated on questions of the training split in the chat template, answered as the training answers them.
Then `python -m duomo.evals --model TARGET` asks it the frozen questions of the test split: nothing is shared.
Both steps in one, for bf16 and 2 bits side by side, are `duomo.bench.two_bits`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duomo.checkpoints import load_config
from duomo.processing.images import load_image
from duomo.processing.messages import ImagePart, Message, TextPart, Tool, VideoPart
from duomo.processing.prompt import Media, Prompt
from duomo.processing.template import build_prompt
from duomo.processing.tokenizer import Tokenizer
from duomo.processing.video import load_frames
from duomo.quant import build_plan, quantize
from duomo.quant.pipeline import Progress
from duomo.quant.plan import Kind
from duomo.tasks import Example, Handwriting, Split, Turn, dialogue, digits, load_handwriting, shapes
from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import Pools, load_pools
from duomo.trellis import preset

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"
_PLACE = re.compile(r"(<\|LOC_\w+\|>)")
Draw = Callable[[np.random.Generator], Example]


def usual(pool: Handwriting, split: Split = "train") -> list[Draw]:
    """Half digits, a quarter shapes, a quarter without a picture."""
    return [
        lambda rng: digits.generate(rng, pool),
        lambda rng: shapes.generate(rng, split, num_turns=1),
        lambda rng: digits.generate(rng, pool),
        lambda rng: dialogue.generate(rng, split),
    ]


def all_families(pools: Pools) -> list[Draw]:
    """Every family alike."""
    return [lambda rng, own=generate: own(rng, pools) for generate in FAMILIES.values()]  # type: ignore[misc]


def calibration_prompts(
    draws: Sequence[Draw], tokenizer: Tokenizer, num: int, seed: int = 11
) -> list[Prompt]:
    """`num` turns, the generators taking turns; answers written out."""
    rng = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    while len(prompts) < num:
        for example in [draw(rng) for draw in draws]:
            turn = example.turns[int(rng.integers(len(example.turns)))]
            prompts.append(_answered(example, turn, tokenizer))
    return prompts[:num]


def _answered(example: Example, turn: Turn, tokenizer: Tokenizer) -> Prompt:
    parts: tuple[ImagePart | VideoPart | TextPart, ...] = (TextPart(turn.question),)
    if example.times:
        parts = (VideoPart(b""), *parts)
    elif example.picture is not None:
        stream = BytesIO()
        Image.fromarray(example.picture).save(stream, format="PNG")
        parts = (ImagePart(stream.getvalue()), *parts)

    def load(part: ImagePart | VideoPart) -> Media:
        if isinstance(part, ImagePart):
            return load_image(part)
        assert example.picture is not None
        return load_frames(example.picture, example.times)

    tools = [Tool(function.name, "", function.schema) for function in turn.functions]
    prompt = build_prompt(
        [Message("user", parts)], tokenizer, thinking=turn.reasoning is not None, tools=tools, load=load
    )
    answer = _said(turn, tokenizer, "" if turn.reasoning is None else "\n")
    if turn.reasoning is not None:
        thought = tokenizer.encode(f"\n{turn.reasoning}\n")
        answer = [*thought, tokenizer.special_id("</think>"), *answer]
    return Prompt([*prompt.ids, *answer], prompt.media, prompt.spans)


def _said(turn: Turn, tokenizer: Tokenizer, opening: str) -> list[int]:
    """The answer's ids after the text `opening`, places and calls as control tokens."""
    if turn.functions:
        begin, end = tokenizer.special_id("<tool_call>"), tokenizer.special_id("</tool_call>")
        return [*tokenizer.encode(opening), begin, *tokenizer.encode(f"\n{turn.answer}\n"), end]
    ids: list[int] = []
    for piece in _PLACE.split(opening + turn.answer):
        ids += [tokenizer.special_id(piece)] if _PLACE.fullmatch(piece) else tokenizer.encode(piece)
    return ids


def build(
    source: Path,
    target: Path,
    prompts: Sequence[Prompt],
    bits: str = "2",
    code: str = "lcc2-12",
    is_quarter: bool = False,
    is_tuned: bool = False,
    num_threads: int = 2,
) -> dict[str, Any]:
    """Quantizes `source` into `target`, or goes on with it; `is_quarter`: at most a quarter of bf16.

    For that the tower, the embeddings and the head take 6 bits, which frees what attention needs for 8.
    """
    ends, attention = (6, 8) if is_quarter else (8, 4)
    plan = build_plan(bits, load_config(source), preset(code), ends, attention)
    if is_quarter:
        plan = replace(plan, tower=Kind.INT6)

    def tell(step: Progress) -> None:
        print(f"{step.what}: {step.done} of {step.total} pieces", flush=True)

    return quantize(source, target, plan, prompts, is_tuned=is_tuned, num_threads=num_threads, progress=tell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--source", type=Path, default=EMBEDDED)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--code", default="lcc2-12")
    parser.add_argument("--quarter", action="store_true", help="tower and embeddings 6 bits, attention 8")
    parser.add_argument("--tune", action="store_true", help="row scales tuned layer by layer at the end")
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument(
        "--all", action="store_true", help="calibrate on every family, not only the first three"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    given = parser.parse_args()
    tokenizer = Tokenizer.load(given.source)
    if given.all:
        draws = all_families(load_pools(given.cache, "train"))
    else:
        draws = usual(load_handwriting(given.cache, "train"))
    prompts = calibration_prompts(draws, tokenizer, given.prompts)
    report = build(
        given.source,
        given.target,
        prompts,
        given.bits,
        given.code,
        is_quarter=given.quarter,
        is_tuned=given.tune,
        num_threads=given.threads,
    )
    ratio = report["file_bytes"] / report["source_bytes"]
    print(f"{report['file_bytes']:,} bytes, {ratio:.4f} of bf16, in {report['seconds']} s")
    print(json.dumps(report["quality"], indent=1))


if __name__ == "__main__":
    main()
