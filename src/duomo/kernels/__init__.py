"""One function per operation of the model, with the same names in every set of kernels.

`reference` is plain torch and the specification; `cpu` is C++. The model calls the names below.
"""

from duomo.kernels.reference import (
    Routing,
    attention,
    experts,
    layernorm,
    rmsnorm,
    rotate_halves,
    rotate_pairs,
    route,
    swiglu,
)

__all__ = [
    "Routing",
    "attention",
    "experts",
    "layernorm",
    "rmsnorm",
    "rotate_halves",
    "rotate_pairs",
    "route",
    "swiglu",
]
