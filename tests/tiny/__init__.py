"""Seeded small models: the same code as the 28B, in milliseconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from duomo.model import BankConfig, Ernie, ModelConfig, SpecialIds, VisionConfig, init_weights

IDS = SpecialIds(
    image_patch=250, video_patch=251, image_start=252, image_end=253, video_start=254, video_end=255
)

TINY = ModelConfig(
    name="test-tiny",
    vocab_size=320,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    expert_layers=(False, True, True),
    text_experts=BankConfig(8, 48),
    vision_experts=BankConfig(8, 16),
    num_chosen=2,
    shared_size=96,
    vision=VisionConfig(num_layers=2, hidden_size=64, intermediate_size=128, num_heads=4),
    rope_section=(3, 3, 2),
    initializer_range=0.08,
    ids=IDS,
)
TINY_TEXT = replace(
    TINY, name="test-text", vision=None, vision_experts=None, rope_section=None, ids=SpecialIds()
)
TINY_DENSE = replace(
    TINY_TEXT, name="test-dense", text_experts=None, expert_layers=(False,) * 3, num_chosen=0, shared_size=0
)


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> Ernie:
    """Random weights, with correction biases that do change the choice of experts."""
    model = init_weights(Ernie(config), seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model
