"""How much memory quantizing needs at its worst moment, from shapes alone: a layer, Hessians, states."""

from __future__ import annotations

import torch
from torch import nn

from duomo.errors import ConfigError
from duomo.model import Ernie, ModelConfig
from duomo.model.experts import ExpertBank
from duomo.model.layers import Linear

OVERHEAD_BYTES = 1_500_000_000  # the interpreter, torch, four experts being encoded and their factors


def peak_bytes(config: ModelConfig, num_tokens: int) -> int:
    """float32 throughout. Either a layer with its Hessians, and the embeddings; or, before, the vision tower
    with the Hessians of its held-out inputs; and always four copies of the states."""
    with torch.device("meta"):
        model = Ernie(config)
    layers = dict(zip(config.expert_layers, model.decoder.layers, strict=True))  # one of each sort
    worst = max(_layer_floats(layer) for layer in layers.values())
    ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    eyes = sum(
        part.weight.numel() + part.weight.shape[1] ** 2
        for name, part in model.named_modules()
        if isinstance(part, Linear) and not name.startswith("decoder.")
    )
    states = 4 * num_tokens * config.hidden_size
    return 4 * (max(worst, eyes) + ends + states) + OVERHEAD_BYTES


def _layer_floats(layer: nn.Module) -> int:
    floats = sum(p.numel() for p in layer.parameters())
    for part in layer.modules():
        if isinstance(part, Linear):
            floats += 2 * part.weight.shape[1] ** 2
        elif isinstance(part, ExpertBank):
            num_experts, width, size = part.down.shape
            floats += num_experts * (width**2 + 2 * size**2) + 2 * width**2
    return floats


def check_memory(config: ModelConfig, num_tokens: int, allowed_bytes: int) -> None:
    """ConfigError, with what would fit, where the peak is above what was allowed."""
    needed = peak_bytes(config, num_tokens)
    if needed > allowed_bytes:
        fitting = num_tokens - (needed - allowed_bytes) // (peak_bytes(config, 1) - peak_bytes(config, 0))
        fitting = max(0, fitting // 1000 * 1000)
        how = f"{fitting:,} tokens would fit" if fitting else "no number of tokens would fit"
        raise ConfigError(
            f"quantizing needs about {needed / 1e9:.1f} GB for {num_tokens:,} calibration tokens, "
            f"{allowed_bytes / 1e9:.1f} GB are allowed; {how}",
            needed=needed,
            allowed=allowed_bytes,
        )
