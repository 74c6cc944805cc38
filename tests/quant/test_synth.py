"""Synthetic checkpoints: the shapes and the bytes of a real one, marked, and loadable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.inventory import take_inventory
from duomo.checkpoints.stream import load_dequantized
from duomo.errors import CheckpointError
from duomo.model import BankConfig, preset
from duomo.quant.plan import build_plan
from duomo.quant.synth import parameter_shapes, synthesize
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
    assert float(model.embed.weight.std()) == pytest.approx(SMALL.initializer_range, rel=0.1)
    assert torch.equal(model.decoder.norm.weight, torch.ones(SMALL.hidden_size))
    assert model.get_parameter("decoder.layers.2.mlp.vision.router.bias").std() > 0


def test_it_says_that_it_is_synthetic(tmp_path: Path) -> None:
    synthesize(SMALL, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["synthetic"]["seed"] == 0
    inventory = take_inventory(tmp_path)
    assert inventory.is_synthetic and inventory.layout == "quantized"
    assert inventory.parts["text experts"].bits_per_weight < 2.3


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
