"""Products in bfloat16 under fp32 weights: what makes a training step on a CPU with AVX-512 BF16 fast.

Only matrix products change their type; the residual stream, norms, attention, routers and losses stay fp32,
and so do sums. `torch.autocast` rounds everything and is slower than fp32 here, for two reasons (measured,
torch 2.13, Zen 4): oneDNN compiles a product for every new number of rows, and experts see another number at
every step; and the backward pass of bf16 attention is slow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from duomo import kernels


def fast_products(wanted: bool, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where it pays: our own products on such a CPU, autocast on a GPU, fp32 elsewhere."""
    if not wanted:
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return kernels.rounded_products()
