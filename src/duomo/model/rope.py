"""Angles of the rotary positions: three-dimensional in the decoder, two-dimensional in the vision tower.

In the decoder the pairs of a head are dealt h, w, h, w, ..., then all of t, which so has the lowest
frequencies. Text stands at t = h = w, where this is the ordinary one-dimensional rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from duomo.model.config import ModelConfig, VisionConfig


class Rotation(NamedTuple):
    """cos and sin of every angle, fp32, one row a token and one column a pair."""

    cos: Tensor
    sin: Tensor


def decoder_rotation(positions_3T: Tensor, config: ModelConfig) -> Rotation:
    """Angles [T, H/2] from positions (t, h, w); spec section 3.3."""
    device = positions_3T.device
    pair = torch.arange(config.head_dim // 2, device=device)
    frequency = config.rope_theta ** (-2.0 * pair.float() / config.head_dim)
    if config.rope_section is None:
        axis = torch.zeros_like(pair)
    else:
        spatial = 2 * config.rope_section[0]
        axis = torch.where(pair < spatial, 1 + pair % 2, 0)
    angles = positions_3T[axis].T.float() * frequency
    return Rotation(angles.cos(), angles.sin())


def vision_rotation(rows_P: Tensor, columns_P: Tensor, config: VisionConfig) -> Rotation:
    """Angles [P, H/2]: the first half turns with the row, the second with the column; spec section 4.1."""
    half = config.hidden_size // config.num_heads // 2
    pair = torch.arange(0, half, 2, device=rows_P.device).float()
    frequency = 1.0 / config.rope_theta ** (pair / half)
    angles = torch.cat((rows_P[:, None] * frequency, columns_P[:, None] * frequency), dim=-1)
    return Rotation(angles.cos(), angles.sin())
