"""The C++ twins of the packed operations, for tensors on the CPU. Same names and arguments as the reference.

`install` applies DUOMO_CPU_ISA and DUOMO_NUM_THREADS; it is called once, where the kernel set is chosen.
"""

from __future__ import annotations

from duomo import env
from duomo.errors import NoBackend
from duomo.kernels.cpu import dense, train
from duomo.kernels.cpu.decoder import (
    BankWeights,
    DecoderSizes,
    FusedDecoder,
    LayerWeights,
    NextTokens,
    PackedStep,
)
from duomo.kernels.cpu.packed import (
    packed_experts,
    packed_linear,
    packed_mlp,
    packed_qkv,
    packed_rows,
    quantize_activations,
    rmsnorm,
    route,
)
from duomo.kernels.cpu.paged_attention import HEAD_MULTIPLE, paged_attention
from duomo.kernels.cpu.vision import (
    FusedResampler,
    FusedTower,
    MergeWeights,
    frame_attention,
    takes_heads,
    vision_attention,
    vision_blocks,
    vision_mlp,
)

__all__ = [
    "HEAD_MULTIPLE",
    "BankWeights",
    "DecoderSizes",
    "FusedDecoder",
    "FusedResampler",
    "FusedTower",
    "LayerWeights",
    "MergeWeights",
    "NextTokens",
    "PackedStep",
    "dense",
    "frame_attention",
    "install",
    "is_built",
    "packed_experts",
    "packed_linear",
    "packed_mlp",
    "packed_qkv",
    "packed_rows",
    "paged_attention",
    "quantize_activations",
    "rmsnorm",
    "route",
    "takes_heads",
    "train",
    "vision_attention",
    "vision_blocks",
    "vision_mlp",
]


def is_built() -> bool:
    try:
        from duomo import _native  # noqa: F401
    except ImportError:
        return False
    return True


def install() -> None:
    """NoBackend where the native module was not built."""
    if not is_built():
        raise NoBackend(
            "duomo's native kernels are not built; run `make build`, or set DUOMO_KERNELS=reference"
        )
    from duomo import _native

    _native.set_isa(env.CPU_ISA.get())
    _native.set_num_threads(env.NUM_THREADS.get())
