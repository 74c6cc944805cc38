"""Every name on disk and what it is of ours: one table, from the config alone.

An `Entry` says: this tensor of the PT layout is that view of that parameter of ours. Loading copies a file's
tensor into the view, saving copies the view out, so the two cannot disagree. The other dialects (Paddle,
transformers in memory) are told as where a PT tensor is found in them, and how it is turned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from duomo.model import Ernie, ModelConfig

View = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T


def part(start: int | None, stop: int | None) -> View:
    """Rows [start, stop)."""
    return lambda tensor: tensor[start:stop]


def expert_rows(expert: int, start: int | None = None, stop: int | None = None) -> View:
    return lambda tensor: tensor[expert, start:stop]


@dataclass(frozen=True, slots=True)
class Entry:
    """`name` in the PT layout is `view` of our parameter `ours`; `row` picks one row of the file's tensor."""

    name: str
    ours: str
    view: View = whole
    row: int | None = None


def pt_entries(config: ModelConfig) -> Iterator[Entry]:
    """The whole PT layout of a model, in order (spec section 2.1)."""
    yield Entry("model.embed_tokens.weight", "embed.weight")
    for index, has_experts in enumerate(config.expert_layers):
        yield from _layer(config, index, has_experts)
    yield Entry("model.norm.weight", "decoder.norm.weight")
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", "head.weight")
    if config.vision:
        yield from _vision(config)


def pt_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the PT layout, from the config alone (nothing is allocated)."""
    with torch.device("meta"):
        parameters = dict(Ernie(config).named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in pt_entries(config):
        shape = tuple(entry.view(parameters[entry.ours]).shape)
        shapes[entry.name] = shape if entry.row is None else (entry.row + 1, *shape)
    return shapes


def _linear(theirs: str, ours: str, has_bias: bool) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}.weight")
    if has_bias:
        yield Entry(f"{theirs}.bias", f"{ours}.bias")


def _layer(config: ModelConfig, index: int, has_experts: bool) -> Iterator[Entry]:
    theirs, ours = f"model.layers.{index}", f"decoder.layers.{index}"
    yield Entry(f"{theirs}.input_layernorm.weight", f"{ours}.input_norm.weight")
    yield Entry(f"{theirs}.post_attention_layernorm.weight", f"{ours}.post_norm.weight")
    for letter in "qkvo":
        attention = f"{theirs}.self_attn.{letter}_proj", f"{ours}.attention.{letter}"
        yield from _linear(*attention, config.use_bias)
    if not has_experts:
        yield from _mlp(f"{theirs}.mlp", f"{ours}.mlp", config.use_bias)
        return
    if config.shared_size:
        yield from _mlp(f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared", config.use_bias)
    yield from _banks(config, f"{theirs}.mlp", f"{ours}.mlp")


def _mlp(theirs: str, ours: str, has_bias: bool) -> Iterator[Entry]:
    for name in ("gate", "up", "down"):
        yield from _linear(f"{theirs}.{name}_proj", f"{ours}.{name}", has_bias)


def _banks(config: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    """Text experts first, vision expert v at text count + v; routers [in, out], biases one tensor of rows."""
    first = 0
    for row, bank in enumerate(bank for bank in ("text", "vision") if getattr(config, f"{bank}_experts")):
        sizes = config.text_experts if bank == "text" else config.vision_experts
        assert sizes is not None
        mine = f"{ours}.{bank}"
        yield Entry(f"{theirs}.gate.weight{'_1' if row else ''}", f"{mine}.router.weight", transposed)
        yield Entry(f"{theirs}.moe_statics.e_score_correction_bias", f"{mine}.router.bias", row=row)
        for expert in range(sizes.num_experts):
            name, width = f"{theirs}.experts.{first + expert}", sizes.expert_size
            yield Entry(f"{name}.gate_proj.weight", f"{mine}.gate_up", expert_rows(expert, 0, width))
            yield Entry(f"{name}.up_proj.weight", f"{mine}.gate_up", expert_rows(expert, width))
            yield Entry(f"{name}.down_proj.weight", f"{mine}.down", expert_rows(expert))
        first += sizes.num_experts


def _vision(config: ModelConfig) -> Iterator[Entry]:
    assert config.vision is not None
    yield Entry("vision_model.patch_embed.proj.weight", "vision_tower.patch_embed.weight")
    for index in range(config.vision.num_layers):
        theirs, ours = f"vision_model.blocks.{index}", f"vision_tower.blocks.{index}"
        pairs = {
            "norm1": "norm1",
            "norm2": "norm2",
            "attn.qkv": "attention.qkv",
            "attn.proj": "attention.out",
            "mlp.fc1": "fc1",
            "mlp.fc2": "fc2",
        }
        for their_name, our_name in pairs.items():
            yield from _linear(f"{theirs}.{their_name}", f"{ours}.{our_name}", True)
    yield from _linear("vision_model.ln", "vision_tower.norm", True)
    for merge in ("spatial", "temporal"):
        for their_index, our_name in (("0", "fc1"), ("2", "fc2"), ("3", "norm")):
            theirs = f"model.resampler_model.{merge}_linear.{their_index}"
            yield from _linear(theirs, f"resampler.{merge}.{our_name}", True)
    yield from _linear("model.resampler_model.mlp", "resampler.project", True)
    yield Entry("model.resampler_model.after_norm.weight", "resampler.norm.weight")
