"""Synthetic checkpoints: the shapes and the bytes of a real one, marked, and loadable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.fit import read_per_token
from duomo.checkpoints.inventory import take_inventory
from duomo.checkpoints.stream import load_dequantized
from duomo.cli import main
from duomo.errors import CheckpointError
from duomo.model import BankConfig, preset
from duomo.processing.tokenizer import Tokenizer
from duomo.quant.placeholder_tokenizer import write_placeholder_tokenizer
from duomo.quant.plan import build_plan
from duomo.quant.popularity import popularity
from duomo.quant.synth import ENTRY, parameter_shapes, synthesize
from tests.tiny import TINY

SMALL = replace(
    TINY,
    hidden_size=128,
    num_heads=8,
    intermediate_size=128,
    text_experts=BankConfig(4, 64),
    vision_experts=BankConfig(4, 64),
    shared_size=128,
)


def test_it_loads_and_runs(tmp_path: Path) -> None:
    synthesize(SMALL, tmp_path, skew=1.0)
    logits = load_model(tmp_path).logits([1, 5, 9, 33])
    assert logits.shape == (4, SMALL.vocab_size) and bool(logits.isfinite().all()) and float(logits.std()) > 0
    model = load_dequantized(tmp_path, torch.float32).requires_grad_(False)
    assert float((logits - model.logits([1, 5, 9, 33])).abs().mean()) < 0.1 * float(logits.std())
    expert = model.get_parameter("decoder.layers.1.mlp.text.gate_up")
    assert float(expert.std()) == pytest.approx(SMALL.initializer_range, rel=0.1)
    assert float(model.embed.weight.std()) == pytest.approx(ENTRY, rel=0.1)
    assert torch.equal(model.decoder.norm.weight.abs(), torch.full((128,), SMALL.initializer_range))
    assert model.get_parameter("decoder.layers.2.mlp.vision.router.bias").std() > 0


def test_it_says_that_it_is_synthetic(tmp_path: Path) -> None:
    synthesize(SMALL, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["synthetic"]["seed"] == 0
    inventory = take_inventory(tmp_path)
    assert inventory.is_synthetic and inventory.layout == "quantized"
    assert inventory.parts["text experts"].bits_per_weight < 2.3


def test_six_bit_embeddings_run_and_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomo.model.preset", lambda name: SMALL)
    with pytest.raises(SystemExit, match="0"):
        main(["synth", str(tmp_path / "x"), "--embeddings", "6"])
    inventory = take_inventory(tmp_path / "x")
    size = inventory.parts["embeddings"]
    assert size.num_bytes == SMALL.vocab_size * (128 * 6 // 8 + 2)
    assert read_per_token(inventory)["head"] == size.num_bytes
    model = load_model(tmp_path / "x")
    assert model.embed.packed.stored.bits == 6
    assert float(model.logits([1, 5, 9, 33]).std()) > 0
    with pytest.raises(SystemExit, match="2"):
        main(["synth", str(tmp_path / "y"), "--embeddings", "5"])
    assert not (tmp_path / "y").exists()


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthesize(SMALL, tmp_path / name, seed=seed)
    first, same, other = ((tmp_path / name / "model-00002.safetensors").read_bytes() for name in "abc")
    assert first == same and first != other


def test_it_never_writes_over_weights(tmp_path: Path) -> None:
    synthesize(SMALL, tmp_path)
    with pytest.raises(CheckpointError, match="already holds weights"):
        synthesize(SMALL, tmp_path)


def test_the_28b_fits_its_budget() -> None:
    """At most 8.6 GB in all, 6.0 GB of it for text, 2.01 bits a routed weight."""
    config = preset("vl-28b-a3b")
    plan = build_plan("2", config)
    sizes = {name: (plan.num_bytes(name, shape), shape) for name, shape in parameter_shapes(config).items()}
    total = sum(size for size, _ in sizes.values())
    seen = ("vision_tower.", "resampler.")
    text = sum(
        size for name, (size, _) in sizes.items() if not name.startswith(seen) and ".vision." not in name
    )
    routed = [(size, shape) for name, (size, shape) in sizes.items() if name.endswith((".gate_up", ".down"))]
    bits = 8 * sum(size for size, _ in routed) / sum(torch.Size(shape).numel() for _, shape in routed)
    assert total <= 8.6e9 and text <= 6.0e9 and bits <= 2.01


def shares_of(folder: Path, num_tokens: int = 3000) -> np.ndarray:
    """How often text experts are chosen [layers, E] by random tokens, the most popular first."""
    model = load_model(folder)
    counts = []
    for layer in model.decoder.layers[1:]:
        bank, own = layer.mlp.text, []
        bank.listener = own.append
        counts.append(own)
    ids = torch.randint(3, SMALL.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    for chunk in ids.split(500):
        model.logits(chunk.tolist())
    shares = [np.bincount(torch.cat(own).flatten().numpy(), minlength=16) / num_tokens for own in counts]
    return -np.sort(-np.array(shares), axis=1)


def test_experts_are_as_popular_as_asked(tmp_path: Path) -> None:
    """Through the whole model, so tokens must still differ from one another in the last layer."""
    config = replace(SMALL, vocab_size=4096, text_experts=BankConfig(16, 64))
    for name, skew in (("even", 0.0), ("skewed", 0.65)):
        synthesize(config, tmp_path / name, skew=skew)
    even, skewed = shares_of(tmp_path / "even"), shares_of(tmp_path / "skewed")
    fair = config.num_chosen / 16
    assert even.min() > 0.7 * fair and even.max() < 1.4 * fair
    wanted = popularity(16, config.num_chosen, 0.65)
    assert np.abs(skewed - wanted).mean() < 0.25 * fair
    assert (skewed[:, 0] > 2 * fair).all()


def test_its_tokenizer_has_the_models_ids(tmp_path: Path) -> None:
    config = preset("vl-28b-a3b")
    assert write_placeholder_tokenizer(tmp_path, config)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.special_id("<|IMAGE_PLACEHOLDER|>") == config.ids.image_patch
    for name in ("image_start", "image_end", "video_start", "video_end"):
        assert tokenizer.special_id(f"<|{name.upper()}|>") == getattr(config.ids, name)
    assert tokenizer.decode(tokenizer.encode("Which digit? 七")) == "Which digit? 七"
    assert tokenizer.decode([50_000]) == "<50000>"
    assert not write_placeholder_tokenizer(tmp_path, SMALL), "no room for the pieces"
