"""One function per operation of the model, with the same names in every set of kernels.

`reference` is plain torch and the specification; `cpu` is C++. The model calls the names below.
Which set serves packed weights is decided at load: DUOMO_KERNELS, else C++ where it was built.
"""

from torch import Tensor

from duomo import env
from duomo.kernels import cpu, reference
from duomo.kernels.reference import (
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
from duomo.kernels.weights import NATIVE_BLOCK, Int8Weight, PackedWeight, TrellisWeight

__all__ = [
    "Int8Weight",
    "PackedWeight",
    "Routing",
    "TrellisWeight",
    "attention",
    "experts",
    "is_native",
    "layernorm",
    "linear",
    "packed_experts",
    "packed_linear",
    "rmsnorm",
    "rotate_halves",
    "rotate_pairs",
    "route",
    "swiglu",
]

is_native: bool = env.KERNELS.get() == "cpu" or (env.KERNELS.get() == "" and cpu.is_built())
if is_native:
    cpu.install()


def packed_linear(x: Tensor, weight: PackedWeight, index: int = 0) -> Tensor:
    """x[..., K] times a packed matrix [N, K], or matrix `index` of a bank: [..., N] in x's dtype."""
    fast = is_native and x.device.type == "cpu" and weight.block >= NATIVE_BLOCK
    return (cpu if fast else reference).packed_linear(x, weight, index)


def packed_experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up: TrellisWeight, down: TrellisWeight
) -> Tensor:
    """`experts` over packed banks gate_up [E, 2F, D] and down [E, D, F]."""
    fast = is_native and hidden_TD.device.type == "cpu"
    return (cpu if fast else reference).packed_experts(hidden_TD, expert_ids_TK, weights_TK, gate_up, down)
