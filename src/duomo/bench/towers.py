"""Our vision tower beside transformers' own in bf16: the same weights, the same patches, turn about.

Part of `python -m duomo.bench.picture`. transformers' attention is the faster of its two for CPUs on this
picture, each tried on one layer. Where its version has no ERNIE-VL the comparison says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from duomo.errors import ConfigError
from duomo.kernels import IntWeight
from duomo.kernels.reference.packed import unrotate
from duomo.model.vision import VisionTower
from duomo.processing.prompt import Grid

ATTENTIONS = ("sdpa", "eager")
_NAMES = {
    "patch_embed": "patch_embed.proj", "norm": "ln", "norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1",
    "fc2": "mlp.fc2", "attention.qkv": "attn.qkv", "attention.out": "attn.proj",
}  # fmt: skip


def compare(tower: VisionTower, grid: Grid, rounds: int) -> dict[str, Any]:
    """Seconds of both towers for one picture, `rounds` times in turn; their ratio, how far apart they are."""
    patches_PX = torch.randn(grid.num_patches, 588, generator=torch.Generator().manual_seed(0))
    theirs = transformers_tower(tower)
    narrow, grid_13 = patches_PX.bfloat16(), torch.tensor([[grid.frames, grid.rows, grid.columns]])
    attention = _faster_attention(theirs, narrow, grid_13)
    outputs: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    rates = []
    for _ in range(rounds):
        rates.append(bf16_rate())
        seconds["ours"].append(_timed(lambda: outputs.__setitem__("ours", tower(patches_PX, [grid]))))
        seconds["transformers"].append(
            _timed(lambda: outputs.__setitem__("transformers", theirs(narrow, grid_13).last_hidden_state))
        )
        print(
            "  towers, s:",
            ", ".join(f"{name} {times[-1]:.2f}" for name, times in seconds.items()),
            flush=True,
        )
    wide = outputs["transformers"].float()
    return {
        "tokens": grid.num_tokens,
        "attention of transformers": attention,
        "seconds": seconds,
        "median_s": {name: median(values) for name, values in seconds.items()},
        "ratio": median(seconds["transformers"]) / median(seconds["ours"]),
        "relative difference": float((outputs["ours"] - wide).norm() / wide.norm()),
        "torch bf16 product, G multiply-adds/s": median(rates),
    }


def transformers_tower(tower: VisionTower) -> Any:
    """transformers' tower with the weights of ours, unpacked, in bf16. ConfigError if it has none."""
    try:
        from transformers.initialization import no_init_weights
        from transformers.models.ernie4_5_vl_moe import configuration_ernie4_5_vl_moe as configuration
        from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as modeling
    except ImportError as error:
        raise ConfigError("this comparison needs transformers 5.5 or newer, with ernie4_5_vl_moe") from error
    config, own = configuration.Ernie4_5_VLMoeVisionConfig(), tower.config
    config.depth, config.hidden_size, config.num_heads = own.num_layers, own.hidden_size, own.num_heads
    config.intermediate_size = own.intermediate_size
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():  # every parameter is set below
            model: nn.Module = modeling.Ernie4_5_VLMoeVisionTransformerPretrainedModel(config)
    finally:
        torch.set_default_dtype(torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, module in tower.named_modules():
            for leaf, value in _plain(module):
                parameters.pop(f"{_their_name(name)}.{leaf}").copy_(value)
    assert not parameters, f"{next(iter(parameters))} was not set"
    return model.train(False)


def _their_name(name: str) -> str:
    if not name.startswith("blocks."):
        return _NAMES[name]
    _, index, inner = name.split(".", 2)
    return f"blocks.{index}.{_NAMES[inner]}"


def _plain(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A layer's own weight and bias, unpacked where they are packed."""
    found = [(leaf, value.detach()) for leaf, value in module.named_parameters(recurse=False)]
    packed = getattr(module, "packed", None)
    if packed is not None:
        found.append(("weight", _unpacked(packed)))
    return found


def _unpacked(weight: IntWeight) -> Tensor:
    """As `stored.decode()`, by one product with the rotation's matrix: seconds for a tower, not a minute."""
    rotated = weight.levels().float() * weight.multiplier()[:, None]
    if weight.signs is None:
        return rotated
    turn = unrotate(torch.eye(weight.block), torch.ones(weight.block), weight.block)
    unpacked: Tensor = (rotated.unflatten(1, (-1, weight.block)) @ turn).flatten(1) * weight.signs
    return unpacked


def _faster_attention(theirs: Any, patches_PX: Tensor, grid_13: Tensor) -> str:
    best, blocks = {}, theirs.blocks
    theirs.blocks = blocks[:1]
    for name in ATTENTIONS:
        theirs.config._attn_implementation = name
        best[name] = _timed(lambda: theirs(patches_PX, grid_13))
    theirs.blocks = blocks
    theirs.config._attn_implementation = min(best, key=best.__getitem__)
    return str(theirs.config._attn_implementation)


def bf16_rate(shape: Sequence[int] = (4096, 1280, 5120)) -> float:
    """G multiply-adds/s of torch's bf16 product, the best of three."""
    rows, inner, columns = shape
    x, weight = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    best = min(_timed(lambda: torch.nn.functional.linear(x, weight)) for _ in range(3))
    return rows * inner * columns / best / 1e9


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        call()
    return time.perf_counter() - started
