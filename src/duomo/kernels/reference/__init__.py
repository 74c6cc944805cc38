"""The plain torch version of every operation: the specification its fast twins are compared with."""

from duomo.kernels.reference.attention import attention, attention_within
from duomo.kernels.reference.cross_entropy import cross_entropy
from duomo.kernels.reference.experts import experts, gated, swiglu
from duomo.kernels.reference.linear import dense_linear, linear, panel_linear, rounded_linear
from duomo.kernels.reference.norm import layernorm, rmsnorm
from duomo.kernels.reference.packed import (
    packed_experts,
    packed_linear,
    packed_mlp,
    packed_qkv,
    packed_rows,
    quantize_activations,
)
from duomo.kernels.reference.paged_attention import paged_attention
from duomo.kernels.reference.rope import rotate_halves, rotate_pairs
from duomo.kernels.reference.router import Routing, route
from duomo.kernels.reference.vision import (
    Affine,
    BlockWeights,
    Norm,
    frame_attention,
    vision_attention,
    vision_blocks,
    vision_mlp,
)

__all__ = [
    "Affine",
    "BlockWeights",
    "Norm",
    "Routing",
    "attention",
    "attention_within",
    "cross_entropy",
    "dense_linear",
    "experts",
    "frame_attention",
    "gated",
    "layernorm",
    "linear",
    "packed_experts",
    "packed_linear",
    "packed_mlp",
    "packed_qkv",
    "packed_rows",
    "paged_attention",
    "panel_linear",
    "quantize_activations",
    "rmsnorm",
    "rotate_halves",
    "rotate_pairs",
    "rounded_linear",
    "route",
    "swiglu",
    "vision_attention",
    "vision_blocks",
    "vision_mlp",
]
