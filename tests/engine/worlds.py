"""A tiny random model behind a whole engine, and prompts with and without pictures."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np

from duomo.engine.engine import Engine, build_engine, run_all
from duomo.engine.request import MediaBlob, Output, Request, SamplingParams
from duomo.engine.runner import ModelRunner
from duomo.engine.vocabulary import Vocabulary
from duomo.kernels import DenseForm
from duomo.model import Ernie
from tests.tiny import IDS, TINY, tiny_model

THINK_END = 200
VOCABULARY = Vocabulary([f"<{i}>".encode() for i in range(TINY.vocab_size)], (2,), THINK_END)
MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, thinking="off")


@cache
def model_in(form: DenseForm) -> Ernie:
    """The random model, of bf16 values where its matrices are copied into panels."""
    return MODEL if form is DenseForm.BORROWED else tiny_model().bfloat16().float()


def engine(
    *,
    num_pages: int = 64,
    page_size: int = 8,
    kv_dtype: str = "float32",
    form: DenseForm = DenseForm.BORROWED,
    **options: Any,
) -> Engine:
    folder = options.pop("feature_folder", None)
    runner = ModelRunner(model_in(form), num_pages, page_size, kv_dtype, feature_folder=folder, form=form)
    return build_engine(runner, VOCABULARY, num_pages=num_pages, page_size=page_size, **options)


def text_request(name: str, seed: int, length: int, **fields: Any) -> Request:
    draw = random.Random(seed)
    params = fields.pop("params", GREEDY)
    return Request(name, tuple(draw.randrange(3, 190) for _ in range(length)), params, **fields)


def picture_request(name: str, seed: int, rows: int = 4, columns: int = 6, **fields: Any) -> Request:
    """Text, a picture, text; the same seed draws the same text, `picture` another picture."""
    draw = random.Random(seed)
    pixels = np.random.default_rng(fields.pop("picture", seed)).integers(0, 256, (rows * columns, 588))
    patches = pixels.astype(np.uint8).tobytes()
    count = rows * columns // 4
    before = [draw.randrange(3, 190) for _ in range(5)]
    after = [draw.randrange(3, 190) for _ in range(7)]
    ids = (*before, IDS.image_start, *[IDS.image_patch] * count, IDS.image_end, *after)
    medium = MediaBlob("image", len(before) + 1, (1, rows, columns), hash_of(patches), patches)
    return Request(name, ids, fields.pop("params", GREEDY), media=(medium,), **fields)


def hash_of(patches: bytes) -> bytes:
    from hashlib import blake2b

    return blake2b(patches, digest_size=16).digest()


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def answers(own: Engine, requests: list[Request]) -> dict[str, list[int]]:
    return {name: tokens(outputs) for name, outputs in run_all(own, requests).items()}
