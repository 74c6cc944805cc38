"""Second moments of inputs: gathered, rotated, damped, and borrowed by experts that saw too few tokens.

A Hessian here is the Gram matrix X^T X of what a linear map reads: the error of its outputs is tr(E H E^T).
Worth knowing: an expert seen by n tokens has a Hessian of rank n, and feedback fitted to it does harm on
other tokens. Borrowing helps an expert that few tokens chose: of tokens that almost chose it, and a little of
its layer's Hessian. More of the latter does harm on the embedded model (docs/quantization-study.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from duomo.trellis import hadamard

TRUST = 6.0
"""How soon an expert is believed: with as many tokens as inputs it borrows 1 / (1 + TRUST)."""


@dataclass
class Gram:
    """Sum of w^2 x x^T over tokens, with their number. float32 [K, K]."""

    size: int
    matrix: Tensor = field(init=False)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.matrix = torch.zeros(self.size, self.size)

    def add(self, inputs_TK: Tensor, weights_T: Tensor | None = None) -> None:
        rows = inputs_TK.float()
        if weights_T is not None:
            rows = rows * weights_T.float()[:, None]
        self.matrix.addmm_(rows.T, rows)
        self.num_tokens += rows.shape[0]

    @property
    def scale(self) -> float:
        """Mean of the diagonal."""
        return self.matrix.diagonal().mean().item()


def rotate(x: Tensor, seed: int | None) -> Tensor:
    """`trellis.hadamard.rotate` of the last axis of a torch tensor."""
    if seed is None:
        return x
    width = x.shape[-1]
    block = hadamard.block_size(width)
    matrix = torch.from_numpy(hadamard.transform(np.eye(block, dtype=np.float32))).to(x)
    signs = torch.from_numpy(hadamard.signs(seed, width)).to(x)
    rotated: Tensor = ((x * signs).unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    return rotated


def rotate_hessian(hessian: Tensor, seed: int | None) -> Tensor:
    """R H R^T of [..., K, K], for weights and inputs that are rotated by R."""
    return rotate(rotate(hessian, seed).transpose(-1, -2), seed).transpose(-1, -2)


def damp(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I; the identity where H is zero, so that nothing divides by zero."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return torch.where(mean > 0, hessian + damping * mean * eye, eye)


def shrinkage(num_tokens: int, size: int, trust: float = TRUST) -> float:
    """How much of the layer's Hessian an expert of `num_tokens` borrows: 1 / (1 + trust (n/K)^0.75)."""
    return 1.0 / (1.0 + trust * math.pow(num_tokens / size, 0.75))


def shrink(expert: Gram, layer: Gram, trust: float = TRUST) -> Tensor:
    """(1 - a) H_e + a (tr H_e / tr H) H; the layer's own Hessian for an expert that saw nothing."""
    share = shrinkage(expert.num_tokens, expert.size, trust)
    if layer.scale <= 0:
        return expert.matrix
    ratio = expert.scale / layer.scale if expert.scale > 0 else 1.0
    return (1 - share) * expert.matrix + (share * ratio) * layer.matrix
