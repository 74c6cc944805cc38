"""`python -m duomo.bench.picture CHECKPOINT [--tokens 1024 256] [--rounds 2] [--json FILE]`: a picture's way.

One real request for each size, from an encoded file to the first token, by part; then questions that should
cost less: another about the same picture, one with other words before it, and text of the same lengths.
Last the vision tower alone beside transformers' (`bench.towers`). Meant for `duomo synth` checkpoints of
full size: speed and memory are real, the answers mean nothing. Weights are warm: a small picture goes first.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from duomo.bench.towers import compare
from duomo.engine.engine import Engine
from duomo.engine.request import SamplingParams
from duomo.engine.runner import ModelRunner
from duomo.errors import ConfigError
from duomo.llm import LLM
from duomo.model.ernie import Ernie
from duomo.processing.messages import ImagePart, Message
from duomo.processing.patches import FACTOR_PX
from duomo.processing.prompt import Grid

QUESTION, ANOTHER = "What does the picture show?", "Which colour is the upper left corner?"
PARAMS = SamplingParams(max_tokens=1, ignore_eos=True, thinking="off")


def photograph(tokens: int, seed: int) -> ImagePart:
    """A JPEG twice as wide and high as `tokens` (a square number) need: smooth colours with fine noise."""
    side = round(tokens**0.5) * FACTOR_PX
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((2 * side, 2 * side))
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (2 * side, 2 * side, 3))
    stream = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return ImagePart(stream.getvalue(), min_pixels=side * side, max_pixels=side * side)


class Watch:
    """When a module began its first and ended its last call of a request."""

    def __init__(self, module: nn.Module) -> None:
        self.forget()
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(lambda *_: self._end())

    def forget(self) -> None:
        self.began = self.ended = 0.0
        self.num_calls = 0

    def _begin(self) -> None:
        if not self.num_calls:
            self.began = time.perf_counter()
        self.num_calls += 1

    def _end(self) -> None:
        self.ended = time.perf_counter()


class Stages:
    """A model under watch while whole requests go through the engine."""

    def __init__(self, llm: LLM) -> None:
        assert isinstance(llm.engine, Engine) and isinstance(llm.engine.runner, ModelRunner)
        self.llm = llm
        self.model: Ernie = llm.engine.runner.model
        assert self.model.vision_tower is not None and self.model.resampler is not None
        self.tower, self.resampler = Watch(self.model.vision_tower), Watch(self.model.resampler)
        self.forward = Watch(self.model)

    def first_token(self, *parts: ImagePart | str) -> dict[str, Any]:
        """Seconds from the question to its first token, in all and by part."""
        num_encoded = self.llm.stats()["media_encoded"]
        for watch in (self.tower, self.resampler, self.forward):
            watch.forget()
        began = time.perf_counter()
        answer = self.llm.chat([Message.of("user", *parts)], PARAMS)
        ended = time.perf_counter()
        marks = {"read, resize, cut into patches, prompt": self.forward.began}
        if self.tower.num_calls:
            marks["read, resize, cut into patches, prompt"] = self.tower.began
            marks |= {"vision tower": self.tower.ended, "resampler": self.resampler.ended}
        marks |= {"prefill": self.forward.ended, "head, first sample, text": ended}
        stops = list(marks.values())
        return {
            "total_s": ended - began,
            "seconds": {n: b - a for n, a, b in zip(marks, [began, *stops], stops, strict=False)},
            "prompt_tokens": answer.usage.prompt_tokens,
            "cached_tokens": answer.usage.cached_tokens,
            "tower calls": self.tower.num_calls,
            "pictures encoded": int(self.llm.stats()["media_encoded"] - num_encoded),
        }


def text_of(stages: Stages, prompt_tokens: int, seed: int) -> str:
    """A question whose whole prompt has this many tokens, unlike any before it."""
    draw, words = random.Random(seed), ""
    while True:
        longer = words + f"{draw.randrange(10, 100)} "
        if stages.llm.count_tokens([Message.of("user", longer)]).prompt_tokens > prompt_tokens:
            return words
        words = longer


def measure(stages: Stages, tokens: int) -> dict[str, Any]:
    """A picture of so many tokens, and the questions beside it."""
    picture = photograph(tokens, seed=tokens)
    runs = {"the picture": stages.first_token(picture, QUESTION)}
    runs["another question about it"] = again = stages.first_token(picture, ANOTHER)
    runs["other words before it"] = other = stages.first_token("Look closely. ", picture, ANOTHER)
    for name, run, length in (
        ("text as long as its new part", again, again["prompt_tokens"] - again["cached_tokens"]),
        ("text as long as the whole", other, other["prompt_tokens"]),
    ):
        runs[name] = stages.first_token(text_of(stages, length, seed=1000 * tokens + length))
        run["times_text"] = run["total_s"] / runs[name]["total_s"]
    return runs


def show(tokens: int, runs: dict[str, Any]) -> None:
    print(f"a picture of {tokens} tokens")
    for name, run in runs.items():
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in run["seconds"].items())
        ratio = f"; {run['times_text']:.2f} times the text's" if "times_text" in run else ""
        sizes = (
            f"{run['prompt_tokens']} tokens, {run['cached_tokens']} cached, tower {run['tower calls']} times"
        )
        print(f"  {name}: {run['total_s']:.2f} s, {sizes} ({parts}){ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 256], help="tokens of each picture")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison with transformers; 0: none")
    parser.add_argument("--no-requests", action="store_true", help="the comparison alone")
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    options = parser.parse_args()
    if any(round(tokens**0.5) ** 2 != tokens or tokens < 4 for tokens in options.tokens):
        parser.error("give square numbers of tokens, such as 1024 and 256")
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with LLM.open(options.checkpoint) as llm:
        if not llm.has_vision:
            parser.error(f"{options.checkpoint} reads text alone; give a multimodal checkpoint")
        stages = Stages(llm)
        stages.first_token(photograph(64, seed=0), QUESTION)
        for tokens in () if options.no_requests else options.tokens:
            figures[f"{tokens} tokens"] = runs = measure(stages, tokens)
            show(tokens, runs)
        figures["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if options.rounds:
            side = 2 * round(options.tokens[0] ** 0.5)
            assert stages.model.vision_tower is not None
            try:
                towers = compare(stages.model.vision_tower, Grid(1, side, side), options.rounds)
            except ConfigError as error:
                parser.error(str(error))
            figures["towers"] = towers
            print(json.dumps(towers, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
