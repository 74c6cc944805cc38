"""`python -m duomo.train`: the embedded model from nothing, or on from where it was stopped."""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from duomo.checkpoints import load_model
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import dialogue, digits, load_handwriting, shapes
from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import load_pools
from duomo.train.recipe import Recipe
from duomo.train.run import train
from duomo.train.vocabulary import VOCAB_SIZES, train_vocabulary

LATER = tuple(name for name in FAMILIES if name not in ("digits", "shapes", "text"))
SENTENCES = "hsk_sentences_audio-1.0.0-py3-none-any.whl"  # pip download hsk-sentences-audio


def corpus(cache_folder: Path, recipe: Recipe) -> Iterator[str]:
    """The tasks' own words in both languages, and a little natural text if it is in the cache.

    `tiny` learned its words from three families, before there were more; `mini` takes all of them.
    """
    rng = np.random.default_rng([recipe.seed, 77])
    pool = load_handwriting(cache_folder, "train")
    pools = load_pools(cache_folder, "train") if recipe.name == "mini" else None
    for _ in range(3000):
        examples = [
            digits.generate(rng, pool, num_turns=2),
            shapes.generate(rng, "train", num_turns=3),
            dialogue.generate(rng, "train"),
        ]
        if pools is not None:
            examples += [FAMILIES[name](rng, pools) for name in LATER]
        for turn in (turn for example in examples for turn in example.turns):
            yield f"User: Picture 1:{turn.question}\nAssistant: {turn.reasoning or ''}\n{turn.answer}"
    if (cache_folder / SENTENCES).is_file():
        with zipfile.ZipFile(cache_folder / SENTENCES) as package:
            for entry in json.loads(package.read("hsk_sentences_audio/data/sentences.json")):
                yield entry["chinese"]
                yield entry["translation"]["en"]


def run(
    folder: Path,
    cache: Path,
    steps: Sequence[int | None] = (),
    start: Path | None = None,
    stage: str = "eyes",
    size: str = "tiny",
    device: str = "cpu",
) -> None:
    """Trains or resumes the recipe in `folder`; `steps` replaces the lengths of its stages, in order.

    With `start`, a new run takes that checkpoint's vocabulary and weights and begins at `stage`.
    """
    recipe = replace(Recipe(), name=size).with_steps(*steps)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        if start is not None:
            shutil.copyfile(start / "tokenizer.json", folder / "tokenizer.json")
        else:
            train_vocabulary(corpus(cache, recipe), folder / "tokenizer.json", VOCAB_SIZES[size])
    print(f"{Tokenizer.load(folder).vocab_size} ids in the vocabulary", flush=True)
    begin = None if start is None else (stage, load_model(start, torch.float32).state_dict())
    train(recipe, folder, cache, lambda line: print(line, flush=True), begin, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny"), help="where the run keeps its state"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="steps of each stage, in order")
    parser.add_argument("--from", dest="start", type=Path, help="a checkpoint to begin with")
    parser.add_argument("--stage", default="eyes", help="the stage that --from begins at")
    parser.add_argument("--size", default="tiny", choices=[*VOCAB_SIZES], help="mini needs a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args()
    run(given.folder, given.cache, given.steps, given.start, given.stage, given.size, given.device)


if __name__ == "__main__":
    main()
