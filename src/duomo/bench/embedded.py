"""The embedded model at 2 bits: `python -m duomo.bench.embedded TARGET`.

Calibrated on questions of the training split in the chat template, answered as the training answers them.
Then `python -m duomo.evals --model TARGET` asks it the frozen questions of the test split: nothing is shared.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from duomo.checkpoints import load_config
from duomo.processing.messages import ImagePart, Message, TextPart
from duomo.processing.prompt import Prompt
from duomo.processing.template import build_prompt
from duomo.processing.tokenizer import Tokenizer
from duomo.quant import build_plan, quantize
from duomo.quant.plan import Kind
from duomo.tasks import Example, Handwriting, Turn, dialogue, digits, load_handwriting, shapes
from duomo.trellis import preset

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"


def calibration_prompts(pool: Handwriting, tokenizer: Tokenizer, num: int, seed: int = 11) -> list[Prompt]:
    """`num` turns: half digits, a quarter shapes, a quarter without a picture; answers written out."""
    rng = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    while len(prompts) < num:
        for example in (
            digits.generate(rng, pool),
            shapes.generate(rng, "train", num_turns=1),
            digits.generate(rng, pool),
            dialogue.generate(rng, "train"),
        ):
            turn = example.turns[int(rng.integers(len(example.turns)))]
            prompts.append(_answered(example, turn, tokenizer))
    return prompts[:num]


def _answered(example: Example, turn: Turn, tokenizer: Tokenizer) -> Prompt:
    parts: tuple[ImagePart | TextPart, ...] = (TextPart(turn.question),)
    if example.picture is not None:
        stream = BytesIO()
        Image.fromarray(example.picture).save(stream, format="PNG")
        parts = (ImagePart(stream.getvalue()), *parts)
    prompt = build_prompt([Message("user", parts)], tokenizer, thinking=turn.reasoning is not None)
    answer = tokenizer.encode(turn.answer)
    if turn.reasoning is not None:
        thought = tokenizer.encode(f"\n{turn.reasoning}\n")
        answer = [*thought, tokenizer.special_id("</think>"), *tokenizer.encode(f"\n{turn.answer}")]
    return Prompt([*prompt.ids, *answer], prompt.media, prompt.spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--code", default="lcc2-12")
    parser.add_argument(
        "--six", action="store_true", help="embeddings and tower at 6 bits: a quarter of bf16"
    )
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    given = parser.parse_args()
    tokenizer = Tokenizer.load(EMBEDDED)
    pool = load_handwriting(given.cache, "train")
    prompts = calibration_prompts(pool, tokenizer, given.prompts)
    plan = build_plan(given.bits, load_config(EMBEDDED), preset(given.code))
    if given.six:
        plan = replace(plan, embedding=Kind.INT6, tower=Kind.INT6)
    report = quantize(EMBEDDED, given.target, plan, prompts, num_threads=2)
    ratio = report["file_bytes"] / report["source_bytes"]
    print(f"{report['file_bytes']:,} bytes, {ratio:.4f} of bf16, in {report['seconds']} s")
    print(json.dumps(report["quality"], indent=1))


if __name__ == "__main__":
    main()
