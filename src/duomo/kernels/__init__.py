"""One function per operation of the model, with the same names in every set of kernels.

`reference` is plain torch and the specification; `cpu` is C++. The model calls the names below.
Which set serves packed weights is decided at load: DUOMO_KERNELS, else C++ where it was built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duomo import env
from duomo.kernels import cpu, reference
from duomo.kernels.cpu import (
    HEAD_MULTIPLE,
    BankWeights,
    DecoderSizes,
    FusedDecoder,
    FusedTower,
    LayerWeights,
    NextTokens,
    PackedStep,
    takes_heads,
)
from duomo.kernels.reference import (
    Affine,
    BlockWeights,
    Norm,
    Routing,
    attention,
    experts,
    layernorm,
    linear,
    rmsnorm,
    rotate_halves,
    rotate_pairs,
    route,
    swiglu,
)
from duomo.kernels.weights import (
    NATIVE_BLOCK,
    DenseForm,
    DenseWeight,
    IntWeight,
    PackedWeight,
    TrellisWeight,
)

__all__ = [
    "HEAD_MULTIPLE",
    "Affine",
    "BankWeights",
    "BlockWeights",
    "DecoderSizes",
    "DenseForm",
    "DenseWeight",
    "FusedDecoder",
    "FusedTower",
    "IntWeight",
    "LayerWeights",
    "NextTokens",
    "Norm",
    "PackedStep",
    "PackedWeight",
    "Routing",
    "TrellisWeight",
    "attention",
    "dense_linear",
    "experts",
    "is_native",
    "layernorm",
    "linear",
    "packed_experts",
    "packed_linear",
    "packed_mlp",
    "packed_qkv",
    "packed_rmsnorm",
    "packed_route",
    "paged_attention",
    "rmsnorm",
    "rotate_halves",
    "rotate_pairs",
    "route",
    "swiglu",
    "takes_heads",
    "vision_blocks",
]

is_native: bool = env.KERNELS.get() == "cpu" or (env.KERNELS.get() == "" and cpu.is_built())
if is_native:
    cpu.install()


def _takes(x: Tensor) -> bool:
    return is_native and x.device.type == "cpu"


def dense_linear(x_TK: Tensor, weight: DenseWeight | Tensor) -> Tensor:
    """x W^T + bias; native in inference over fp32. A bare matrix [N, K] is borrowed."""
    weight_NK = weight.weight if isinstance(weight, DenseWeight) else weight
    if _takes(x_TK) and cpu.dense.takes(x_TK, weight_NK):
        own = weight if isinstance(weight, DenseWeight) else DenseWeight(weight_NK)
        return cpu.dense.dense_linear(x_TK, own)
    if isinstance(weight, DenseWeight):
        return reference.dense_linear(x_TK, weight)
    return reference.linear(x_TK, weight)


def packed_linear(x: Tensor, weight: PackedWeight, index: int = 0) -> Tensor:
    """x[..., K] times a packed matrix [N, K], or matrix `index` of a bank: [..., N] in x's dtype."""
    if _takes(x) and weight.block >= NATIVE_BLOCK:
        return cpu.packed_linear(x, weight, index)
    return reference.packed_linear(x, weight, index)


def packed_experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up: TrellisWeight, down: TrellisWeight
) -> Tensor:
    """`experts` over packed banks gate_up [E, 2F, D] and down [E, D, F]."""
    chosen = cpu.packed_experts if _takes(hidden_TD) else reference.packed_experts
    return chosen(hidden_TD, expert_ids_TK, weights_TK, gate_up, down)


def packed_mlp(x_TD: Tensor, gate: TrellisWeight, up: TrellisWeight, down: TrellisWeight) -> Tensor:
    """down(silu(gate x) * up x) over single packed matrices, fp32 in between."""
    return (cpu.packed_mlp if _takes(x_TD) else reference.packed_mlp)(x_TD, gate, up, down)


def packed_qkv(
    x_TD: Tensor, q: TrellisWeight, k: TrellisWeight, v: TrellisWeight, cos_TP: Tensor, sin_TP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed hidden states -> rotated queries and keys, and values, as heads."""
    return (cpu.packed_qkv if _takes(x_TD) else reference.packed_qkv)(x_TD, q, k, v, cos_TP, sin_TP)


def packed_route(
    hidden_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_chosen: int, norm_min: float = 1e-12
) -> Routing:
    """`route` of a quantized model: inference only, so the native one gives no logits."""
    chosen = cpu.route if _takes(hidden_TD) else reference.route
    return chosen(hidden_TD, router_ED, bias_E, num_chosen, norm_min)


def packed_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rmsnorm` of a quantized model; bf16 keeps the plain one, whose roundings it must have."""
    is_wide = x.dtype == weight.dtype == torch.float32
    return (cpu.rmsnorm if _takes(x) and is_wide else reference.rmsnorm)(x, weight, eps)


def paged_attention(
    query_TNH: Tensor,
    store: Tensor,
    scale: Tensor | None,
    page_table_SM: Tensor,
    page_size: int,
    sequence_T: Tensor,
    num_keys_T: Tensor,
) -> Tensor:
    """Attention of packed tokens through the pages of one layer's cache; fp32 [T, N, H]."""
    is_fast = _takes(query_TNH) and query_TNH.shape[-1] % cpu.HEAD_MULTIPLE == 0
    chosen = cpu.paged_attention if is_fast else reference.paged_attention
    return chosen(query_TNH, store, scale, page_table_SM, page_size, sequence_T, num_keys_T)


def vision_blocks(
    hidden_PC: Tensor,
    blocks: Sequence[BlockWeights],
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    """The tower's blocks: patches [P, C] of all frames -> [P, C]; `frames` are lengths."""
    is_fast = _takes(hidden_PC) and takes_heads(hidden_PC.shape[-1] // num_heads)
    chosen = cpu.vision_blocks if is_fast else reference.vision_blocks
    return chosen(hidden_PC, blocks, cos_PQ, sin_PQ, frames, num_heads)
