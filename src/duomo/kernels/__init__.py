"""One function per operation of the model, with the same names in every set of kernels.

`reference` is plain torch and the specification; `cpu` is C++. The model calls the names below.
Which set serves packed weights is decided at load: DUOMO_KERNELS, else C++ where it was built.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from duomo import env
from duomo.kernels import cpu, reference
from duomo.kernels.cpu import (
    HEAD_MULTIPLE,
    BankWeights,
    DecoderSizes,
    FusedDecoder,
    FusedResampler,
    FusedTower,
    LayerWeights,
    MergeWeights,
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
    layernorm,
    rotate_halves,
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
    "FusedResampler",
    "FusedTower",
    "IntWeight",
    "LayerWeights",
    "MergeWeights",
    "NextTokens",
    "Norm",
    "PackedStep",
    "PackedWeight",
    "Routing",
    "TrellisWeight",
    "attention",
    "attention_within",
    "cross_entropy",
    "dense_linear",
    "experts",
    "gated",
    "is_native",
    "layernorm",
    "linear",
    "packed_experts",
    "packed_linear",
    "packed_mlp",
    "packed_qkv",
    "packed_rmsnorm",
    "packed_route",
    "packed_rows",
    "paged_attention",
    "rmsnorm",
    "rotate_halves",
    "rotate_pairs",
    "rounded_products",
    "route",
    "swiglu",
    "takes_heads",
    "trains_natively",
    "vision_blocks",
]

is_native: bool = env.KERNELS.get() == "cpu" or (env.KERNELS.get() == "" and cpu.is_built())
if is_native:
    cpu.install()


def _takes(x: Tensor) -> bool:
    return is_native and x.device.type == "cpu"


def trains_natively() -> bool:
    """Steps of training have kernels of their own here; they may round their products to bf16."""
    return is_native and cpu.train.is_there()


def _trains(*tensors: Tensor) -> bool:
    return cpu.train.takes(*tensors) and trains_natively()


def rounded_products() -> AbstractContextManager[None]:
    """Training's products in bf16 where it has kernels of its own, else as they were."""
    return cpu.train.rounded_products() if trains_natively() else nullcontext()


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x[..., K] W^T + bias."""
    chosen = cpu.train.linear if _trains(x, weight_NK) else reference.linear
    return chosen(x, weight_NK, bias_N)


def experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's K experts of weight * down(silu(gate x) * up x). Returns [T, D]."""
    is_fast = _trains(hidden_TD, weights_TK, gate_up_EFD, down_EDF)
    chosen = cpu.train.experts if is_fast else reference.experts
    return chosen(hidden_TD, expert_ids_TK, weights_TK, gate_up_EFD, down_EDF)


def attention_within(
    query_TNH: Tensor,
    key_TGH: Tensor,
    value_TGH: Tensor,
    lengths: Sequence[int],
    is_causal: bool = True,
    blocks_T: Tensor | None = None,
) -> Tensor:
    """Whole sequences of `lengths` side by side, each within itself. Returns [T, N, H].

    Of causal ones `blocks_T`, int32, may say more: a key with a number other than 0 is seen by its own block.
    """
    is_fast = query_TNH.shape[-1] % cpu.train.HEAD_MULTIPLE == 0 and _trains(query_TNH, key_TGH, value_TGH)
    chosen = cpu.train.attention_within if is_fast else reference.attention_within
    return chosen(query_TNH, key_TGH, value_TGH, lengths, is_causal, blocks_T)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over the root of its mean square, times weight."""
    chosen = cpu.train.rmsnorm if _trains(x, weight) else reference.rmsnorm
    return chosen(x, weight, eps)


def rotate_pairs(x_TNH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotates adjacent pairs; cos and sin are fp32 [T, H/2]."""
    is_fast = x_TNH.shape[-1] % cpu.train.HEAD_MULTIPLE == 0 and _trains(x_TNH)
    chosen = cpu.train.rotate_pairs if is_fast else reference.rotate_pairs
    return chosen(x_TNH, cos_TP, sin_TP)


def route(
    hidden_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_chosen: int, norm_min: float = 1e-12
) -> Routing:
    """Softmax over one bank, top-K of the biased probabilities, unbiased weights that sum to one; in fp32."""
    is_fast = _trains(hidden_TD, router_ED) and bias_E.device.type == "cpu"
    chosen = cpu.train.route if is_fast else reference.route
    return chosen(hidden_TD, router_ED, bias_E, num_chosen, norm_min)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    chosen = cpu.train.gated if _trains(gate, up) else reference.gated
    return chosen(gate, up)


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[T] in fp32; zero where the label is -100."""
    chosen = cpu.train.cross_entropy if _trains(logits_TV) else reference.cross_entropy
    return chosen(logits_TV, labels_T)


def dense_linear(x_TK: Tensor, weight: DenseWeight | Tensor) -> Tensor:
    """x W^T + bias; native in inference over fp32. A bare matrix [N, K] is borrowed."""
    weight_NK = weight.weight if isinstance(weight, DenseWeight) else weight
    if _takes(x_TK) and cpu.dense.takes(x_TK, weight_NK):
        own = weight if isinstance(weight, DenseWeight) else DenseWeight(weight_NK)
        return cpu.dense.dense_linear(x_TK, own)
    if isinstance(weight, DenseWeight):
        return reference.dense_linear(x_TK, weight)
    return linear(x_TK, weight)


def packed_linear(x: Tensor, weight: PackedWeight, index: int = 0) -> Tensor:
    """x[..., K] times a packed matrix [N, K], or matrix `index` of a bank: [..., N] in x's dtype."""
    if _takes(x) and weight.block >= NATIVE_BLOCK:
        return cpu.packed_linear(x, weight, index)
    return reference.packed_linear(x, weight, index)


def packed_rows(ids_T: Tensor, weight: IntWeight) -> Tensor:
    """Rows of a matrix of integers by their numbers, turned back: fp32 [..., K]."""
    if _takes(ids_T) and weight.block >= NATIVE_BLOCK:
        return cpu.packed_rows(ids_T, weight)
    return reference.packed_rows(ids_T, weight)


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
