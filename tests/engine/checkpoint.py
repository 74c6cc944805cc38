"""A checkpoint folder of the tiny model with a vocabulary of its own, and pictures to ask about."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from duomo.checkpoints import save_model
from duomo.model import SpecialIds
from duomo.processing.messages import ImagePart, Message
from duomo.processing.tokenizer import Tokenizer
from duomo.train.vocabulary import train_vocabulary
from tests.tiny import TINY, tiny_model

TEXTS = ["what is in the picture? the cat sat on a mat and said: hello world", "图片里有什么？猫坐在垫子上。"]
VOCAB_SIZE = 700


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train_vocabulary(TEXTS * 30, folder / "tokenizer.json", vocab_size=VOCAB_SIZE)
    special = Tokenizer.load(folder).special_id
    patch = special("<|IMAGE_PLACEHOLDER|>")
    ids = SpecialIds(
        image_patch=patch,
        video_patch=patch,
        image_start=special("<|IMAGE_START|>"),
        image_end=special("<|IMAGE_END|>"),
        video_start=special("<|VIDEO_START|>"),
        video_end=special("<|VIDEO_END|>"),
    )
    save_model(tiny_model(replace(TINY, vocab_size=VOCAB_SIZE, ids=ids, max_positions=4096)), folder)
    return folder


def picture(seed: int, width: int = 84, height: int = 56) -> ImagePart:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return ImagePart(stream.getvalue())


def ask(question: str, seed: int) -> list[Message]:
    return [Message.of("user", picture(seed), question)]
