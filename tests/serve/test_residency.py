"""A quantized checkpoint on disk, opened and served: the answers, and what of it is in memory when."""

import base64
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duomo.checkpoints.residency import Residency
from duomo.engine.request import SamplingParams
from duomo.llm import LLM
from duomo.model import BankConfig, SpecialIds, VisionConfig
from duomo.processing.messages import ImagePart, Message
from duomo.processing.tokenizer import Tokenizer
from duomo.quant.synth import synthesize
from duomo.serve import convert
from duomo.serve.engine import Model
from duomo.serve.options import Options
from tests.serve.conftest import Running, picture_url
from tests.tiny import TINY

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
NAMES = {
    "image_patch": "<|IMAGE_PLACEHOLDER|>",
    "video_patch": "<|IMAGE_PLACEHOLDER|>",
    "image_start": "<|IMAGE_START|>",
    "image_end": "<|IMAGE_END|>",
    "video_start": "<|VIDEO_START|>",
    "video_end": "<|VIDEO_END|>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from duomo.processing.tokenizer import Tokenizer
    from duomo.train.vocabulary import train_vocabulary

    words, checkpoint = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("packed")
    train_vocabulary(["hello world, yes or no? 你好"] * 30, words / "tokenizer.json", vocab_size=700)
    tokenizer = Tokenizer.load(words)
    ids = SpecialIds(
        bos=tokenizer.special_id("<|begin_of_sentence|>"),
        eos=tokenizer.eos_ids[0],
        **{field: tokenizer.special_id(name) for field, name in NAMES.items()},
    )
    config = replace(
        TINY,
        vocab_size=tokenizer.vocab_size,
        ids=ids,
        hidden_size=256,
        num_heads=16,
        intermediate_size=256,
        text_experts=BankConfig(4, 128),
        vision_experts=BankConfig(4, 128),
        shared_size=256,
        vision=VisionConfig(num_layers=2, hidden_size=256, intermediate_size=1024, num_heads=4),
    )
    synthesize(config, checkpoint, tokenizer=words)
    return checkpoint


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page counts are Linux's")
def test_what_is_in_memory(folder: Path) -> None:
    running = Running(Model(LLM.open(folder, max_model_tokens=512)), Options())

    def resident() -> dict[str, int]:
        parts = running.client.get("/v1/residency").json()["parts"]
        return {name: part["resident_bytes"] for name, part in parts.items()}

    try:
        first = running.ask(**GREEDY)
        assert first.status_code == 200, first.text
        after_text = resident()
        assert after_text["vision tower"] == after_text["resampler"] == 0
        assert after_text["attention"] > 0 and after_text["text experts"] > 0
        content = [
            {"type": "image_url", "image_url": {"url": picture_url()}},
            {"type": "text", "text": "yes or no?"},
        ]
        asked = running.ask(content, **GREEDY)
        assert asked.status_code == 200, asked.text
        after_picture = resident()
        assert after_picture["vision tower"] > 0 and after_picture["resampler"] > 0
        assert running.ask(**GREEDY).json()["choices"] == first.json()["choices"]
        assert "resident_vision_tower_bytes" in running.client.get("/load").json()
        said = running.client.get("/metrics").text
        assert 'part="vision_tower"' in said and "duomo:weight_pools_let_go" in said
    finally:
        running.stop()
        running.backend.llm.close()


def test_weights_are_asked_for_before_the_picture_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is given when the request arrives: before the picture is fetched, decoded or tokenized."""
    order: list[str] = []

    def note(what: str, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **named: Any) -> Any:
            order.append(what)
            return original(*args, **named)

        monkeypatch.setattr(owner, name, noted)

    note("asked", Residency, "expect_picture")
    note("fetched", convert, "fetch")
    note("tokenized", Tokenizer, "encode")
    content = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "text", "text": "yes or no?"},
    ]
    running = Running(Model(LLM.open(folder, max_model_tokens=512)), Options())
    try:
        order.clear()
        assert running.ask(content, **GREEDY).status_code == 200
        assert order[0] == "asked" and order.index("fetched") < order.index("tokenized")
        order.clear()
        data = base64.b64decode(picture_url().partition(",")[2])
        running.backend.llm.chat(
            [Message.of("user", ImagePart(data), "yes or no?")], SamplingParams(max_tokens=1)
        )
        assert order[0] == "asked" and "tokenized" in order
        order.clear()
        assert running.ask(**GREEDY).status_code == 200
        assert "asked" not in order
    finally:
        running.stop()
        running.backend.llm.close()
