"""Rotary positions: interleaved pairs in the decoder, halves in the vision tower. Computed in fp32.

The two must not be mixed: the decoder rotates (x0, x1), (x2, x3), ...; the tower rotates x[i] with
x[i + H/2]. It is the commonest error in ports of this model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x_TNH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotates adjacent pairs; cos and sin are fp32 [T, H/2]."""
    even, odd = x_TNH.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TP[:, None], sin_TP[:, None]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x_TNH.dtype)


def rotate_halves(x_PNH: Tensor, cos_PQ: Tensor, sin_PQ: Tensor) -> Tensor:
    """Rotates the first half of a head against the second; cos and sin are fp32 [P, H/2]."""
    first, second = x_PNH.float().chunk(2, dim=-1)
    cos, sin = cos_PQ[:, None], sin_PQ[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_PNH.dtype)
